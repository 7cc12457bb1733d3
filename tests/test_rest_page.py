"""pinnace/rest_page.py and page.html: what a browser shows at /, with no internet."""

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

from tests.browser import needs_browser, opened
from tests.pictures import CAT, v1_request
from tests.servers import PROJECT, Server, running
from tests.test_metrics import ended, value, wait_for

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


def give(page: Page, kind: str, content: bytes = CAT, name: str = "photo.png", media_type: str = "image/png") -> None:
    """A file by the hands of a user: dropped, pasted or chosen."""
    if kind == "choose":
        page.set_input_files("#file", {"name": name, "mimeType": media_type, "buffer": content})
    else:
        page.evaluate(DROP.replace("KIND", json.dumps(kind)), [name, media_type, base64.b64encode(content).decode()])


def found(page: Page) -> list[str]:
    """Label and percent of each bar."""
    expect(page.locator("#classes li")).to_have_count(5)
    return [" ".join(row.split("\n")) for row in page.locator("#classes li").all_inner_texts()]


def expected(server: Server) -> list[str]:
    request = {**json.loads(v1_request(CAT)), "signature_name": "classification"}
    (row,) = server.predict(json.dumps(request)).json()["predictions"]
    return [f"{one['label']} {100 * one['probability']:.1f} %" for one in row]


@pytest.fixture(scope="module")
def several(model_dir: Path) -> Iterator[Server]:
    echo = "--predictor=words=tests.predictors:Echo"
    with running(f"--model=pictures={model_dir},words=", echo, "--enable_grpc=false") as server:
        yield server


def test_a_browser_gets_the_page_and_every_other_client_what_kserve_answers(server: Server) -> None:
    page = httpx.get(server.url, headers=BROWSER)

    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for accept in ("*/*", "application/json"):
        assert httpx.get(server.url, headers={"accept": accept}).json() == {"status": "alive"}


def test_without_a_page_a_browser_gets_what_kserve_answers() -> None:
    with running("--predictor=tests.predictors:Echo", "--enable_ui=false") as server:
        assert httpx.get(server.url, headers=BROWSER).json() == {"status": "alive"}


@needs_browser
@pytest.mark.parametrize("kind", ["drop", "paste", "choose"])
def test_a_picture_that_is_given_shows_its_five_classes_and_where_the_time_went(kind: str, server: Server) -> None:
    with opened(server.url) as (page, troubles):
        expect(page.locator("#facts")).to_contain_text("architecture alexnet")
        give(page, kind)

        assert found(page) == expected(server)
        expect(page.get_by_alt_text("Your picture, photo.png")).to_be_visible()
        stages = [row.split()[0] for row in page.locator("#legend li").all_inner_texts()]
        assert stages == ["preprocess", "waiting", "predict", "postprocess", "network"]
        assert troubles == []


@needs_browser
def test_what_was_asked_before_is_not_shown_any_more(model_dir: Path, gate: Callable[[str], Path]) -> None:
    """The model is held, so that the first picture's answer comes after the file that is none."""
    held = gate("held")
    flags = (f"--model=pictures={model_dir},slow=", "--predictor=slow=tests.predictors:EveryCore")
    with running(*flags) as server, ThreadPoolExecutor() as clients, opened(server.url) as (page, _):
        expect(page.locator("#facts")).to_contain_text("architecture alexnet")
        body = json.dumps({"instances": [str(held)]})
        busy = clients.submit(server.post, "/v1/models/slow:predict", body)
        with held.open("wb"):
            give(page, "drop")
            wait_for(lambda: value(server, "pinnace_requests_in_flight") == 2, server)
            give(page, "drop", b"%PDF-1.7", "a.pdf", "application/pdf")
            expect(page.locator("#problem")).to_contain_text("a.pdf is not a picture")
        assert busy.result().status_code == 200
        wait_for(lambda: ended(server).get(("v1", "answered")) == 2, server)
        expect(page.locator("#in-flight")).to_have_text("0")

        assert page.locator("#problem").is_visible()
        assert page.locator("#classes li").count() == 0


@needs_browser
def test_untrained_weights_are_told_loudly(server: Server) -> None:
    with opened(server.url) as (page, _):
        expect(page.get_by_role("alert")).to_have_text(
            "UNTRAINED WEIGHTS (seeded:0): the answers are meaningless, for tests and benchmarks only"
        )
        expect(page.locator("#facts")).to_contain_text("weights seeded:0")


