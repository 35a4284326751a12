"""Triton's server core from PyPI: how it is fetched, and which backends it has.

    requirements-tritonserver.txt ─► doit tritonserver ─► build/.tritonserver/package    the server, libraries, NumPy
                                                                              python     a Python that sees only those
                                                                              installed  what was fetched, for doit

The core serves `doit check` and `doit serve` on a machine that has neither a tritonserver nor Docker. It has the Python
backend and no other. stub_backends/ holds stubs for the backends of ONNX and TorchScript models: they run the same
libraries on the CPU, in the Python backend.
"""

import contextlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from typing import Any

from build_tasks.paths import BUILD
from build_tasks.runtime import atomic_files, temporary_folder
from build_tasks.triton.platforms import FORMATS
from build_tasks.triton.release_table import FIELDS_SINCE

CORE = f"{BUILD}/.tritonserver"
REQUIREMENTS = "requirements-tritonserver.txt"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"  # of this Python
PYTHONS = ("3.11", "3.12")  # of which the core has the stubs of its Python backend, and wheels of its NumPy
RELEASE = "24.10"  # Triton's release of the core that REQUIREMENTS name
HOME = f"{CORE}/package/pytriton/tritonserver"
STUBS = "build_tasks/serving/stub_backends"
STUB_MODULE = "request_batches.py"  # of all stubs


def task() -> dict[str, Any]:
    """doit's task `tritonserver`."""
    return {
        "actions": [fetch],
        "uptodate": [lambda: _read_text(f"{CORE}/installed") == _version_record()],
        "io": {"capture": False},
        "doc": f"On demand: fetch Triton's server core from PyPI -> {CORE}, for check and serve",
    }


def fetch() -> Any:
    """doit's action: install the core and its NumPy into a folder, with a Python that sees nothing else."""
    from doit.exceptions import TaskFailed

    if reason := unsupported_reason():
        return TaskFailed(reason)
    with atomic_files.scratch_dir() as folder:
        draft = f"{folder}/tritonserver"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--target", f"{draft}/package", "-r", REQUIREMENTS]
        print(f"+ {shlex.join(command)}", flush=True)
        if code := subprocess.run(command, check=False).returncode:
            return TaskFailed(f"pip ended with exit code {code}")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", f"{draft}/python"], check=True)
        site = f"{draft}/python/lib/python{VERSION}/site-packages"
        with open(f"{site}/package.pth", "w", encoding="utf-8") as file:
            file.write(f"{os.path.abspath(CORE)}/package\n")
            file.write("import sys; sys.dont_write_bytecode = True\n")  # the backend's Python reads no environment
        with open(f"{draft}/installed", "w", encoding="utf-8") as file:
            file.write(_version_record())
        atomic_files.replace(draft, CORE)
    return None


def unsupported_reason() -> str | None:
    """Return why the core cannot run on this machine, None if it can. Its wheels decide: see REQUIREMENTS."""
    if VERSION not in PYTHONS or sys.platform != "linux" or platform.machine() != "x86_64":
        return (
            f"the server core from PyPI runs on Linux on x86-64 with Python {' or '.join(PYTHONS)}, and this is Python "
            f"{VERSION} on {sys.platform} on {platform.machine()}: use an environment with one of these, or Docker"
        )
    import ctypes.util

    if os.path.exists(python_library()) or ctypes.util.find_library(f"python{VERSION}"):
        return None
    return (
        f"the server core needs {os.path.basename(python_library())}, and this Python has none: install it (in Debian "
        f"the package libpython{VERSION}), or use a Python that was built with --enable-shared"
    )


