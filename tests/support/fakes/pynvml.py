"""A fake NVML. FAKE_GPUS names its GPUs: "name, major.minor; name, major.minor".

FAKE_CUDA is the driver's major version of CUDA, or empty if the driver has no library for CUDA.
"""

import os
from typing import NamedTuple


class Device(NamedTuple):
    name: str
    capability: str


class NVMLError(Exception):
    pass


def _devices() -> list[Device]:
    gpus = os.environ["FAKE_GPUS"]
    return [Device(*map(str.strip, device.split(","))) for device in gpus.split(";") if device]


def nvmlInit() -> None:  # noqa: N802
    if os.environ["FAKE_GPUS"] == "error":
        raise NVMLError("Driver/library version mismatch")


def nvmlSystemGetDriverVersion() -> str:  # noqa: N802
    return "580.65.06"


def nvmlSystemGetCudaDriverVersion_v2() -> int:  # noqa: N802
    if not os.environ["FAKE_CUDA"]:
        raise NVMLError("Library Not Found")
    return 1000 * int(os.environ["FAKE_CUDA"])


def nvmlDeviceGetCount() -> int:  # noqa: N802
    return len(_devices())


def nvmlDeviceGetHandleByIndex(index: int) -> Device:  # noqa: N802
    return _devices()[index]


def nvmlDeviceGetUUID(device: Device) -> str:  # noqa: N802
    return f"GPU-{_devices().index(device)}a5a"


def nvmlDeviceGetName(device: Device) -> str:  # noqa: N802
    return device.name


def nvmlDeviceGetCudaComputeCapability(device: Device) -> tuple[int, int]:  # noqa: N802
    major, minor = device.capability.split(".")
    return int(major), int(minor)
