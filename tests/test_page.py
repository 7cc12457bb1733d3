"""pinnace/http/page.py and page.html: the page at /, in a browser without internet."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.support.browser import needs_browser, open_page
from tests.support.clients import make_v1_request
from tests.support.metrics import requests_by_outcome, wait_for_metric
from tests.support.pictures import CAT
from tests.support.servers import PROJECT, Server, run_server
from tests.support.waiting import wait_for

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
PHOTO = {"name": "cat's photo.png", "mimeType": "image/png", "buffer": CAT}
DROP = """([name, type, text]) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt());
    const data = new DataTransfer();
    data.items.add(new File([bytes], name, {type}));
    const event = KIND === "paste" ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true})
                                   : new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
    document.body.dispatchEvent(event);
}"""


def give_file(
    page: Page, kind: str, content: bytes = CAT, name: str = "photo.png", media_type: str = "image/png"
) -> None:
    """Drop, paste or choose a file on the page."""
    if kind == "choose":
        page.set_input_files("#file", {"name": name, "mimeType": media_type, "buffer": content})
    else:
        page.evaluate(DROP.replace("KIND", json.dumps(kind)), [name, media_type, base64.b64encode(content).decode()])


def read_classes(page: Page) -> list[str]:
    """Return the label and percentage of each of the five bars."""
    expect(page.locator("#classes li")).to_have_count(5)
    return [" ".join(row.split("\n")) for row in page.locator("#classes li").all_inner_texts()]


def get_expected_classes(server: Server) -> list[str]:
    request = {**json.loads(make_v1_request(CAT)), "signature_name": "classification"}
    (row,) = server.predict(json.dumps(request)).json()["predictions"]
    return [f"{found['label']} {100 * found['probability']:.1f} %" for found in row]


@pytest.fixture(scope="module")
def several(model_dir: Path) -> Iterator[Server]:
    echo = "--predictor=words=tests.support.predictors:Echo"
    with run_server(f"--model=pictures={model_dir},words=", echo, "--enable_grpc=false") as server:
        yield server


def test_a_browser_gets_the_page_and_every_other_client_kserves_answer(server: Server) -> None:
    page = httpx.get(server.url, headers=BROWSER)

    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for accept in ("*/*", "application/json"):
        assert httpx.get(server.url, headers={"accept": accept}).json() == {"status": "alive"}


def test_without_the_page_a_browser_gets_kserves_answer() -> None:
    with run_server("--predictor=tests.support.predictors:Echo", "--enable_ui=false") as server:
        assert httpx.get(server.url, headers=BROWSER).json() == {"status": "alive"}


@needs_browser
@pytest.mark.parametrize("kind", ["drop", "paste", "choose"])
def test_a_picture_gets_its_five_classes_and_the_time_of_each_stage(kind: str, server: Server) -> None:
    with open_page(server.url) as (page, problems):
        expect(page.locator("#facts")).to_contain_text("architecture alexnet")
        give_file(page, kind)

        assert read_classes(page) == get_expected_classes(server)
        expect(page.get_by_alt_text("Your picture, photo.png")).to_be_visible()
        stages = [row.split()[0] for row in page.locator("#legend li").all_inner_texts()]
        assert stages == ["preprocess", "waiting", "predict", "postprocess", "network"]
        assert problems == []


@needs_browser
def test_the_answer_to_an_earlier_picture_is_not_shown(model_dir: Path, make_gate: Callable[[str], Path]) -> None:
    """A run of the other model is held, so that the first picture's answer arrives after the second file, a PDF."""
    held = make_gate("held")
    flags = (f"--model=pictures={model_dir},slow=", "--predictor=slow=tests.support.predictors:AllCores")
    with run_server(*flags) as server, ThreadPoolExecutor() as clients, open_page(server.url) as (page, _):
        expect(page.locator("#facts")).to_contain_text("architecture alexnet")
        body = json.dumps({"instances": [str(held)]})
        busy = clients.submit(server.post, "/v1/models/slow:predict", body)
        with held.open("wb"):
            give_file(page, "drop")
            wait_for_metric(server, "pinnace_requests_in_flight", 2)
            give_file(page, "drop", b"%PDF-1.7", "a.pdf", "application/pdf")
            expect(page.locator("#problem")).to_contain_text("a.pdf is not a picture")
        assert busy.result().status_code == 200
        wait_for(lambda: requests_by_outcome(server).get(("v1", "answered")) == 2, "two answered requests")
        expect(page.locator("#in-flight")).to_have_text("0")

        assert page.locator("#problem").is_visible()
        assert page.locator("#classes li").count() == 0


@needs_browser
def test_untrained_weights_show_an_alert(server: Server) -> None:
    with open_page(server.url) as (page, _):
        expect(page.get_by_role("alert")).to_have_text(
            "UNTRAINED WEIGHTS (seeded:0): the answers are meaningless, for tests and benchmarks only"
        )
        expect(page.locator("#facts")).to_contain_text("weights seeded:0")


