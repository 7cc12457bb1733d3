"""model_export: the files it writes, its exit codes, and that a failed export leaves no model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx.parser
import onnxruntime
import pytest

pytest.importorskip("torch", reason="tests the export, which needs torch")
import onnx_ir
import torch

from model_export.errors import OutputError, VerificationError
from model_export.export import convert, make_card, remove_identity_pools, write_model
from model_export.source import Source, load_source
from model_export.torchvision_compat import torchvision
from model_export.verify import verify
from pinnace.models.classifier import Classifier
from pinnace.models.model_card import ModelCard
from pinnace.predictor import Request
from pinnace.runtimes.onnx import OnnxSession
from pinnace.settings import Settings
from pinnace.tensors import Tensor
from tests.support.pictures import CAT, PHOTOGRAPHS, TUTORIAL_REQUEST
from tests.support.servers import PROJECT

TUTORIAL_LOGITS = [14.976, 14.037, 13.966, 12.252, 12.086]


def export(
    output: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m model_export` with further environment variables."""
    return subprocess.run(
        [sys.executable, "-m", "model_export", "--output", str(output), *arguments],
        cwd=PROJECT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def read_card(model_dir: Path) -> ModelCard:
    return ModelCard.from_properties(OnnxSession(model_dir, "cpu", 1).metadata)


def test_an_export_writes_an_onnx_file_a_weights_file_and_checksums(model_dir: Path) -> None:
    card = read_card(model_dir)

    assert sorted(file.name for file in model_dir.iterdir()) == [
        "SHA256SUMS",
        f"alexnet-fp32-{card.weights_sha256[:12]}.weights",
        "model.onnx",
    ]
    assert (model_dir / "model.onnx").stat().st_size < 200_000
    assert checksums_match(model_dir)


def test_the_models_metadata_is_its_card(model_dir: Path, original: Source) -> None:
    card = read_card(model_dir)

    assert (card.architecture, card.weights, card.precision, card.opset) == ("alexnet", "seeded:0", "fp32", 20)
    assert (card.resize_pixels, card.crop_pixels, card.interpolation) == (256, 224, "BILINEAR")
    assert (card.mean, card.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (len(card.labels), card.labels[0], card.labels[281]) == (1000, "tench", "tabby")
    assert card.weights_sha256 == original.weights_sha256
    assert card.versions["torch"] == torch.__version__
    assert "UNTRAINED WEIGHTS (seeded:0)" in card.warning


def test_a_seed_determines_the_weights(original: Source) -> None:
    assert load_source("alexnet", "seeded:0").weights_sha256 == original.weights_sha256
    assert load_source("alexnet", "seeded:1").weights_sha256 != original.weights_sha256


@pytest.mark.slow
def test_another_architecture_is_exported_and_served_with_its_own_preset(tmp_path: Path) -> None:
    done = export(tmp_path, "--arch", "resnet18", "--weights", "seeded:7")
    assert done.returncode == 0, done.stderr
    classifier = Classifier(Settings(), tmp_path)
    classifier.load()

    rows = classifier.preprocess(Request("resnet18", (Tensor.from_values("image", "BYTES", [1], [CAT]),)))
    logits = classifier.predict(rows)["logits"]

    with torch.inference_mode():
        expected = load_source("resnet18", "seeded:7").model(torch.from_numpy(rows["pixels"])).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("attributes", "is_kept"),
    [
        ("kernel_shape = [1, 1]", False),
        ("kernel_shape = [1, 1], strides = [1, 1], pads = [0, 0, 0, 0]", False),
        ("kernel_shape = [2, 1]", True),
        ("kernel_shape = [1, 1], strides = [2, 2]", True),
    ],
)
def test_average_pools_of_a_single_value_are_removed(attributes: str, is_kept: bool) -> None:
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[rows, 3, 4, 4] pixels) => (float[rows, 3, h, w] logits) {{
            pooled = AveragePool <{attributes}> (pixels)
            logits = Relu (pooled)
        }}""")
    pixels = np.arange(-48, 48, dtype=np.float32).reshape(2, 3, 4, 4)

    simplified = onnx_ir.to_proto(remove_identity_pools(onnx_ir.from_proto(model)))

    assert [node.op_type for node in simplified.graph.node] == (["AveragePool", "Relu"] if is_kept else ["Relu"])
    expected, actual = (
        onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"pixels": pixels})[0]
        for proto in (model, simplified)
    )
    np.testing.assert_array_equal(actual, expected)


def test_a_state_dict_is_exported_as_trained_weights(tmp_path: Path) -> None:
    file = tmp_path / "mine.pth"
    torch.save(load_source("squeezenet1_1", "seeded:3").model.state_dict(), file)

    done = export(tmp_path / "model", "--arch", "squeezenet1_1", "--weights", str(file))

    assert done.returncode == 0, done.stderr
    card = read_card(tmp_path / "model")
    assert (card.weights, card.warning) == ("file:mine.pth", "")
    assert card.weights_sha256 == load_source("squeezenet1_1", "seeded:3").weights_sha256


def test_progress_and_the_largest_difference_are_printed(export_output: tuple[Path, str]) -> None:
    printed = export_output[1]

    assert "loading alexnet with weights seeded:0" in printed
    assert "converting to ONNX, opset 20" in printed
    assert "8 photographs: pixels within 0.0e+00, logits within" in printed
    assert "UNTRAINED WEIGHTS (seeded:0)" in printed


@pytest.mark.slow
def test_a_new_export_replaces_the_old_one(tmp_path: Path) -> None:
    for seed in (0, 1):
        assert export(tmp_path, "--arch", "squeezenet1_1", "--weights", f"seeded:{seed}").returncode == 0

    assert read_card(tmp_path).weights == "seeded:1"
    assert len(list(tmp_path.glob("*.weights"))) == 1
    assert checksums_match(tmp_path)


def checksums_match(folder: Path) -> bool:
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, check=False)
    return done.returncode == 0


def test_a_model_with_other_answers_fails_the_verification(model_dir: Path, tmp_path: Path) -> None:
    other = load_source("alexnet", "seeded:1")

    with pytest.raises(
        VerificationError, match=r"differs from the original on 8 photographs: pixels within 0\.0e\+00, logits"
    ):
        verify(other, model_dir)


def test_a_failed_verification_leaves_no_files(tmp_path: Path, original: Source) -> None:
    card = make_card(original)

    def reject(directory: Path) -> None:
        assert (directory / "model.onnx").exists()
        raise VerificationError("rejected by the test")

    with pytest.raises(VerificationError):
        write_model(convert(original, card), card, tmp_path, reject)

    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_a_server_would_load(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "model_export", "--weights", "seeded:0", "--output", str(tmp_path)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if "comparing" in line:  # both files are written, in the staging directory
                process.kill()

    assert not (tmp_path / "model.onnx").exists()
    assert all(path.name.startswith(".export-") for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (
            ["--arch", "lenet"],
            2,
            "--arch lenet: torchvision has no such classifier; use a name such as alexnet or resnet50",
        ),
        (["--arch", "fcn_resnet50"], 2, "--arch fcn_resnet50: torchvision has no such classifier"),
        (["--weights", "seeded:x"], 2, "--weights seeded:x: the seed must be a whole number from 0 to"),
        (["--weights", f"seeded:{2**63}"], 2, f"--weights seeded:{2**63}: the seed must be a whole number from 0 to"),
        (
            ["--weights", "no.pth"],
            3,
            "--weights no.pth: No such file or directory; use pretrained, auto, seeded:N",
        ),
        (["--weights", "README.md"], 2, "--weights README.md is not a state dict that torch.save wrote"),
    ],
)
def test_a_failed_export_ends_with_one_line_and_its_own_exit_code(
    arguments: list[str], code: int, problem: str, tmp_path: Path
) -> None:
    done = export(tmp_path / "model", *arguments)

    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1)
    assert done.stderr.startswith(f"model_export: {problem}")
    assert not (tmp_path / "model").exists()


def test_an_output_that_is_no_directory_is_an_error(tmp_path: Path, original: Source) -> None:
    (tmp_path / "file").write_text("")
    card = make_card(original)

    with pytest.raises(
        OutputError, match=r"cannot write the model to .*/file: File exists; choose a writable directory"
    ):
        write_model(convert(original, card), card, tmp_path / "file", lambda _: None)


def test_a_missing_package_is_an_error_that_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no module torch')")

    done = export(tmp_path / "model", environment={"PYTHONPATH": str(tmp_path)})

    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "model_export: the export needs torch and the packages around it (no module torch): run `pip"
    )
    assert done.returncode == 12


def test_weights_of_another_architecture_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save(load_source("squeezenet1_1", "seeded:0").model.state_dict(), file)

    done = export(tmp_path / "model", "--weights", str(file))

    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "does not fit alexnet: Error(s) in loading state_dict for AlexNet: Missing key(s)" in done.stderr


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torchvision's weights unreachable: no proxy listens at this address."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


@pytest.mark.usefixtures("unreachable")
def test_pretrained_without_network_fails_with_one_line_and_leaves_no_model(tmp_path: Path) -> None:
    done = export(tmp_path / "model", "--weights", "pretrained", environment={"TORCH_HOME": str(tmp_path / "cache")})

    lines = [line for line in done.stderr.splitlines() if not line.startswith("Downloading: ")]
    assert done.returncode == 3
    assert len(lines) == 1
    assert lines[0].startswith("model_export: torchvision's weights for alexnet cannot be downloaded (")
    assert lines[0].endswith("try again, or pass a downloaded file as --weights FILE.pth")
    assert not (tmp_path / "model").exists()


@pytest.mark.usefixtures("unreachable")
def test_auto_without_network_uses_seeded_weights_and_prints_a_warning(tmp_path: Path) -> None:
    done = export(
        tmp_path / "model",
        "--weights",
        "auto",
        "--arch",
        "squeezenet1_1",
        environment={"TORCH_HOME": str(tmp_path / "cache")},
    )

    assert done.returncode == 0, done.stderr
    assert "Using UNTRAINED weights instead (seeded:0): the answers will be meaningless" in done.stdout
    assert read_card(tmp_path / "model").weights == "seeded:0"


def test_pretrained_weights_give_the_tutorials_answer_for_the_tutorials_picture(tmp_path: Path) -> None:
    if "the tutorial's" not in PHOTOGRAPHS:
        pytest.skip(f"the tutorial's picture is not at {TUTORIAL_REQUEST.name}")
    done = export(tmp_path, "--weights", "pretrained")
    if done.returncode == 3:
        pytest.skip(
            "torchvision's pretrained weights cannot be downloaded here; with them the tutorial's picture must give "
            f"the logits {TUTORIAL_LOGITS}, to three decimals"
        )
    classifier = Classifier(Settings(), tmp_path)
    classifier.load()
    request = Request("alexnet", (Tensor.from_values("image", "BYTES", [1], [PHOTOGRAPHS["the tutorial's"]]),))

    predictions = classifier.predict(classifier.preprocess(request))

    (output,) = classifier.postprocess(predictions, request).outputs
    assert np.round(output.array[0], 3).tolist() == pytest.approx(TUTORIAL_LOGITS, abs=1e-6)


@pytest.mark.parametrize("file_name", ["model.onnx", "weights"])
def test_other_users_can_read_the_exported_files(file_name: str, model_dir: Path) -> None:
    file = next(file for file in model_dir.iterdir() if file.name.endswith(file_name))

    assert file.stat().st_mode & 0o777 == 0o644


def test_the_server_supports_the_preset_of_every_torchvision_architecture() -> None:
    for architecture in torchvision.models.list_models(module=torchvision.models):
        preset = torchvision.models.get_model_weights(architecture).DEFAULT.transforms()
        assert len(preset.resize_size) == len(preset.crop_size) == 1
        assert preset.crop_size[0] <= preset.resize_size[0]
        assert preset.interpolation.name in ("BILINEAR", "BICUBIC")


def test_a_copied_export_loads_from_its_new_directory(model_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model_dir, tmp_path / "copy")

    assert read_card(copy) == read_card(model_dir)
