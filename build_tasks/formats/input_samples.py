"""The samples of a model, for any inputs: pictures, arrays, or both, in groups of one shape.

a folder: a.jpg, b.jpg ─┐ pictures, as picture_transform prepares them
a folder: a.npz, b.npz ─┼► Sample ─► groups (see verification/sample_groups.py)
both: a.jpg and a.npz ──┤ of one sample
.npz, .json ────────────┘ arrays
nothing ─► random values by the ranges of the inputs, at the smallest, the largest and the tuned lengths
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, listed
from build_tasks.formats import picture_transform
from build_tasks.formats.example_inputs import Lengths, example_inputs, lengths_to_check
from build_tasks.tensors import Feed, InputTensor, Interface, dims_at, tuned_lengths
from build_tasks.verification import accuracy_samples
from build_tasks.verification.tensor_samples import Sample, fit, group, read_file, read_samples

if TYPE_CHECKING:
    import numpy as np
    import torch

    Reader = Callable[[list[str]], np.ndarray]  # from the pictures of a sample to an input

RANDOM_SAMPLES = 16  # at the lengths to tune for
RANDOM_SAMPLES_OF_LENGTH = 2  # at each other combination of lengths

PictureTable = Mapping[str, Any]  # the keys of spec/picture_keys.py


def random_samples(interface: Interface, more: Sequence[Lengths] = ()) -> tuple[list[str], list[Feed]]:
    """Return the names and the groups of random samples.

    Args:
        interface: The inputs.
        more: Further lengths, besides those of `lengths_to_check`.
    """
    import numpy as np

    names: list[str] = []
    groups: list[Feed] = []
    cases = lengths_to_check(interface["dimensions"])
    cases += [case for index, case in enumerate(more) if case not in [*cases, *more[:index]]]
    for index, lengths in enumerate(cases):
        count = RANDOM_SAMPLES_OF_LENGTH if index else RANDOM_SAMPLES
        values = example_inputs(interface, count, lengths, seed=1000 * index)
        keys = [each["name"] for each in interface["inputs"]]
        groups.append(dict(zip(keys, map(np.asarray, values), strict=True)))
        names += [f"random {number}" for number in range(len(names), len(names) + count)]
    return names, groups


def load_samples(
    module: "torch.nn.Module",
    source: str,
    paths: Sequence[str],
    interface: Interface,
    tables: Sequence[PictureTable | None],
) -> tuple[list[str], list[Feed]]:
    """Return the names and the groups of the samples.

    Args:
        module: The network, which knows the preprocessing of pictures that the spec leaves open.
        source: The folder or file.
        paths: The files in the folder, as `accuracy_samples.sample_files` returns them.
        interface: The inputs, resolved.
        tables: How each input is made of pictures; None for one that is no picture.
    Raises:
        UserError: If there are no samples, or if one of them does not fit the inputs.
    """
    inputs, dimensions = interface["inputs"], interface["dimensions"]
    arrays = [path for path in paths if path.endswith((".npz", ".json"))]
    pictures = [path for path in paths if path not in {*arrays}]
    if not paths:
        suffixes = ", ".join((".npz", *accuracy_samples.PICTURE_SUFFIXES) if any(tables) else (".npz",))
        raise UserError(f"{source}: the folder contains no samples ({suffixes})")
    if not pictures:
        names = [] if source in arrays else [accuracy_samples.name_in(source, path) for path in arrays]
        samples = [*read_samples(arrays, names or [""], inputs, dimensions)]
    else:
        settings = picture_settings(module, interface, tables)
        readers = {
            each["name"]: (table, picture_reader(settings[each["name"]]))
            for each, table in zip(inputs, tables, strict=True)
            if table is not None
        }
        if not readers:
            raise UserError(f"{pictures[0]}: expected .npz files, since no input is a picture (layout)")
        samples = [*_combine(source, pictures, arrays, inputs, dimensions, readers)]
    groups = group(samples)
    return [name.replace("\n", " ") for names, _ in groups for name in names], [feed for _, feed in groups]


def picture_settings(
    module: "torch.nn.Module", interface: Interface, tables: Sequence[PictureTable | None]
) -> dict[str, dict[str, Any]]:
    """Return how each input that is a picture is prepared, by its name: the content of preprocessing.json.

    Args:
        module: The network, which knows what the spec leaves open.
        interface: The inputs, resolved. Pictures are resized to the lengths that open dimensions are tuned for.
        tables: How each input is made of pictures; None for one that is no picture.
    """
    settings = {}
    lengths = tuned_lengths(interface["dimensions"])
    for tensor, table in zip(interface["inputs"], tables, strict=True):
        if table is None:
            continue
        dims = dims_at(tensor["shape"] or [], lengths)
        shape = [dims[-1], *dims[:-1]] if tensor["layout"] == "nhwc" else dims
        config = picture_transform.data_config(module, {**table, "shape": shape})
        input_format = "uint8_nhwc" if tensor["dtype"] == "uint8" else "fp32_nchw"
        arrangement = {"format": input_format, "layout": tensor["layout"], "dtype": tensor["dtype"]}
        steps = picture_transform.format_steps(config, input_format)
        settings[tensor["name"]] = {**arrangement, **config, "steps": steps}
    return settings


def picture_reader(settings: Mapping[str, Any]) -> "Reader":
    """Return the function that reads the pictures of a sample as an input, without the batch.

    Args:
        settings: Of this input, as `picture_settings` returns them.
    """
    others = ("format", "layout", "dtype", "steps")
    config = {key: value for key, value in settings.items() if key not in others}
    input_format, layout = settings["format"], settings["layout"]
    transform = picture_transform.transform(config, input_format)

    def read(paths: list[str]) -> "np.ndarray":
        (picture,) = accuracy_samples.preprocess([paths], transform, config)
        if input_format == "uint8_nhwc" and layout == "nchw":
            picture = picture.transpose(2, 0, 1)
        elif input_format == "fp32_nchw" and layout == "nhwc":
            picture = picture.transpose(1, 2, 0)
        result: np.ndarray = picture.astype(settings["dtype"])
        return result

    return read


def _combine(
    source: str,
    pictures: Sequence[str],
    arrays: Sequence[str],
    inputs: Sequence[InputTensor],
    dimensions: Mapping[str, Any],
    readers: "Mapping[str, tuple[PictureTable, Reader]]",
) -> Iterator[Sample]:
    """Yield the samples of a folder with pictures. An .npz file of the same name holds the other inputs of a sample."""
    names: dict[str, str] = {}  # of each sample, by its path without the ending
    files: dict[str, dict[str, list[str]]] = {}  # the pictures of each input of a sample
    for name, (table, _) in readers.items():
        endings = table["files"]
        if endings is None and len(readers) > 1:
            raise UserError(f"{source}: several inputs are pictures, so that each needs the key files; {name} has none")
        own = [path for path in pictures if endings is None or path.endswith(tuple(endings))]
        for sample, paths in accuracy_samples.group_files(source, own, endings).items():
            stem = sample if endings else os.path.splitext(sample)[0]
            if name in files.setdefault(stem, {}):
                raise UserError(f"{paths[0]}: there is a second picture of this name, {files[stem][name][0]}")
            names.setdefault(stem, sample)
            files[stem][name] = paths
    beside = {os.path.splitext(accuracy_samples.name_in(source, path))[0]: path for path in arrays}
    for stem in sorted({*files, *beside}):
        found = {name: readers[name][1](paths) for name, paths in files.get(stem, {}).items()}
        if rest := [each for each in inputs if each["name"] not in found]:
            missing = listed(each["name"] for each in rest)
            if stem not in beside:
                raise UserError(f"{source}/{stem}.npz does not exist, and has to hold {missing} of this sample")
            try:
                (own_arrays,) = read_file(beside[stem])
                fitted, count = fit(own_arrays, rest, dimensions)
                if count is not None:
                    raise UserError(f"expected one sample beside pictures, without a batch, found {count}")
            except UserError as error:
                raise UserError(f"{beside[stem]}: {str(error).removeprefix(f'{beside[stem]}: ')}") from error
            found |= fitted
        yield Sample(names.get(stem, f"{stem}.npz"), {each["name"]: found[each["name"]] for each in inputs})
