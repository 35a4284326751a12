"""What this machine has for TensorRT: the package, the driver, the GPU.

Asked at every doit, also where nothing is to be done, so nothing here imports TensorRT; a machine without NVIDIA's
driver is told from one with it by a single failing dlopen.
"""

import functools
import os
import types
from typing import Any, NamedTuple

from build_tasks.paths import BUILD
from build_tasks.runtime.distributions import installed_version

GPU_LOCK = f"{BUILD}/.gpu"  # a folder; an engine build and a benchmark hold its lock while they time something

OLDEST_TENSORRT = 10  # the first with strongly typed networks from ONNX in every precision

# The package has one name from NVIDIA's index and in its containers, and others for a CUDA of one's choice.
TENSORRT = ("tensorrt", "tensorrt_cu13", "tensorrt_cu12")
TENSORRT_RTX = ("tensorrt_rtx_cu13", "tensorrt_rtx_cu12", "tensorrt_rtx")


class Gpu(NamedTuple):
    name: str
    compute_capability: str  # "8.6"


def version(distributions: tuple[str, ...]) -> str | None:
    """The version of the first of these distributions that is installed."""
    return next(filter(None, map(installed_version, distributions)), None)


@functools.cache
def gpu() -> Gpu | str:
    """The GPU that CUDA would use, or what this machine lacks for one."""
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
    """NVML's handle of CUDA's first device, None where there is none.

    Source: the CUDA programming guide, "CUDA Environment Variables": CUDA_VISIBLE_DEVICES holds indices, or the
    beginnings of UUIDs.
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


def missing_requirements(capability: str | None = None) -> str | None:
    """What this machine lacks to build and run a plan, and what helps; None if nothing.

    capability: the compute capability that the plan is for, where it is for one.
    """
    lacks = []
    found = version(TENSORRT)
    if found is None:
        lacks.append(f"TensorRT {OLDEST_TENSORRT} or newer (the package tensorrt)")
    elif int(found.partition(".")[0]) < OLDEST_TENSORRT:
        lacks.append(f"TensorRT {OLDEST_TENSORRT} or newer (here it is {found})")
    here = gpu()
    if isinstance(here, str):
        lacks.append(here)
    elif capability not in (None, here.compute_capability):
        return f"a GPU of compute capability {capability} ({here.name} has {here.compute_capability})"
    if not lacks:
        return None
    return f"{' and '.join(lacks)}; `doit container` builds it wherever Docker sees an NVIDIA GPU"


def host_fingerprint() -> dict[str, str]:
    """What a plan depends on besides its inputs, where this machine has it."""
    here = gpu()
    assert isinstance(here, Gpu), here
    return {"TensorRT": version(TENSORRT) or "", "GPU": here.name, "compute capability": here.compute_capability}


def missing_requirements_rtx() -> str | None:
    """What this machine lacks to compile with TensorRT-RTX, which needs no GPU; None if nothing."""
    if version(TENSORRT_RTX) is None:
        return "TensorRT-RTX (pip install -r requirements-rtx.txt)"
    return None


def host_fingerprint_rtx() -> dict[str, str]:
    return {"TensorRT-RTX": version(TENSORRT_RTX) or ""}
