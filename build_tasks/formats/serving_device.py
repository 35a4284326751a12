"""TorchScript and ONNX files on the device that serves them: this machine's GPU, or its CPU.

    triton.device, the GPU of this machine, PyTorch or ONNX Runtime with CUDA ─► device ─► session

On a GPU, PyTorch computes convolutions in TF32, and ONNX Runtime matrix products, too. These are their defaults, which
Triton's backends keep. So the files run in the same way here, and the gate applies the limits of TF32.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import Struct

from build_tasks.errors import UserError, first_lines
from build_tasks.runtime import hardware
from build_tasks.tensors import Feed, Signature, batch_of

if TYPE_CHECKING:
    import numpy as np

    RunBatch = Callable[[Feed], list[np.ndarray]]

CPU = "CPU"
FIRST_TF32 = 8  # major compute capability

# The distribution that runs a kind of artifact on a GPU. The package `onnxruntime` is for CPUs only.
GPU_TOOLS = {
    **dict.fromkeys(("torchscript", "cast", "aoti"), "torch"),
    **dict.fromkeys(("onnx", "graph"), "onnxruntime-gpu"),
}


class Session(Struct, frozen=True):
    """A loaded artifact."""

    run: "RunBatch"
    device: str  # CPU, or the name of the GPU
    arithmetic: str | None = None  # "tf32": fp32 is computed with its rounding

    @property
    def on_gpu(self) -> bool:
        return not self.device.startswith(CPU)


def gpu_of(runner: str) -> hardware.Gpu | None:
    """Return the GPU of this machine if what runs a kind of artifact can use it, else None.

    Args:
        runner: A key of GPU_TOOLS.
    """
    gpu = hardware.usable_gpu(GPU_TOOLS[runner])
    return gpu if isinstance(gpu, hardware.Gpu) else None


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
    return Session(functools.partial(_run_on_gpu, run, gpu.name), gpu.name, _arithmetic(gpu.compute_capability))


def package_session(path: str, signature: Signature, names: list[str]) -> Session:
    """Load a package of AOTInductor, on the device that it is for.

    Args:
        path: The package.
        signature: Its signature.
        names: The names of its inputs, in their order.
    """
    from build_tasks.formats.aoti_package import load_package

    gpu = gpu_of("aoti") if signature["device"] == "gpu" else None
    run = _run_torch(load_package(path), names, "cuda" if gpu else "cpu")
    if gpu is None:
        return Session(run, CPU)
    return Session(functools.partial(_run_on_gpu, run, gpu.name), gpu.name, _arithmetic(gpu.compute_capability))


def _arithmetic(compute_capability: str) -> str | None:
    return "tf32" if int(compute_capability.partition(".")[0]) >= FIRST_TF32 else None


def _run_on_gpu(run: "RunBatch", gpu: str, feed: Feed) -> "list[np.ndarray]":
    try:
        return run(feed)
    except UserError:
        raise
    except Exception as error:  # every library has its own
        raise UserError(f"a batch of {batch_of(feed)} fails on the {gpu}: {first_lines(error)}") from error


def _run_torchscript(path: str, names: list[str]) -> "RunBatch | None":
    import torch

    if not torch.cuda.is_available():
        return None
    return _run_torch(torch.jit.load(path, map_location="cuda"), names, "cuda")


def _run_torch(module: "Callable[..., object]", names: list[str], device: str) -> "RunBatch":
    """Return the function that runs what PyTorch has loaded.

    Args:
        names: The names of its inputs, in their order.
        device: Where it is: "cuda" or "cpu".
    """
    import torch

    from build_tasks.formats.serving_interface import forward

    def run(feed: Feed) -> "list[np.ndarray]":
        inputs = [torch.from_numpy(feed[name]).to(device) for name in names]
        return [answer.cpu().numpy() for answer in forward(module, inputs)]

    return run


def _run_onnx(path: str) -> "RunBatch | None":
    import onnxruntime

    from build_tasks.formats import ragged_batches
    from build_tasks.formats.onnx_files import onnx_file

    onnxruntime.preload_dlls()  # CUDA's libraries may be in Python packages
    session = onnxruntime.InferenceSession(onnx_file(path), providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    if session.get_providers()[0] != "CUDAExecutionProvider":  # it has warned why, in the log of the stage
        return None
    return ragged_batches.run_of(session)
