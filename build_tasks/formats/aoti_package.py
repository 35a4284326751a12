"""Packages of AOTInductor: a program of torch.export, compiled for one kind of machine.

    program ─► its device ─► AOTInductor, C++ compiler ─► files ─► without paths of this machine ─► model.pt2

A package for a CPU has the same bytes for the same inputs, the same instruction set and the same compiler. Three things
would change them otherwise: `-march=native`, the number of threads, and paths in sources and in messages of errors. A
package for a GPU differs from build to build, because TorchInductor measures which kernel is the fastest.
"""

import contextlib
import ctypes
import logging
import os
import re
import shlex
import tempfile
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, first_lines

if TYPE_CHECKING:
    import torch

# TorchInductor selects kernels by the batch of the example. On an H200, examples of 32 in place of 2 made them up to
# 1.15 times as fast at batch 128 (docs/performance.md).
EXAMPLE_BATCH = {"gpu": 32, "cpu": 2}
THREADS = 8  # for which loops are divided; the code itself takes as many threads as the process has
COMMAND = re.compile(rb"^//.*/.*\n?", re.MULTILINE)  # a comment with a path: the command that compiled the file
BITS = {"x86-64-v4": 512, "x86-64-v3": 256}  # of a vector, by the level of x86-64


def example_batch(device: str, largest: int) -> int:
    """The batch of the example with which a program is exported for a device, "gpu" or "cpu".

    It is at least 2, because torch.export fixes a dimension of size one.

    Args:
        largest: The largest batch of the package.
    """
    return min(EXAMPLE_BATCH[device], max(2, largest))


def compile_package(
    program: "torch.export.ExportedProgram", path: str, device: str, instruction_set: str, compiler: list[str]
) -> None:
    """Compile a program and write its package.

    Args:
        program: On the CPU.
        path: The package. Its name ends with ".pt2".
        device: "gpu" or "cpu".
        instruction_set: As of `hardware.instruction_set`.
        compiler: The command of the C++ compiler.
    Raises:
        UserError: If AOTInductor or the compiler fails.
    """
    import torch
    from torch._inductor import config
    from torch._inductor.package import package_aoti
    from torch.export.passes import move_to_device_pass

    if device == "gpu":
        program = move_to_device_pass(program, "cuda:0")  # the index, too: PyTorch compares it with that of constants
    arguments, _ = program.example_inputs or ((), {})
    with tempfile.TemporaryDirectory(prefix="aoti-") as folder:
        if re.search(r"\s", folder):  # TorchInductor does not quote it in the command of the compiler
            raise UserError(f"TMPDIR: expected a path without spaces, which AOTInductor cannot use, found {folder!r}")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"  # a stage has a process of its own
        names = {f"{folder}/package": ".", os.path.dirname(torch.__file__): "torch"}  # of files, in messages of errors
        options = {
            "aot_inductor.package": True,
            "aot_inductor.output_path": f"{folder}/package",
            "aot_inductor.model_name_for_generated_files": "model",
            "aot_inductor.enable_line_tables": False,
            "aot_inductor.precompile_headers": False,  # for several compilations with one cache
            "cpp.cxx": (shlex.join([*compiler, *(f"-ffile-prefix-map={old}={new}" for old, new in names.items())]),),
            "cpp.dynamic_threads": True,
            "cpp.threads": THREADS,
            **_target_options(instruction_set),
        }
        os.makedirs(f"{folder}/package")
        try:
            with torch.no_grad(), config.patch(options):
                files: Any = torch._inductor.aot_compile(
                    program.module(check_guards=False), tuple(arguments), options=dict(options)
                )
        except Exception as error:  # of Dynamo, Inductor, Triton and the compiler, which have no common base class
            raise UserError(f"AOTInductor cannot compile the network: {first_lines(error)}") from error
        for file in files:
            if file.endswith(".cpp"):
                _remove_commands(file)
        package_aoti(path, sorted(files))


def _target_options(instruction_set: str) -> dict[str, Any]:
    """The options that select the instructions of the CPU. On other CPUs than x86-64 TorchInductor selects them."""
    level = instruction_set.partition(" ")[0]
    if not level.startswith("x86-64"):
        return {}
    # With vec_isa_ok, TorchInductor does not compile a program for each instruction set to see which of them works.
    return {"cpp.march": level, "cpp.simdlen": BITS.get(level, 1), "cpp.vec_isa_ok": level in BITS}


def _remove_commands(path: str) -> None:
    """Remove the comments with paths from a source file. The package holds the sources beside the compiled file."""
    with open(path, "rb") as file:
        source = file.read()
    with open(path, "wb") as file:
        file.write(COMMAND.sub(b"", source))


def load_package(path: str) -> Any:
    """Load a package, on the device that it is for. The result takes and returns tensors on that device.

    PyTorch's loader would compile several programs to find the instruction set of the CPU, and only to compare it with
    the one in the package. In a process without TorchInductor's cache that takes a minute and more, also for a package
    that runs on a GPU. Triton's backend does not do it. Source: pytorch#191715.
    """
    import torch
    from torch._inductor import config

    # Otherwise a package may find half of the C++ library inside PyTorch's libraries. On Ubuntu 24.04 with PyTorch 2.11
    # each one for a GPU then ended the process with SIGSEGV.
    with contextlib.suppress(OSError):
        ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)
    # It would warn that the instruction set, which it was not allowed to find, is another one than that of the package.
    logging.getLogger("torch.export.pt2_archive._package").setLevel(logging.ERROR)
    with config.patch({"cpp.vec_isa_ok": False}):
        return torch._inductor.aoti_load_package(path)