def python_library() -> str:
    """The path at which this installation of Python has its shared library, if it has one.

    NVIDIA's process for Python models is linked to it. The loader does not find it in an installation of pyenv or uv.
    """
    folders = (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib")  # a Python that was moved has the second
    paths = [f"{folder}/libpython{VERSION}.so.1.0" for folder in folders]
    return next((path for path in paths if os.path.exists(path)), paths[0])


def installed() -> bool:
    """Whether `doit tritonserver` has fetched the core."""
    return os.path.isdir(CORE)


def executable() -> str:
    """The absolute path of the core's tritonserver."""
    return os.path.abspath(f"{HOME}/bin/tritonserver")


def environment(backends: str | None = None) -> dict[str, str]:
    """The variables that the core needs: its libraries, its Python, and the packages that the stubs import.

    Args:
        backends: The folder of `backend_directory`.
    """
    libraries = [os.path.abspath(f"{CORE}/package/nvidia_pytriton.libs"), *([f"{backends}/python"] if backends else [])]
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PATH": f"{os.path.abspath(CORE)}/python/bin{os.pathsep}{os.environ['PATH']}",
        "TRITON_PYTHON_BACKENDS_PATH": os.pathsep.join(path for path in sys.path if path.endswith("-packages")),
    }


@contextlib.contextmanager
def backend_directory(stubs: bool) -> Iterator[str]:
    """A temporary folder with the core's Python backend, and with the stub backends if `stubs` is set."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="backends-", dir=temporary_folder.folder()) as folder:
        shutil.copytree(f"{HOME}/backends/python", f"{folder}/python")
        # NVIDIA calls the process that runs a Python model a stub, too: one for each version of Python.
        shutil.copy(f"{HOME}/python_backend_stubs/{VERSION}/triton_python_backend_stub", f"{folder}/python")
        if os.path.exists(library := python_library()):
            os.symlink(library, f"{folder}/python/{os.path.basename(library)}")
        for name in os.listdir(STUBS) if stubs else ():
            if os.path.exists(f"{STUBS}/{name}/model.py"):
                os.makedirs(f"{folder}/{name}")
                for file in (f"{name}/model.py", STUB_MODULE):
                    shutil.copy(f"{STUBS}/{file}", f"{folder}/{name}")
        try:
            yield os.path.abspath(folder)
        finally:
            end_processes(f"{folder}/python/triton_python_backend_stub")


def end_processes(program: str) -> None:
    """Kill the processes that run a program: those of Python models stay if their server was killed or has crashed."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # of another user, or ended meanwhile
            if os.path.samefile(f"/proc/{pid}/exe", program):
                os.kill(int(pid), signal.SIGKILL)


def config_without_newer_fields(path: str) -> str | None:
    """Return a config.pbtxt as JSON, without the fields that the core's release does not have. None if it has none.

    The core would refuse the whole file. The fields that are newer concern neither tensors nor artifacts. A platform
    that is newer becomes the older one of the same backend; the stub knows a package by the name of its file.
    """
    text = _read_text(path)
    newer_words = [*(name.rpartition(".")[2] for name in FIELDS_SINCE), FORMATS["aoti"].platform]
    if text is None or not any(word in text for word in newer_words):
        return None
    from google.protobuf import json_format, text_format

    from build_tasks.triton import model_config, newer_fields

    config = model_config.protobuf().ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError:  # the server says what is wrong
        return None
    is_package = config.platform == FORMATS["aoti"].platform
    if is_package:
        config.platform = FORMATS["torchscript"].platform
    if not newer_fields.remove(config, RELEASE) and not is_package:
        return None
    return str(json_format.MessageToJson(config, preserving_proto_field_name=True))


def pillow_requirements() -> list[str]:
    """The version of Pillow that the Python models of ensembles decode images with, as an argument of pip."""
    return re.findall(r"^pillow==\S+", _read_text(REQUIREMENTS) or "", re.MULTILINE)


def _version_record() -> str:
    """The content of the file `installed`: the version of Python, and the requirements."""
    return f"{sys.version_info[:2]}\n{_read_text(REQUIREMENTS)}"


def _read_text(path: str) -> str | None:
    """The content of a file, None if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return None
