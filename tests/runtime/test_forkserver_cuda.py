"""CUDA works in no child of a process that has started it. The fork server must not, whatever libraries it imports."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from build_tasks.runtime.worker import CONVERSIONS, HEAVY_LIBRARIES, STAGE_MODULES, heavy_libraries
from tests.support.project import ROOT

# The driver's library, as far as CUDA's runtime asks it when it starts, and cupy, which starts it as the real one does.
# It leaves a file when a process starts CUDA.
DRIVER = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) {
    fclose(fopen(getenv("CUDA_STARTED"), "w"));
    return 100;  /* CUDA_ERROR_NO_DEVICE */
}
int cuDriverGetVersion(int *version) {
    *version = 13020;
    return 0;
}
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long flags, void *status) {
    *function = !strcmp(name, "cuInit") ? (void *)cuInit
        : !strcmp(name, "cuDriverGetVersion") ? (void *)cuDriverGetVersion
        : !strncmp(name, "cuGetProcAddress", 16) ? (void *)cuGetProcAddress_v2 : NULL;
    return *function ? 0 : 500;  /* CUDA_ERROR_NOT_FOUND */
}
"""
CUPY = "import ctypes\nctypes.CDLL('libcuda.so.1').cuInit(0)\n"
FIRST, LAST = "build_tasks.runtime.forkserver_first", "build_tasks.runtime.forkserver_last"


@pytest.fixture
def cuda_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a process leaves when it starts CUDA."""
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"], check=True)
    (tmp_path / "cupy.py").write_text(CUPY)
    monkeypatch.setenv("CUDA_STARTED", str(tmp_path / "started"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return tmp_path / "started"


def import_modules(names: Iterable[str], then: str = "") -> None:
    """Import modules in a new process, in their order, and run some code there."""
    source = f"import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n{then}"
    subprocess.run([sys.executable, "-c", source, *names], check=True)


def test_the_fork_server_does_not_start_cuda(cuda_started: Path) -> None:
    import_modules([FIRST, *heavy_libraries(HEAVY_LIBRARIES), *STAGE_MODULES, LAST])
    assert not cuda_started.exists()


def test_a_library_that_it_imports_would_start_cuda(cuda_started: Path) -> None:
    import_modules(CONVERSIONS)
    assert cuda_started.exists()


@pytest.mark.parametrize("use", ["import cupy", "import torch; torch.cuda.is_available()"])
def test_a_child_can_start_cuda(cuda_started: Path, use: str) -> None:
    import_modules([FIRST, "torch", LAST], then=use)
    assert cuda_started.exists()
