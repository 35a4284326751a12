"""The answer of a network: which tensors in it are served, and under which names.

a tensor, list, tuple, dict, dataclass; nested ─► leaves by their place, "encoder.last" ─► the tensors of [[outputs]]
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from build_tasks.errors import UserError, listed, with_suggestion
from build_tasks.tensors import OUTPUT, Interface, OutputTensor, served_name


def select_tensors(answer: Any, interface: Interface) -> tuple[list[str], Any]:
    """Return the names of the served tensors, and the tensors: one, or a tuple.

    Raises:
        UserError: If the answer does not have them.
    """
    import torch

    if isinstance(answer, torch.Tensor) and not interface["outputs"]:
        return [OUTPUT.format(0)], answer
    leaves: dict[str, Any] = {}
    for path, value in leaves_of(answer):
        if path in leaves:
            raise UserError(f"the network answers with two tensors called {path!r}; give them other keys")
        leaves[path] = value
    found = _requested(leaves, interface["outputs"]) if interface["outputs"] else _all(leaves)
    others = [f"{path or 'the answer'} is {kind_of(value)}" for path, value in leaves.items() if _is_other(value)]
    wrong = [name for name, value in found if _is_other(value)]
    if wrong or not found:
        raise UserError(
            f"the network answers with {kind_of(answer)}, in which {listed(others) or 'nothing is a tensor'}; Triton "
            "needs tensors: name those to serve in [[outputs]]"
        )
    tensors = [value for _, value in found]
    return [name for name, _ in found], tensors[0] if isinstance(answer, torch.Tensor) else tuple(tensors)


def _requested(leaves: Mapping[str, Any], outputs: Sequence[OutputTensor]) -> list[tuple[str, Any]]:
    """Return the names and the tensors of [[outputs]]."""
    import torch

    paths: list[str] = []
    found = []
    for index, output in enumerate(outputs):
        path = _leaf_of(index, output, leaves)
        if path in paths:
            other = f"another tensor of the answer than that of outputs[{paths.index(path)}]"
            raise UserError(f"outputs[{index}].key: expected {other}, found {path!r} again")
        paths.append(path)
        value = leaves[path]
        if output["batch_dimension"] and isinstance(value, torch.Tensor):
            if output["batch_dimension"] >= value.ndim:
                expected = f"at most {value.ndim - 1}, since the network answers with the shape {list(value.shape)}"
                key = f"outputs[{index}].batch_dimension"
                raise UserError(f"{key}: expected {expected}, found {output['batch_dimension']}")
            value = value.movedim(output["batch_dimension"], 0)
        found.append((output["name"], value))
    return found


def _all(leaves: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the names and the tensors of an answer that [[outputs]] does not describe."""
    named = any(not part.isdecimal() for path in leaves for part in path.split("."))
    found = [
        (served_name(path) if named else OUTPUT.format(index), value)
        for index, (path, value) in enumerate(leaves.items())
    ]
    if len(dict(found)) < len(found):
        raise UserError(
            f"the network answers with {listed(leaves)}, of which two would have one name; name them in [[outputs]]"
        )
    return found


def _is_other(value: Any) -> bool:
    import torch

    return not isinstance(value, torch.Tensor)


def kind_of(value: Any) -> str:
    """Return the name of a type, and for a tuple or list those of its elements."""
    if value and type(value) in (tuple, list):
        return f"{type(value).__name__} of {', '.join(type(each).__name__ for each in value)}"
    return type(value).__name__


def leaves_of(answer: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what an answer holds, with its place: "logits", "0", "encoder.last". None is left out."""
    if isinstance(answer, Mapping):
        items = [(str(key), value) for key, value in answer.items()]
    elif dataclasses.is_dataclass(answer) and not isinstance(answer, type):
        items = [(each.name, getattr(answer, each.name)) for each in dataclasses.fields(answer)]
    elif isinstance(answer, tuple) and hasattr(answer, "_fields"):
        items = [*zip(answer._fields, answer, strict=True)]
    elif isinstance(answer, tuple | list):
        items = [(str(index), value) for index, value in enumerate(answer)]
    else:
        if answer is not None:
            yield path, answer
        return
    for key, value in items:
        yield from leaves_of(value, f"{path}.{key}" if path else key)


def _leaf_of(index: int, output: OutputTensor, leaves: Mapping[str, Any]) -> str:
    """Return the place of an output in the answer.

    Raises:
        UserError: If the answer has no such place.
    """
    key, paths = output["key"], list(leaves)
    if key is None and output["name"] not in leaves:
        named = any(not part.isdecimal() for path in paths for part in path.split(".") if part)
        key = output["name"] if named and output["name"] != OUTPUT.format(index) else index
    elif key is None:
        return output["name"]
    if str(key) in leaves:
        return str(key)
    if isinstance(key, int) and key < len(paths):
        return paths[key]
    raise UserError(
        f"outputs[{index}].key: expected one of {listed(path or '0' for path in paths)}, which the network answers "
        f"with, found {with_suggestion(key, paths)}"
    )
