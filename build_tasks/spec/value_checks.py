"""Values of a spec that have the right type, and with which no stage could end well.

`document_mistake` comes before the types are checked: what TOML allows, and what Python, JSON or a terminal cannot
handle. `mistakes` finds sizes and numbers that only a stage would refuse, after minutes of work.
"""

import math
import re
from collections.abc import Iterator
from datetime import date, datetime, time
from typing import Any

from build_tasks.spec.interface import largest_dims
from build_tasks.spec.model import Model, Spec
from build_tasks.triton.platforms import TRITON_MODELS

MAX_DEPTH = 16  # tables and lists within each other; Triton's protobuf needs 8
MAX_ELEMENTS = 2**31 - 1  # of a tensor, as TensorRT and most kernels of PyTorch count them
MAX_NAME = 100  # characters of a model's name, to which stages append up to 40
TOO_DEEP = f"expected at most {MAX_DEPTH} tables and lists within each other"

Mistake = tuple[str, str, str]  # key, what was expected, what was found


def document_mistake(document: dict[str, Any]) -> str | None:
    """Return the first value of a TOML document that a spec cannot hold: `key: expected …, found …`."""
    pending: list[tuple[str, Any, int]] = [("", document, 0)]
    while pending:
        key, value, depth = pending.pop()
        if isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                return f"{key}: {TOO_DEEP}, found more"
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for name, element in items:
                if isinstance(name, str) and "\0" in name:
                    return f"{key or 'top level'}: expected keys without NUL, found {name!r}"
                path = f"{key}.{name}".lstrip(".") if isinstance(name, str) else f"{key}[{name}]"
                pending.append((path, element, depth + 1))
        elif isinstance(value, datetime | date | time):
            return f"{key}: expected a string, a number or a boolean, found {type(value).__name__} {value}"
        elif isinstance(value, str) and "\0" in value:
            return f"{key}: expected a string without NUL, found {value!r}"
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            return f"{key}: expected an integer of at most 64 bits, found one of {value.bit_length()}"
    return None


def mistakes(model: Model) -> Iterator[Mistake]:
    """Yield numbers, sizes and patterns of the spec that a stage could not use."""
    spec = model.spec
    yield from _not_finite(spec.architecture.arguments, "architecture.arguments")
    for key, table in {
        "triton": spec.triton,
        **{f"triton.{name}": spec.triton.get(name) for name in TRITON_MODELS},
    }.items():
        if isinstance(table, dict):  # the protobuf checks all other fields
            yield from _not_finite(table.get("parameters"), f"{key}.parameters")
    yield from _size_mistakes(spec)
    for index, pattern in enumerate(spec.engine.keep_fp32):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            expected = "a type of operator, or a regular expression for names of nodes"
            yield f"engine.keep_fp32[{index}]", expected, f"{pattern!r} ({error})"


def _size_mistakes(spec: Spec) -> Iterator[Mistake]:
    """Yield a batch of inputs that no tensor can hold."""
    shape = max(largest_dims(spec), key=math.prod)
    if not spec.inputs and not spec.input.shape:
        shape = [1, 1, 1]  # the architecture decides
    smallest, best, largest = spec.profile
    batches = {
        "max_batch_size": spec.max_batch_size,
        "onnx.batch_size": spec.onnx.batch_size,
        "engine.max_batch_size": max(smallest, best, largest),
    }
    for key, batch in batches.items():
        if batch * math.prod(shape) > MAX_ELEMENTS:
            expected = f"inputs of at most 2**31 - 1 values, the most that a tensor holds, in a batch of {batch}"
            too_large = "inputs" if spec.inputs else "input"
            yield key if math.prod(shape) <= MAX_ELEMENTS else too_large, expected, f"{batch} x {shape}"
            return


def _not_finite(value: Any, key: str) -> Iterator[Mistake]:
    """Yield the numbers within a value that are nan or inf, which JSON does not have."""
    if isinstance(value, dict):
        for name, element in value.items():
            yield from _not_finite(element, f"{key}.{name}")
    elif isinstance(value, list):
        for index, element in enumerate(value):
            yield from _not_finite(element, f"{key}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, "a finite float", repr(value)
