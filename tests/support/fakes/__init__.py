"""A GPU and TensorRT for doit's processes, on a machine that has neither; or neither, on one that has.

TensorRT-RTX takes TensorRT's name: NVIDIA's own compiler behind the same API, which needs no GPU. What a plan answers
cannot be tested this way, since to run it takes CUDA: measure:<model>_trt fails here, and publishes nothing.
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


def machine(
    folder: Path, tensorrt: str | None = TENSORRT, gpus: str | None = GPU, torch: bool = True
) -> dict[str, str]:
    """The environment of a doit that finds this TensorRT and these GPUs.

    folder: where to put what the environment points at.
    gpus: "name, capability; name, capability", "error" for a driver that does not work, None for no driver.
    torch: without it, torch and timm cannot be imported, which saves the seconds that it takes; stages that need them
        fail. Their versions stay known, so that nothing is stale.
    """
    driver = folder / ("a driver" if gpus is not None else "no driver") / "libnvidia-ml.so.1"
    paths = [folder / "no torch", Path(__file__).parent, folder / f"tensorrt {tensorrt}"][torch:]
    if not driver.exists():
        driver.parent.mkdir(parents=True, exist_ok=True)
        if gpus is None:
            driver.touch()  # it hides a real one, and cannot be loaded
        else:
            (library,) = Path(msgspec.__file__).parent.glob("_core.*")
            shutil.copy(library, driver)  # any that can be loaded; pynvml.py does the talking
    if tensorrt is None:
        for distribution in DISTRIBUTIONS:
            if any(importlib.metadata.distributions(name=distribution)):
                pytest.skip("TensorRT is installed here, and cannot be hidden")
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
        "STAND_IN_TENSORRT": tensorrt or "",
        "STAND_IN_GPUS": gpus or "",
    }
