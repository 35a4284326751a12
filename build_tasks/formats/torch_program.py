"""Networks that come as a file of their own: TorchScript, and torch.export. There is no Python code of the network.

    model.pt, model.pt2 ─► check_program ─► load_program ─► a network like any other, which is its own reference

Such a file is a program: loading and running it executes what it contains, as for a network in Python.
"""

from typing import TYPE_CHECKING

from build_tasks.errors import UserError, first_lines
from build_tasks.formats.file_kinds import AOTI_PACKAGE, EXPORTED, TORCHSCRIPT, program_kind, reject_placeholder
from build_tasks.runtime.limits import check_archive

if TYPE_CHECKING:
    import torch


def check_program(path: str) -> str:
    """Return the path of a file with a network.

    Raises:
        UserError: If the file holds no network that can be loaded.
    """
    reject_placeholder(path)
    check_archive(path)
    kind = program_kind(path)
    if kind == AOTI_PACKAGE:
        raise UserError(
            f"{path} is {kind}, which is compiled for one machine: save the network with torch.export.save instead"
        )
    if kind is None:
        raise UserError(
            f"{path} contains no network: expected TorchScript or torch.export, found another file; if it is a "
            "checkpoint, set architecture.timm or architecture.network"
        )
    return path


def load_program(path: str) -> "torch.nn.Module":
    """Return the network of a file in inference mode, on the CPU.

    Raises:
        UserError: If torch cannot load the file.
    """
    import torch

    class Program(torch.nn.Module):
        """The network of the file."""

        def __init__(self, program: torch.nn.Module):
            super().__init__()
            self.program = program

        def forward(self, batch: "torch.Tensor") -> object:
            try:
                return self.program(batch)
            except AssertionError as error:  # torch.export: the shape is not one that was exported
                raise UserError(f"the network refuses {list(batch.shape)}: {first_lines(error)}") from error

    load = {TORCHSCRIPT: _load_torchscript, EXPORTED: _load_exported}[program_kind(path) or TORCHSCRIPT]
    try:
        program = Program(load(path))
    except Exception as error:  # of torch, which has no common base class for a file that it cannot load
        raise UserError(f"{path} cannot be loaded by torch {torch.__version__}: {first_lines(error)}") from error
    for module in program.modules():
        module.training = False  # eval() is refused by networks of torch.export
    return program.requires_grad_(False)


def _load_torchscript(path: str) -> "torch.nn.Module":
    import torch

    module: torch.nn.Module = torch.jit.load(path, map_location="cpu")
    return module


def _load_exported(path: str) -> "torch.nn.Module":
    import torch

    return torch.export.load(path).module()
