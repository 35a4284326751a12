"""Checkpoints: files with weights, read without executing any code in them.

.safetensors, .safetensors.index.json (shards), .npz, and what torch.save writes ─► a dict, perhaps with dicts in it
                                                                                        └─► state_dicts.py
"""

import json
import os
import pathlib
import pickle
import re
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, first_lines, kind_and_reason
from build_tasks.formats.file_kinds import (
    is_other_pickle,
    program_kind,
    reject_long_names,
    reject_other_archives,
    reject_other_kinds,
    reject_other_suffix,
)
from build_tasks.runtime.limits import check_archive
from build_tasks.spec.model_files import INDEX, shards

if TYPE_CHECKING:
    import torch

Checkpoint = dict[str, Any]
# The dicts that timm's load_state_dict prefers, in its order. The first two are moving averages of the weights.
TIMM_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
PATHLIB = ("pathlib", "pathlib._local")  # where paths are defined, until Python 3.12 and in 3.13
# Classes of plain data that training programs save beside the weights, by module. Their objects are not created: a list
# of range(10**12) and an int of Decimal("1e999999999") would take all memory.
BESIDE = {
    "builtins": ("range", "slice", "frozenset", "bool", "int", "float", "str", "bytes", "tuple", "list", "dict"),
    "collections": ("deque",),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    **dict.fromkeys(
        PATHLIB,
        ("Path", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    ),
    "torch.torch_version": ("TorchVersion",),
    "types": ("SimpleNamespace",),
    "uuid": ("UUID",),
}


def read_checkpoint(path: str) -> Checkpoint:
    """Return the content of a file with weights: a dict of tensors, or a dict that contains such dicts.

    Raises:
        UserError: If the file cannot be read, or holds more than data.
    """
    reject_other_kinds(path, expected="an index of shards" if path.endswith(INDEX) else "weights")
    check_archive(path)
    if kind := program_kind(path):
        raise UserError(
            f"{path} is {kind}, which contains the network too, and not weights alone: leave [architecture] out of the "
            "spec, or save the state_dict() of the network"
        )
    reject_other_archives(path)
    reject_other_suffix(path)
    try:
        content = _read(path)
    except UserError:
        raise
    except Exception as error:  # torch, safetensors and NumPy raise many classes for a file that they cannot read
        raise UserError(_reason(path, error)) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a dict of tensors, found {type(content).__name__}; save the state_dict()")
    return content


def _read(path: str) -> Any:
    if path.endswith(INDEX):
        return _read_shards(path)
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    if path.endswith(".npz"):
        import numpy as np

        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if others := [name for name, array in arrays.items() if array.dtype.kind == "V"]:
            raise UserError(
                f"{path}: expected arrays of numbers, found {others[0]} of the type {arrays[others[0]].dtype}; NumPy "
                "cannot save bfloat16 of JAX: convert it with astype('float32') before numpy.savez"
            )
        return as_tensors(arrays)
    import torch

    reject_long_names(path)
    with torch.serialization.safe_globals(_plain_classes()):
        return torch.load(path, map_location="cpu", weights_only=True)


def as_tensors(content: Checkpoint) -> "dict[str, torch.Tensor]":
    """Return the arrays of numbers of a dict as tensors."""
    import numpy as np
    import torch

    arrays = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, np.ndarray)}
    return {
        key: torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        for key, array in arrays.items()
        if array.dtype.kind in "biufc"
    }


