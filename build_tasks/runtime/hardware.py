"""The hardware and software of this machine that artifacts depend on: TensorRT, the driver, the GPU, the CPU.

Every call of doit needs these facts, also if there is nothing to do. Nothing here imports TensorRT or PyTorch
therefore, and a machine without NVIDIA's driver is recognized by a single dlopen that fails.
"""

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import types
from typing import Any, NamedTuple

from build_tasks.paths import BUILD
from build_tasks.runtime.distributions import installed_version

NO_COMPILER = "a C++ compiler, g++ (or set CXX)"  # a missing requirement
GPU_LOCK = f"{BUILD}/.gpu"  # a folder; an engine build and a benchmark hold its lock while they time something

OLDEST_TENSORRT = 10  # the first with strongly typed networks from ONNX in every precision

# Distributions that contain the package: the first name is used by NVIDIA's index and containers, the others are for
# one version of CUDA each.
TENSORRT = ("tensorrt", "tensorrt_cu13", "tensorrt_cu12")
TENSORRT_RTX = ("tensorrt_rtx_cu13", "tensorrt_rtx_cu12", "tensorrt_rtx")

# The file in which a distribution states the version of CUDA that it was built for.
CUDA_VERSION = {"torch": "torch/version.py", "onnxruntime-gpu": "onnxruntime/capi/build_and_package_info.py"}

# Levels of x86-64, each with the last of its flags in /proc/cpuinfo, and the extensions for which TorchInductor and the
# C++ compiler generate other code. Sources: the psABI of x86-64, "Micro-architecture levels"; torch/_inductor/
# cpu_vec_isa.py.
X86_LEVELS = {"x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}, "x86-64-v3": {"avx2", "fma"}}
X86_EXTENSIONS = ("amx_bf16", "amx_fp16", "amx_int8", "amx_tile", "avx512_bf16", "avx512_vnni")
CPUINFO_BYTES = 1 << 14  # enough for the first of its processors


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


def usable_gpu(distribution: str) -> Gpu | str:
    """The GPU of this machine if a distribution can use it, or a text that names the missing requirement.

    The distribution must be built for a version of CUDA that the driver runs. A driver runs all minor versions of its
    newest major version, and all older versions.

    Args:
        distribution: A key of CUDA_VERSION.
    Source: NVIDIA, CUDA Compatibility.
    """
    device = gpu()
    if isinstance(device, str):
        return device
    cuda = _built_for_cuda(distribution)
    if cuda is None or cuda > driver_cuda():
        return f"a build of {distribution} for a version of CUDA that the driver runs"
    return device


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


@functools.cache
def instruction_set() -> str:
    """The instructions of this machine's CPU that compiled code may use, "x86-64-v4 avx512_bf16 avx512_vnni".

    On other architectures than x86-64 these are all features that Linux names. Without /proc/cpuinfo it is the
    architecture alone.
    """
    machine = platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"^(?:flags|Features)\s*: (.*)$", file.read(CPUINFO_BYTES), re.MULTILINE)
    except OSError:
        found = None
    flags = found[1].split() if found else []
    if machine != "x86_64":
        return " ".join([machine, *sorted(flags)])
    level = next((name for name, needed in X86_LEVELS.items() if needed <= {*flags}), "x86-64")
    return " ".join([level, *(flag for flag in X86_EXTENSIONS if flag in flags)])


def compiler_command() -> list[str]:
    """The C++ compiler that TorchInductor calls: CXX, which may hold several words, or g++."""
    if not (words := os.environ.get("CXX")):
        return ["g++"]
    import shlex

    return shlex.split(words) or ["g++"]


def compiler() -> str | None:
    """The path of the C++ compiler, None if there is none."""
    return shutil.which(compiler_command()[0])


@functools.cache
def compiler_version() -> str:
    """The name and the version of the C++ compiler. Call it only if there is one."""
    import subprocess

    command = [*compiler_command(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0].strip()


def signature() -> str:
    """The facts about this machine that an artifact may depend on, as one text that is made in microseconds."""
    path = compiler()
    status = os.stat(path) if path else None
    return f"{gpu()}, {instruction_set()}, {path} {status and (status.st_size, status.st_mtime_ns)}"


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


def missing_for_package(device: str, capability: str | None = None) -> str | None:
    """The missing requirements to run a package of AOTInductor; None if nothing is missing.

    Args:
        device: "gpu" or "cpu".
        capability: The compute capability that the package is for; None for the capability of this machine's GPU.
    """
    if device == "cpu":
        return None
    found = usable_gpu("torch")
    if isinstance(found, str):
        return found
    if capability not in (None, found.compute_capability):
        return f"a GPU of compute capability {capability} ({found.name} has {found.compute_capability})"
    return None


def package_fingerprint(device: str) -> dict[str, str]:
    """The facts about this machine that a package of AOTInductor depends on, besides its compiler.

    Call it only if no requirement for the package is missing.
    """
    if device == "cpu":
        return {"instruction set": instruction_set()}
    found = usable_gpu("torch")
    assert isinstance(found, Gpu), found
    return {"GPU": found.name, "compute capability": found.compute_capability}


def missing_requirements_rtx() -> str | None:
    """The missing requirements to compile with TensorRT-RTX (it needs no GPU); None if nothing is missing."""
    if version(TENSORRT_RTX) is None:
        return "TensorRT-RTX (pip install -r requirements-rtx.txt)"
    return None


def host_fingerprint_rtx() -> dict[str, str]:
    """The facts of this machine that an engine of TensorRT-RTX depends on."""
    return {"TensorRT-RTX": version(TENSORRT_RTX) or ""}