@needs_browser
@pytest.mark.parametrize(
    ("name", "size_bytes", "message"),
    [
        ("a.pdf", 9, "a.pdf is not a picture in a supported format: JPEG, PNG, "),
        ("a.jpg", 50_000_000, "a.jpg is 50.0 MB. This server accepts pictures of up to 6.3 MB "),
    ],
    ids=["PDF", "50 MB"],
)
def test_what_cannot_be_answered_is_told_without_asking(
    name: str, size_bytes: int, message: str, server: Server, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(b"%PDF-1.7\n" + bytes(size_bytes - 9))
    with opened(server.url) as (page, troubles):
        expect(page.locator("#facts")).not_to_be_empty()
        page.set_input_files("#file", file)

        expect(page.locator("#problem")).to_contain_text(message)
        expect(page.locator("#classes li")).to_have_count(0)
        assert troubles == []


@needs_browser
def test_what_the_server_refuses_is_told_in_its_words(server: Server) -> None:
    with opened(server.url) as (page, _):
        expect(page.locator("#facts")).not_to_be_empty()
        give(page, "choose", CAT[:200])

        expect(page.locator("#problem")).to_contain_text("input 'image', row 0: ")


@needs_browser
@pytest.mark.parametrize("tab", ["curl", "Python, REST", "Python, gRPC"])
def test_the_code_shown_gives_the_same_answer_as_it_stands(tab: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / str(PHOTO["name"])).write_bytes(CAT)
    with opened(server.url) as (page, _):
        expect(page.locator("#facts")).not_to_be_empty()
        page.set_input_files("#file", PHOTO)  # type: ignore[arg-type]
        labels = [row.rsplit(" ", 2)[0] for row in found(page)]
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
        assert [one["label"] for one in json.loads(done.stdout)["predictions"][0]] == labels
    else:
        assert [line.partition("%  ")[2] for line in done.stdout.splitlines()] == labels


@needs_browser
def test_the_tabs_are_walked_by_arrow_keys(server: Server) -> None:
    with opened(server.url) as (page, _):
        page.get_by_role("tab", name="curl").focus()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("tab", name="Python, REST")).to_be_focused()
        expect(page.locator("#code")).to_contain_text("import urllib.request")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")

        expect(page.get_by_role("tab", name="Python, gRPC")).to_have_attribute("aria-selected", "true")


@needs_browser
def test_the_page_counts_what_others_ask(server: Server) -> None:
    with opened(server.url) as (page, troubles):
        expect(page.locator("#rate")).not_to_have_text("–")
        expect(page.locator("#state")).to_have_text("ready")
        server.predict(v1_request(CAT))

        expect(page.locator("#rate")).not_to_have_text("0.0")
        assert troubles == []


@needs_browser
def test_of_several_models_each_is_asked_in_its_own_way(several: Server) -> None:
    with opened(several.url) as (page, troubles):
        expect(page.get_by_role("tab", name="Python, gRPC")).to_be_hidden()
        page.get_by_label("Model", exact=True).select_option("words")
        page.get_by_label("The body of a V1 request").fill('{"instances": ["a", "b"]}')
        page.get_by_role("button", name="Predict").click()

        expect(page.locator("#plain")).to_have_text('[ "a", "b" ]', use_inner_text=False)
        code = page.locator("#code").inner_text()
        assert json.loads(subprocess.check_output(["bash", "-c", code], timeout=60)) == {"predictions": ["a", "b"]}
        page.get_by_label("Model", exact=True).select_option("pictures")
        give(page, "drop")
        assert len(found(page)) == 5
        assert troubles == []


@needs_browser
def test_where_a_key_is_needed_the_page_asks_for_it(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    flags = (f"--model_dir={model_dir}", f"--api_key_file={tmp_path / 'keys'}")
    with running(*flags) as server, opened(server.url) as (page, _):
        expect(page.locator("#problem")).to_have_text("Enter the server's API key above.")
        page.get_by_label("This server requires an API key").fill("guess")
        page.keyboard.press("Enter")
        expect(page.locator("#problem")).to_have_text("The server does not accept this key.")
        page.get_by_label("This server requires an API key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#facts")).to_contain_text("alexnet")
        give(page, "choose")

        assert len(found(page)) == 5
        assert "$API_KEY" in page.locator("#code").inner_text()


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width_pixels", [375, 1280])
def test_everybody_can_use_the_page(width_pixels: int, dark: bool, server: Server) -> None:
    """As far as axe can tell; and nothing is wider than the window."""
    with opened(server.url, width_pixels, dark) as (page, _):
        expect(page.locator("#facts")).not_to_be_empty()
        give(page, "choose")
        found(page)

        result = Axe().run(page)
        assert result.violations_count == 0, result.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width_pixels