def _read_shards(path: str) -> Any:
    """Return the tensors of all shards of an index."""
    with open(path, encoding="utf-8") as file:
        index = json.load(file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{path}: expected an index of shards, a table `weight_map` of tensors and their files")
    files = {name: f"{os.path.dirname(path)}/{name}" for name in sorted({*weight_map.values()})}
    if missing := [name for name, file in files.items() if name not in shards(path) or not os.path.isfile(file)]:
        raise UserError(f"{path} lists {missing[0]!r}, which is not beside it: put all its shards into this folder")
    if indexes := [name for name in files if name.endswith(INDEX)]:
        raise UserError(f"{path} lists {indexes[0]!r}, which is an index and no shard")
    tensors = {}
    for shard in files.values():
        tensors.update(read_checkpoint(shard))
    return tensors


def unusable_reason(state: Checkpoint, expected: Checkpoint) -> str | None:
    """Return why the values of a state dict cannot be those of the network, whatever its keys are. None if they can.

    Args:
        state: Tensors by key, without the prefixes of wrappers.
        expected: The state dict of the network.
    """
    if any(re.search(r"\.lora_(A|B|up|down)\b", key) for key in state):
        return (
            "it has adapters of LoRA, which only change the weights of another checkpoint: merge them into it (peft: "
            "merge_and_unload), and save the state_dict()"
        )
    for key in [key for key in expected if key in state]:
        kind, tensor = str(state[key].dtype).removeprefix("torch."), state[key]
        is_integer = not (tensor.is_floating_point() or tensor.is_complex())
        if tensor.is_quantized or (is_integer and expected[key].is_floating_point() and tensor.ndim > 1):
            return f"{key} is quantized ({kind}): save the weights in fp32, as they were before"
        if tensor.is_complex() and not expected[key].is_complex():
            return f"{key} has complex numbers ({kind}), and the network's are real"
        if tensor.is_meta:
            return f"{key} has no values, since it was saved from the device meta"
    return None


class PlainData(list[Any]):
    """In the place of an object of one of the classes of BESIDE, with nothing that the object holds."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # a date may be the key of a dict

    def __new__(cls, *_: Any) -> "PlainData":
        return super().__new__(cls)

    def __init__(self, *_: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Forget the state."""


def _dict_of(*_: Any) -> dict[Any, Any]:
    """Return an empty dict, in the place of a defaultdict: it may hold the weights."""
    return {}


def _plain_classes() -> list[Any]:
    """Return classes and functions of plain data, which training programs save beside the weights.

    torch's own list lacks them. timm saves its arguments in a Namespace, a best accuracy is a number of NumPy, and the
    state of a random generator is an array.
    """
    import argparse

    import numpy as np
    from numpy._core.multiarray import _reconstruct, scalar

    return [
        argparse.Namespace,
        *((pathlib.PosixPath, f"{module}.PosixPath") for module in PATHLIB),
        (_dict_of, "collections.defaultdict"),
        *((PlainData, f"{module}.{name}") for module, names in BESIDE.items() for name in names),
        np.dtype,
        np.ndarray,
        *(type(np.dtype(letter)) for letter in np.typecodes["All"] if letter not in "OV"),  # no objects, no records
        *((function, f"numpy.{core}.multiarray.{function.__name__}")  # NumPy 1 and NumPy 2
          for function in (scalar, _reconstruct) for core in ("core", "_core")),
    ]  # fmt: skip


def _reason(path: str, error: Exception) -> str:
    """Return the message for a file that cannot be read."""
    text = str(error)
    named = re.search(r"GLOBAL (\S+)|but got <class '([^']+)'>", text)  # by an unpickler of torch
    class_name = named[1] or named[2] if named else ""
    if is_other_pickle(path) and re.match(r"$|torch\.|numpy\.", class_name):
        return (
            f"{path} cannot be read as weights: it is a pickle that torch.save did not write: if you trust it, load it "
            "in Python, and save its weights, a dict of tensors or arrays by name, with torch.save"
        )
    if isinstance(error, pickle.UnpicklingError):
        # torch's unpickler reports an "unsupported operand" for a file that is no pickle, for example a web page.
        if "Unsupported operand" in text:
            return f"{path} cannot be read as weights: it is not a checkpoint"
        what = f"wants the class {class_name}" if class_name else "holds more than tensors"
        return (
            f"{path} {what}, and could execute code: save the state_dict() of the network instead, as safetensors or "
            "with torch.save"
        )
    if isinstance(error, LookupError | EOFError):  # of an unpickler, which names the byte or the opcode
        return f"{path} cannot be read as weights: it is not a checkpoint ({kind_and_reason(error)})"
    return f"{path} cannot be read as weights: {first_lines(error)}"