@needs_browser
@pytest.mark.parametrize(
    ("name", "size_bytes", "message"),
    [
        ("a.pdf", 9, "a.pdf is not a picture in a supported format: JPEG, PNG, "),
        ("a.jpg", 50_000_000, "a.jpg is 50.0 MB. This server accepts pictures of up to 13.4 MB "),
    ],
    ids=["PDF", "50 MB"],
)
def test_a_file_that_the_server_would_refuse_is_not_sent(
    name: str, size_bytes: int, message: str, server: Server, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(b"%PDF-1.7\n" + bytes(size_bytes - 9))
    with open_page(server.url) as (page, problems):
        expect(page.locator("#facts")).not_to_be_empty()
        page.set_input_files("#file", file)

        expect(page.locator("#problem")).to_contain_text(message)
        expect(page.locator("#classes li")).to_have_count(0)
        assert problems == []


@needs_browser
def test_an_error_of_the_server_is_shown(server: Server) -> None:
    with open_page(server.url) as (page, _):
        expect(page.locator("#facts")).not_to_be_empty()
        give_file(page, "choose", CAT[:200])

        expect(page.locator("#problem")).to_contain_text("input 'image', row 0: ")


@needs_browser
@pytest.mark.parametrize("tab", ["curl", "Python, REST", "Python, gRPC"])
def test_the_code_shown_runs_and_gives_the_same_answer(tab: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / str(PHOTO["name"])).write_bytes(CAT)
    with open_page(server.url) as (page, _):
        expect(page.locator("#facts")).not_to_be_empty()
        page.set_input_files("#file", PHOTO)  # type: ignore[arg-type]
        labels = [row.rsplit(" ", 2)[0] for row in read_classes(page)]
        page.get_by_role("tab", name=tab).click()
        code = page.locator("#code").inner_text()

    command = ["bash", "-c", code] if tab == "curl" else [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    if tab == "curl":
        assert [found["label"] for found in json.loads(done.stdout)["predictions"][0]] == labels
    else:
        assert [line.partition("%  ")[2] for line in done.stdout.splitlines()] == labels


@needs_browser
def test_arrow_keys_select_the_tabs(server: Server) -> None:
    with open_page(server.url) as (page, _):
        page.get_by_role("tab", name="curl").focus()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("tab", name="Python, REST")).to_be_focused()
        expect(page.locator("#code")).to_contain_text("import urllib.request")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")

        expect(page.get_by_role("tab", name="Python, gRPC")).to_have_attribute("aria-selected", "true")


@needs_browser
def test_the_page_shows_the_rate_of_all_requests(server: Server) -> None:
    with open_page(server.url) as (page, problems):
        expect(page.locator("#rate")).not_to_have_text("–")
        expect(page.locator("#state")).to_have_text("ready")
        server.predict(make_v1_request(CAT))

        expect(page.locator("#rate")).not_to_have_text("0.0")
        assert problems == []


@needs_browser
def test_each_of_several_models_has_its_own_form(several: Server) -> None:
    with open_page(several.url) as (page, problems):
        expect(page.get_by_role("tab", name="Python, gRPC")).to_be_hidden()
        page.get_by_label("Model", exact=True).select_option("words")
        page.get_by_label("The body of a V1 request").fill('{"instances": ["a", "b"]}')
        page.get_by_role("button", name="Predict").click()

        expect(page.locator("#plain")).to_have_text('[ "a", "b" ]', use_inner_text=False)
        code = page.locator("#code").inner_text()
        assert json.loads(subprocess.check_output(["bash", "-c", code], timeout=60)) == {"predictions": ["a", "b"]}
        page.get_by_label("Model", exact=True).select_option("pictures")
        give_file(page, "drop")
        assert len(read_classes(page)) == 5
        assert problems == []


@needs_browser
def test_the_page_requests_a_key_when_the_server_needs_it(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    flags = (f"--model_dir={model_dir}", f"--api_key_file={tmp_path / 'keys'}")
    with run_server(*flags) as server, open_page(server.url) as (page, _):
        expect(page.locator("#problem")).to_have_text("Enter the server's API key above.")
        page.get_by_label("This server requires an API key").fill("guess")
        page.keyboard.press("Enter")
        expect(page.locator("#problem")).to_have_text("The server does not accept this key.")
        page.get_by_label("This server requires an API key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#facts")).to_contain_text("alexnet")
        give_file(page, "choose")

        assert len(read_classes(page)) == 5
        assert "$API_KEY" in page.locator("#code").inner_text()


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width_pixels", [375, 1280])
def test_the_page_is_accessible_and_fits_the_window(width_pixels: int, dark: bool, server: Server) -> None:
    """Axe finds no violation, and nothing is wider than the window."""
    with open_page(server.url, width_pixels, dark) as (page, _):
        expect(page.locator("#facts")).not_to_be_empty()
        give_file(page, "choose")
        read_classes(page)

        result = Axe().run(page)
        assert result.violations_count == 0, result.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width_pixels
