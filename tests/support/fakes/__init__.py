"""A fake GPU and a fake TensorRT for doit's processes, or none of them on a machine that has both.

TensorRT-RTX runs under TensorRT's name: it is NVIDIA's own compiler with the same API, and needs no GPU. To run a plan
needs CUDA, so that the outputs of a plan cannot be tested this way: measure:<model>_trt fails, and nothing of it is
published.
"""

import importlib.metadata
import os
import shutil
from pathlib import Path

import msgspec
import pytest

from build_tasks.runtime.hardware import TENSORRT as DISTRIBUTIONS

TENSORRT = "11.2.1.2"  # of the default release of Triton
GPU = "NVIDIA RTX A4000, 8.6"
CUDA = 13  # of the PyTorch that is tested


def machine(
    folder: Path,
    tensorrt: str | None = TENSORRT,
    gpus: str | None = GPU,
    torch: bool = True,
    cuda: int | None = None,
) -> dict[str, str]:
    """The environment variables with which doit finds this TensorRT and these GPUs.

    Args:
        folder: Where the files are written that the variables point at.
        tensorrt: Version of TensorRT, None for none.
        gpus: "name, capability; name, capability", "error" for a driver that does not work, None for no driver.
        torch: Whether torch and timm can be imported. Without them a run is seconds faster, and the stages that need
            them fail. Their metadata can still be read, so that nothing is stale.
        cuda: The driver's major version of CUDA. Without one PyTorch cannot use the GPUs, and doit knows it; with one
            doit learns it only when PyTorch runs.
    """
    driver = folder / ("driver" if gpus is not None else "no driver") / "libnvidia-ml.so.1"
    paths = [folder / "no torch", Path(__file__).parent, folder / f"tensorrt {tensorrt}"][torch:]
    if not driver.exists():
        driver.parent.mkdir(parents=True, exist_ok=True)
        if gpus is None:
            driver.touch()  # hides a real one, and cannot be loaded
        else:
            (library,) = Path(msgspec.__file__).parent.glob("_core.*")
            shutil.copy(library, driver)  # any library that can be loaded; pynvml.py replaces the calls
    if tensorrt is None:
        for distribution in DISTRIBUTIONS:
            if any(importlib.metadata.distributions(name=distribution)):
                pytest.skip("TensorRT is installed and cannot be hidden")
    else:
        metadata = folder / f"tensorrt {tensorrt}/tensorrt-{tensorrt}.dist-info/METADATA"
        metadata.parent.mkdir(parents=True, exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: tensorrt\nVersion: {tensorrt}\n")
    if not torch:
        (folder / "no torch").mkdir(parents=True, exist_ok=True)
        for module in ("torch", "timm"):
            (folder / f"no torch/{module}.py").write_text(f"raise ModuleNotFoundError('hidden', name='{module}')\n")
    return {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "LD_LIBRARY_PATH": str(driver.parent),
        "FAKE_TENSORRT": tensorrt or "",
        "FAKE_GPUS": gpus or "",
        "FAKE_CUDA": str(cuda or ""),
    }
