"""TorchScript and ONNX files are measured on the device that serves them."""

import json

import pytest
import torch

from build_tasks.formats import serving_device
from build_tasks.formats.onnx_runtime import onnx_session
from build_tasks.stages.measure import run_trace
from tests.support import fakes, tiny_network
from tests.support.project import Project


def device(project: Project, file: str) -> str:
    name: str = json.loads((project / f"build/net/{file}.measured.json").read_text())["device"]
    return name


def test_the_device_is_part_of_the_record_and_of_the_line(project: Project) -> None:
    """The fake GPU is seen by the driver's library, and has no CUDA."""
    folder = tiny_network.add(project, "net", formats='"torchscript", "onnx"')
    without_gpu = fakes.machine(project.root.parent, gpus=None)
    run = project.built("measure", **without_gpu)
    assert run.out.count("device: CPU") == 2, run.out
    machine = fakes.machine(project.root.parent, gpus="NVIDIA H200, 9.0")
    run = project.built("measure", **machine)
    assert run.ran == ["measure:net"], "this onnxruntime is for CPUs only"
    assert "measured on: None -> NVIDIA H200 (9.0)" in run.out
    assert device(project, "model.pt") == "CPU, because CUDA does not work here"
    assert project.built("measure", **machine).ran == []
    assert project.built("measure", **without_gpu).ran == [], "a missing GPU makes nothing stale"
    (folder / "model.toml").write_text((folder / "model.toml").read_text() + '[triton]\ndevice = "cpu"\n')
    assert project.built("measure", **machine).ran == ["measure:net"]
    assert device(project, "model.pt") == device(project, "model.onnx") == "CPU"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="lacks an NVIDIA GPU")
@pytest.mark.parametrize(("runner", "file"), [("torchscript", "model.pt"), ("onnx", "model.onnx")])
def test_on_a_gpu_the_answers_are_nearly_those_of_the_cpu(project: Project, runner: str, file: str) -> None:
    tiny_network.add(project, "net", formats='"torchscript", "onnx"')
    project.built("torchscript", "onnx")
    path = str(project / f"build/net/{file}")
    on_cpu = onnx_session if runner == "onnx" else lambda path: run_trace(path, ["INPUT__0"])
    session = serving_device.open_session(runner, path, ["INPUT__0"], on_cpu)
    if runner == "torchscript" or serving_device.gpu_of(runner):
        assert session.on_gpu
    for batch in (1, 3):
        images = {"INPUT__0": torch.rand(batch, 3, 16, 16).numpy()}
        for found, expected in zip(session.run(images), on_cpu(path)(images), strict=True):
            assert abs(found - expected).max() < 1e-2 * abs(expected).max()
