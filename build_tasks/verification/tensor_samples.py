"""Samples as arrays by the name of the input, from files of NumPy and Polygraphy. They may have open dimensions.

    a folder of .npz files, one .npz ─┐
    Polygraphy's inputs as .json ─────┴► Sample, checked against the inputs ─► groups of one shape, batch by batch

A file holds one sample, with arrays of the input's shape, or many, with arrays of one more dimension. Anybody may have
written the files: what is damaged, or not a sample of these inputs, is an error of one line.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from build_tasks.errors import UserError, kind_and_reason, listed, with_suggestion
from build_tasks.runtime.limits import check_archive, check_unpacked
from build_tasks.tensors import InputTensor, Range

if TYPE_CHECKING:
    import numpy as np

Arrays = dict[str, "np.ndarray"]


class Sample(NamedTuple):
    """One sample: its name, and the array of each input, without the batch."""

    name: str
    arrays: Arrays


def read_file(path: str) -> list[Arrays]:
    """Return the arrays of a file: of an .npz, or of each run in a .json of Polygraphy's inputs.

    Raises:
        UserError: If it cannot be read, unpacks to more than it may, or holds Python objects.
    """
    import numpy as np
    from polygraphy.json import load_json

    if not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    check_archive(path)
    try:
        if not path.endswith(".npz"):
            runs = [{name: np.asarray(array) for name, array in feed.items()} for feed in load_json(path)]
        else:
            with np.load(path, allow_pickle=False) as archive:
                runs = [{name: archive[name] for name in archive.files}]
    except Exception as error:  # zipfile, NumPy and Polygraphy raise different errors for a broken file
        raise UserError(f"{path} cannot be read as samples ({kind_and_reason(error)})") from error
    if wrong := [name for run in runs for name, array in run.items() if not isinstance(array, np.ndarray)]:
        raise UserError(f"{path}: {wrong[0]} is no array")
    return runs


def read_samples(
    paths: Sequence[str], names: Sequence[str], inputs: Sequence[InputTensor], dimensions: Mapping[str, Range]
) -> Iterator[Sample]:
    """Yield the samples of files, in their order.

    Args:
        paths: The files.
        names: A name for each file; "" for one whose samples are named by their number. If a file has many samples,
            each has the name of the file and its number.
        inputs: The inputs that each sample must have.
        dimensions: The lengths of open dimensions.
    Raises:
        UserError: If a file is damaged, or if a sample does not fit the inputs.
    """
    total = 0
    for path, name in zip(paths, names, strict=True):
        number = 0
        for arrays in read_file(path):
            total += sum(array.nbytes for array in arrays.values())
            check_unpacked(path, total, "the samples")
            try:
                fitted, count = fit(arrays, inputs, dimensions)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            if count is None and name:
                yield Sample(name, fitted)
                continue
            for index in range(count or 1):
                one = {key: array[index, ...] for key, array in fitted.items()} if count else fitted
                yield Sample(f"{name}[{number}]" if name else str(number), one)
                number += 1


def fit(arrays: Arrays, inputs: Sequence[InputTensor], dimensions: Mapping[str, Range]) -> "tuple[Arrays, int | None]":
    """Return the arrays of the inputs, in their types, and the number of samples; None for one without a batch.

    Raises:
        UserError: If an input is missing, or if an array has another rank, length or type, or values that are not
            finite or not in the range of the input.
    """
    names = [each["name"] for each in inputs]
    if len(names) == len(arrays) == 1:
        arrays = dict(zip(names, arrays.values(), strict=True))
    if missing := [name for name in names if name not in arrays]:
        similar = with_suggestion(missing[0], arrays).partition(" (")[2]
        found = listed(sorted(arrays)) or "nothing"
        raise UserError(f"expected the arrays {listed(names)}, found {found}" + (f" ({similar}" if similar else ""))
    batched = {arrays[each["name"]].ndim - len(each["shape"] or ()) for each in inputs}
    fitted: Arrays = {}
    counts: dict[str, int] = {}
    lengths: dict[str, tuple[int, str]] = {}
    for each in inputs:
        name, array, shape = each["name"], arrays[each["name"]], each["shape"] or []
        extra = array.ndim - len(shape)
        dims = ", ".join(map(str, shape))
        if extra not in (0, 1) or len(batched) > 1:
            both = f"[samples, {dims}] in all arrays, or [{dims}] for one sample" if dims else "[samples]"
            raise UserError(f"expected {name} of shape {both}, found {list(array.shape)}")
        if extra:
            counts[name] = len(array)
        for dim, length in zip(shape, array.shape[extra:], strict=True):
            check_length(name, dim, length, list(array.shape), dimensions, lengths)
        fitted[name] = cast(array, each)
    if len({*counts.values()}) > 1 or 0 in counts.values():
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"expected the same number of samples in each array, at least 1, found {found}")
    return fitted, next(iter(counts.values()), None)


def check_length(
    name: str,
    dim: int | str,
    length: int,
    found: list[int],
    dimensions: Mapping[str, Range],
    lengths: dict[str, tuple[int, str]],
) -> None:
    """Raise UserError if a dimension of an array has another length than it may.

    Args:
        name: The name of the input.
        dim: Its dimension in the spec: a length, or the word of an open one.
        length: The length in the array.
        found: The shape of the array.
        dimensions: The lengths of open dimensions.
        lengths: The lengths of the words so far, each with the input that has it; it grows.
    """
    if isinstance(dim, int):
        if length != dim:
            raise UserError(f"expected {name} with the dimension {dim}, found {length} in {found}")
        return
    bounds = dimensions[dim]
    if not bounds["min"] <= length <= bounds["max"]:
        raise UserError(
            f"expected {name} with a {dim} from {bounds['min']} to {bounds['max']} (dimensions.{dim}), found {length}"
        )
    known, other = lengths.setdefault(dim, (length, name))
    if known != length:
        raise UserError(f"expected {name} with the {dim} of {other}, {known}, found {length}")


def cast(array: "np.ndarray", tensor: InputTensor) -> "np.ndarray":
    """Return an array in the type of an input.

    Raises:
        UserError: If that changes its values, or if they are not finite, or integers outside of low and high.
    """
    import numpy as np

    name, dtype = tensor["name"], tensor["dtype"]
    if dtype == "string":
        if array.dtype.kind not in "US" and not (array.dtype.kind == "O" and all(map(_is_text, array.flat))):
            raise UserError(f"expected {name} of type string, found {array.dtype}")
        return array.astype(np.str_).astype(object)
    to = np.dtype(dtype)
    if {array.dtype.kind, to.kind} <= {"i", "u"}:
        converted = array.astype(to)
        if not np.array_equal(converted, array):
            raise UserError(f"expected {name} of type {dtype}, found values of {array.dtype} that it does not have")
    elif not np.can_cast(array.dtype, to, casting="same_kind"):
        raise UserError(f"expected {name} of type {dtype}, found {array.dtype}")
    else:
        converted = array.astype(to)
    if to.kind == "f" and not np.isfinite(converted).all():
        reason = "a NaN or an infinity" if not np.isfinite(array).all() else f"values beyond those of {dtype}"
        raise UserError(f"{name} contains {reason}")
    low, high = tensor["low"], tensor["high"]
    if to.kind in "iu" and converted.size:
        least, most = int(converted.min()), int(converted.max())
        if low is not None and least < low:
            raise UserError(f"expected {name} with values of at least {low} (low), found {least}")
        if high is not None and most > high:
            raise UserError(f"expected {name} with values of at most {high} (high), found {most}")
    return converted


def _is_text(value: Any) -> bool:
    return isinstance(value, str | bytes)


def group(samples: Sequence[Sample]) -> list[tuple[list[str], Arrays]]:
    """Return the samples in groups whose arrays have the same shapes: their names, and arrays (samples, …).

    The groups are in the order of their first sample.
    """
    import numpy as np

    groups: dict[tuple[tuple[int, ...], ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(tuple(array.shape for array in sample.arrays.values()), []).append(sample)
    return [
        (
            [sample.name for sample in members],
            {name: np.stack([sample.arrays[name] for sample in members]) for name in members[0].arrays},
        )
        for members in groups.values()
    ]
