"""TorchScript and ONNX files are measured on the device that serves them."""

import functools
import json
from pathlib import Path

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


def install(folder: Path, distribution: str, file: str, line: str) -> Path:
    """Write the metadata of a distribution and the file that states its version of CUDA. Returns the folder."""
    metadata = folder / f"{distribution.replace('-', '_')}-{torch.__version__}.dist-info/METADATA"
    for path, text in ((metadata, f"Name: {distribution}\nVersion: {torch.__version__}\n"), (folder / file, line)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def before(folder: Path, machine: dict[str, str]) -> dict[str, str]:
    """A machine with a further folder of distributions, before the others."""
    return {**machine, "PYTHONPATH": f"{folder}:{machine['PYTHONPATH']}"}


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is for CPUs only")
def test_the_device_is_part_of_the_record_and_of_the_line(project: Project, tmp_path: Path) -> None:
    """The fake GPU is seen by the driver's library, and has no CUDA."""
    folder = tiny_network.add(project, "net", formats='"torchscript", "onnx"')
    without_gpu = fakes.machine(project.root.parent, gpus=None)
    run = project.built("measure", **without_gpu)
    assert run.out.count("device: CPU") == 2, run.out
    assert torch.version.cuda
    cuda = int(torch.version.cuda.partition(".")[0])
    machine = functools.partial(fakes.machine, project.root.parent, gpus="NVIDIA H200, 9.0")
    assert project.built("measure", **machine(cuda=None)).ran == [], "the driver has no CUDA"
    assert project.built("measure", **machine(cuda=cuda - 1)).ran == [], "the driver is too old"
    for_cpus = install(tmp_path / "for CPUs", "torch", "torch/version.py", "cuda: Optional[str] = None\n")
    assert project.built("measure", **before(for_cpus, machine(cuda=cuda))).ran == []
    run = project.built("measure", **machine(cuda=cuda))
    assert run.ran == ["measure:net"], "this onnxruntime is for CPUs only"
    assert "measured on: none -> NVIDIA H200 (9.0)" in run.out
    assert "device: CPU, because CUDA does not work here" in run.out
    assert device(project, "model.pt") == "CPU, because CUDA does not work here"
    assert project.built("measure", **machine(cuda=cuda + 1)).ran == []
    assert project.built("measure", **without_gpu).ran == [], "a missing GPU makes nothing stale"
    build = "onnxruntime/capi/build_and_package_info.py"
    for_gpus = install(tmp_path / "for GPUs", "onnxruntime-gpu", build, f"cuda_version = '{cuda}.0'\n")
    assert "measure:net_onnx" in project.built("measure", **before(for_gpus, machine(cuda=cuda))).ran
    assert device(project, "model.onnx") == "CPU, because CUDA does not work here"
    (folder / "model.toml").write_text((folder / "model.toml").read_text() + '[triton]\ndevice = "cpu"\n')
    assert project.built("measure:net", **machine(cuda=cuda)).ran == ["measure:net"]
    assert device(project, "model.pt") == "CPU"


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
