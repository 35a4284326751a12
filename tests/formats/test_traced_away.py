"""Branches on values of tensors, which a trace cannot keep: the stage and the gate name their lines."""

import json

import numpy as np
import pytest

from tests.support import tiny_network
from tests.support.project import Project, failure_line

LINE = 13  # of the body in the network
TIMM = 'formats = ["torchscript"]\n[architecture]\ntimm = "{}"\n[weights]\nsource = "random://1"\n'


def add(project: Project, name: str, body: str, formats: str = '"torchscript"') -> None:
    folder = tiny_network.add(project, name, body=body, formats=formats)
    with (folder / "model.toml").open("a") as spec:
        spec.write('\n[accuracy]\nsamples = "samples.npz"\n')
    noise = np.random.default_rng(1).standard_normal((8, 3, 16, 16)).astype(np.float32)
    np.savez(folder / "samples.npz", INPUT__0=noise * np.float32(1000))


def test_the_gate_names_the_branch_that_the_trace_leaves_out(project: Project) -> None:
    add(project, "branch", "if float(x.abs().max()) > 50: x = x * x", formats='"torchscript", "onnx"')
    run = project.doit("-c")
    assert run.code == 1, run.out
    lines = [line for line in run.out.splitlines() if "traced away" in line]
    assert [line.split()[:2] for line in lines] == [["✓", "torchscript"], ["✓", "onnx"]]
    assert all(f"traced away: models/branch/network.py:{LINE}" in line for line in lines)
    for name in ("accuracy:branch", "accuracy:branch_onnx"):
        message = failure_line(run, name)
        assert f"models/branch/network.py:{LINE} turns a tensor into a Python value" in message.partition("output ")[0]
        assert "accuracy.gate" not in message
        assert len(message) <= 300
    project.doit("report")
    page = (project / "build/report.html").read_text()
    for title in ("TorchScript", "ONNX"):
        assert f"{title}: models/branch/network.py:{LINE} turns a tensor into a Python value" in page


def test_onnx_without_torchscript_names_the_branch_too(project: Project) -> None:
    add(project, "alone", "if x.detach().numpy().max() > 50: x = x * x", formats='"onnx"')
    assert f"traced away: models/alone/network.py:{LINE}" in project.built("onnx:alone").out
    project.edit("models/alone/network.py", "if x.detach().numpy().max() > 50", "if x.shape[0] > 2")
    message = failure_line(project.doit("onnx:alone"), "onnx:alone")
    assert f"models/alone/network.py:{LINE} turns a tensor into a Python value" in message.partition("exporter")[0]


def test_the_check_of_the_trace_names_the_branch(project: Project) -> None:
    add(project, "batch", "if x.shape[0] > 2: x = x * 2")
    run = project.doit("torchscript:batch")
    assert f"models/batch/network.py:{LINE} turns a tensor into a Python value" in failure_line(
        run, "torchscript:batch"
    )


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "efficientnet_lite0"])
def test_a_network_without_such_a_branch_shows_nothing(project: Project, name: str) -> None:
    project.model("plain", TIMM.format(name))
    assert "traced away" not in project.built("torchscript:plain").out
    assert "traced_away" not in json.loads((project / "build/plain/model.pt.signature.json").read_text())
