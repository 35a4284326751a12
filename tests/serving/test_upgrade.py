"""`doit upgrade RELEASE`: what another release of Triton would mean."""

import json
from pathlib import Path
from typing import Any

import pytest
from doit.exceptions import TaskFailed

from build_tasks.serving import upgrade
from build_tasks.spec.loader import load
from tests.support.project import OTHER, Project
from tests.support.triton_cases import ENSEMBLE, plan, spec, tensors

ALL = f'formats = ["torchscript", "onnx", "tensorrt"]\n{ENSEMBLE}'


def upgrade_to(*words: str, text: str = spec("", ALL), **signatures: dict[str, Any]) -> TaskFailed | None:
    """Write a spec and signatures of its artifacts, and run the action of `doit upgrade`."""
    folder = Path("models/m")
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(text)
    Path("build/m").mkdir(parents=True)
    for name, signature in signatures.items():
        Path(f"build/m/model.{name}.signature.json").write_text(json.dumps(signature))
    return upgrade.upgrade(list(load()), list(words))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def line_of(out: str, text: str) -> str:
    (line,) = [line for line in out.splitlines() if text in line]
    return line


def test_artifacts_stay_or_are_rebuilt(capsys: pytest.CaptureFixture[str]) -> None:
    assert upgrade_to("26.09", pt=tensors(PyTorch="2.14.1"), onnx=tensors(), plan=plan()) is None
    out = capsys.readouterr().out
    assert "Triton 26.08 -> 26.09: TensorRT 11.2.1.2 -> 11.3.0.99, ONNX Runtime 1.28.0 -> 1.30.0, PyTorch 2.14" in out
    assert line_of(out, " model.pt ").split() == ["m", "model.pt", "stays"]
    assert line_of(out, " model.onnx ").split() == ["m_onnx", "model.onnx", "stays"]
    assert "to rebuild  the plan was built with TensorRT 11.2.1.2, and Triton 26.09 has 11.3.0.99" in out
    assert line_of(out, "m_ensemble").split()[-1] == "stays"
    assert "nothing was changed" in out


def test_what_is_unknown_is_named_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert upgrade_to("26.11", pt=tensors(PyTorch="2.15.0"), onnx=tensors(), plan=plan()) is None
    out = capsys.readouterr().out
    assert "TensorRT 11.2.1.2 -> unknown" in out
    assert "unknown  traced with PyTorch 2.15.0, and Triton 26.11 has 2.14 or newer" in out
    assert "unknown  which TensorRT Triton 26.11 has is unknown" in out


def test_what_an_older_release_cannot_load_fails(capsys: pytest.CaptureFixture[str]) -> None:
    text = spec("[triton]\nmodel_metrics = {}\n[triton.torchscript]\nparameters = { INTRA_OP_THREAD_COUNT = 2 }", ALL)
    text = text.replace("model_metrics = {}", "model_metrics = { metric_control = [{}] }")
    result = upgrade_to("24.03", text=text, onnx=tensors(opset=21))
    assert isinstance(result, TaskFailed)
    assert "Triton 24.03 would not serve m_onnx, models/m/model.toml as it is" in str(result)
    out = capsys.readouterr().out
    assert "cannot be loaded  the graph has opset 21, and Triton 24.03 has ONNX Runtime 1.17.2, which reads 20" in out
    assert "triton.model_metrics: expected nothing, since Triton 24.03 does not know this field (24.11 and newer" in out
    assert "triton.torchscript.parameters.INTRA_OP_THREAD_COUNT: expected nothing, since Triton 24.03 does not" in out
    assert "config.pbtxt of each ensemble loses ensemble_scheduling.max_inflight_requests" in out
    assert line_of(out, " model.pt ").endswith("not built")


def test_fields_that_mean_another_thing_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    text = spec('[triton]\nrelease = "25.10"', ALL)
    assert upgrade_to("26.08", text=text) is None
    out = capsys.readouterr().out
    assert "since 26.04, ensemble: ensemble_scheduling.max_inflight_requests limits all requests" in out
    assert "since 26.04, torchscript: default_model_filename is empty" in out
    assert "since 26.04, server: clients cannot use shared memory" in out
    assert "config.pbtxt of each ensemble gets ensemble_scheduling.max_inflight_requests" in out
    assert "since 25.05" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["26.12"], "upgrade: Triton 26.12 is unknown here (known: 23.10 to 26.11, in release_table.py)"),
        ([], "upgrade: expected one release of Triton's containers, as in `doit upgrade 26.11`, found nothing"),
        (["new"], "upgrade: expected one release of Triton's containers, as in `doit upgrade 26.11`, found 'new'"),
        (["26.10", "26.11"], "found '26.10 26.11'"),
    ],
)
def test_a_wrong_release_is_one_line(words: list[str], message: str) -> None:
    assert message in str(upgrade_to(*words))


def test_the_command_changes_nothing(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    project.model("m", OTHER)
    before = project.tree("models")
    run = project.built("upgrade", "26.11")
    assert "Triton 26.08 -> 26.11: " in run.out
    assert "not built" in run.out
    assert project.tree("models") == before
    assert project.doit("upgrade", "26.12").code == 1
    assert "doit upgrade" in project.built("help").out
