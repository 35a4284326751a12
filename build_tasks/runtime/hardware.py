"""The hardware and software of this machine for TensorRT: the package, the driver, the GPU.

Every call of doit needs these facts, also if there is nothing to do. Nothing here imports TensorRT therefore, and a
machine without NVIDIA's driver is recognized by a single dlopen that fails.
"""

import functools
import os
import types
from typing import Any, NamedTuple

from build_tasks.paths import BUILD
from build_tasks.runtime.distributions import installed_version

GPU_LOCK = f"{BUILD}/.gpu"  # a folder; an engine build and a benchmark hold its lock while they time something

OLDEST_TENSORRT = 10  # the first with strongly typed networks from ONNX in every precision

# Distributions that contain the package: the first name is used by NVIDIA's index and containers, the others are for
# one version of CUDA each.
TENSORRT = ("tensorrt", "tensorrt_cu13", "tensorrt_cu12")
TENSORRT_RTX = ("tensorrt_rtx_cu13", "tensorrt_rtx_cu12", "tensorrt_rtx")


class Gpu(NamedTuple):
    name: str  # "NVIDIA RTX A4000"
    compute_capability: str  # "8.6"


def version(distributions: tuple[str, ...]) -> str | None:
    """The version of the first of these distributions that is installed, None if none is."""
    return next(filter(None, map(installed_version, distributions)), None)


@functools.cache
def gpu() -> Gpu | str:
    """The GPU that CUDA would use, or a text that names the missing requirement."""
    import ctypes

    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "an NVIDIA GPU (there is no driver)"
    try:
        import pynvml as nvml
    except ModuleNotFoundError:
        return "the package nvidia-ml-py (pip install -r requirements-engine.txt)"
    try:
        nvml.nvmlInit()
        if (device := _device(nvml)) is None:
            return "an NVIDIA GPU (the driver shows none)"
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(device)
        return Gpu(str(nvml.nvmlDeviceGetName(device)), f"{major}.{minor}")
    except nvml.NVMLError as error:
        return f"an NVIDIA GPU (the driver says: {error})"


def _device(nvml: types.ModuleType) -> Any:
    """NVML's handle of CUDA's first device, None if there is no device.

    CUDA_VISIBLE_DEVICES holds indices, or the first characters of UUIDs.

    Source: the CUDA programming guide, "CUDA Environment Variables".
    """
    devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    if first.isdecimal():
        return devices[int(first)] if int(first) < len(devices) else None
    if first.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    if first.startswith("GPU-"):
        return next((device for device in devices if str(nvml.nvmlDeviceGetUUID(device)).startswith(first)), None)
    return None


def driver() -> str | None:
    """The version of the GPU's driver, None if there is none. Call it after `gpu`, which opens NVML."""
    try:
        import pynvml as nvml

        return str(nvml.nvmlSystemGetDriverVersion())
    except (ModuleNotFoundError, OSError):
        return None
    except nvml.NVMLError:
        return None


@functools.cache
def driver_cuda() -> int:
    """The newest major version of CUDA that the GPU's driver runs, 0 if its library libcuda.so.1 cannot be loaded.

    A container that may only monitor the GPU has NVML without that library. Call it after `gpu`, which opens NVML.

    Source: NVML's reference, nvmlSystemGetCudaDriverVersion_v2 (the version is 1000 * major + 10 * minor).
    """
    import pynvml as nvml

    try:
        return int(nvml.nvmlSystemGetCudaDriverVersion_v2()) // 1000
    except nvml.NVMLError:
        return 0


def missing_requirements(capability: str | None = None) -> str | None:
    """The missing requirements to build and run a plan, with a way to get them; None if nothing is missing.

    Args:
        capability: The compute capability that the plan is for; None for the capability of this machine's GPU.
    """
    missing = []
    installed = version(TENSORRT)
    if installed is None:
        missing.append(f"TensorRT {OLDEST_TENSORRT} or newer (the package tensorrt)")
    elif int(installed.partition(".")[0]) < OLDEST_TENSORRT:
        missing.append(f"TensorRT {OLDEST_TENSORRT} or newer (here it is {installed})")
    device = gpu()
    if isinstance(device, str):
        missing.append(device)
    elif capability not in (None, device.compute_capability):
        return f"a GPU of compute capability {capability} ({device.name} has {device.compute_capability})"
    if not missing:
        return None
    return f"{' and '.join(missing)}; `doit container` builds it wherever Docker sees an NVIDIA GPU"


def host_fingerprint() -> dict[str, str]:
    """The facts about this machine that a plan depends on. Call it only if no requirement for plans is missing."""
    device = gpu()
    assert isinstance(device, Gpu), device
    return {"TensorRT": version(TENSORRT) or "", "GPU": device.name, "compute capability": device.compute_capability}


def missing_requirements_rtx() -> str | None:
    """The missing requirements to compile with TensorRT-RTX (it needs no GPU); None if nothing is missing."""
    if version(TENSORRT_RTX) is None:
        return "TensorRT-RTX (pip install -r requirements-rtx.txt)"
    return None


def host_fingerprint_rtx() -> dict[str, str]:
    """The facts of this machine that an engine of TensorRT-RTX depends on."""
    return {"TensorRT-RTX": version(TENSORRT_RTX) or ""}
