"""TorchScript and ONNX files on the device that serves them: this machine's GPU, or its CPU.

    triton.device, the GPU of this machine, PyTorch or ONNX Runtime with CUDA ─► device ─► session

On a GPU, PyTorch computes convolutions in TF32, and ONNX Runtime matrix products, too. These are their defaults, which
Triton's backends keep. So the files run in the same way here, and the gate applies the limits of TF32.
"""

import functools
import importlib.metadata
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from build_tasks.errors import UserError, first_lines
from build_tasks.runtime import hardware
from build_tasks.tensors import Feed, batch_of

if TYPE_CHECKING:
    import numpy as np

    RunBatch = Callable[[Feed], list[np.ndarray]]

CPU = "CPU"
FIRST_TF32 = 8  # major compute capability

# The distribution that runs a kind of artifact on a GPU. The package `onnxruntime` is for CPUs only.
GPU_TOOLS = {"torchscript": "torch", "cast": "torch", "onnx": "onnxruntime-gpu", "graph": "onnxruntime-gpu"}

# The file in which each of them states the version of CUDA that it was built for.
CUDA_VERSION = {"torch": "torch/version.py", "onnxruntime-gpu": "onnxruntime/capi/build_and_package_info.py"}


class Session(NamedTuple):
    """A loaded artifact."""

    run: "RunBatch"
    device: str  # CPU, or the name of the GPU
    arithmetic: str | None = None  # "tf32": fp32 is computed with its rounding

    @property
    def on_gpu(self) -> bool:
        return not self.device.startswith(CPU)


def gpu_of(runner: str) -> hardware.Gpu | None:
    """Return the GPU of this machine if what runs a kind of artifact can use it, else None.

    It must be built for a version of CUDA that the driver runs. A driver runs all minor versions of its newest major
    version, and all older versions.

    Args:
        runner: A key of GPU_TOOLS.
    Source: NVIDIA, CUDA Compatibility.
    """
    gpu, cuda = hardware.gpu(), _built_for_cuda(GPU_TOOLS[runner])
    return gpu if isinstance(gpu, hardware.Gpu) and cuda is not None and cuda <= hardware.driver_cuda() else None


@functools.cache
def _built_for_cuda(distribution: str) -> int | None:
    """The major version of CUDA that a distribution was built for, None if it is for CPUs only or is not installed.

    doit itself needs to know it, and imports neither PyTorch nor ONNX Runtime.
    """
    try:
        path = importlib.metadata.distribution(distribution).locate_file(CUDA_VERSION[distribution])
        with open(str(path), encoding="utf-8") as file:
            version = re.search(r"""^cuda(?:_version)?\b[^=\n]*= *['"](\d+)""", file.read(), re.MULTILINE)
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None
    return int(version[1]) if version else None


def host_fingerprint(runner: str, served_on: str) -> dict[str, str]:
    """Return the device on which this machine runs a kind of artifact, for the fingerprint of its figures.

    Args:
        runner: A key of GPU_TOOLS.
        served_on: triton.device.
    """
    gpu = gpu_of(runner)
    assert gpu is not None  # elsewhere, a stage has no such fingerprint
    return {"measured on": CPU if served_on == "cpu" else f"{gpu.name} ({gpu.compute_capability})"}


def open_session(runner: str, path: str, names: list[str], run_on_cpu: "Callable[[str], RunBatch]") -> Session:
    """Load an artifact on the GPU of this machine, or on its CPU if PyTorch or ONNX Runtime cannot use the GPU.

    Args:
        runner: A key of GPU_TOOLS.
        path: The artifact.
        names: The names of its inputs, in their order.
        run_on_cpu: Loads the artifact on the CPU.
    """
    gpu = gpu_of(runner)
    run = gpu and (_run_torchscript(path, names) if GPU_TOOLS[runner] == "torch" else _run_onnx(path))
    if gpu is None or run is None:
        return Session(run_on_cpu(path), f"{CPU}, because CUDA does not work here")
    has_tf32 = int(gpu.compute_capability.partition(".")[0]) >= FIRST_TF32
    return Session(functools.partial(_run_on_gpu, run, gpu.name), gpu.name, "tf32" if has_tf32 else None)


def _run_on_gpu(run: "RunBatch", gpu: str, feed: Feed) -> "list[np.ndarray]":
    try:
        return run(feed)
    except UserError:
        raise
    except Exception as error:  # every library has its own
        raise UserError(f"a batch of {batch_of(feed)} fails on the {gpu}: {first_lines(error)}") from error


def _run_torchscript(path: str, names: list[str]) -> "RunBatch | None":
    import torch

    from build_tasks.formats.serving_interface import forward

    if not torch.cuda.is_available():
        return None
    module = torch.jit.load(path, map_location="cuda")

    def run(feed: Feed) -> "list[np.ndarray]":
        inputs = [torch.from_numpy(feed[name]).cuda() for name in names]
        return [answer.cpu().numpy() for answer in forward(module, inputs)]

    return run


def _run_onnx(path: str) -> "RunBatch | None":
    import onnxruntime

    from build_tasks.formats.onnx_files import onnx_file

    onnxruntime.preload_dlls()  # CUDA's libraries may be in Python packages
    session = onnxruntime.InferenceSession(onnx_file(path), providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    if session.get_providers()[0] != "CUDAExecutionProvider":  # it has warned why, in the log of the stage
        return None
    return lambda feed: session.run(None, feed)
