"""The samples that accuracy is measured on and that int8 and fp8 are calibrated with, and the classes that they show.

a folder of pictures (or of folders of them) ─► preprocessing of the model ─┐   one or more pictures for each sample
.npz, or Polygraphy's inputs as .json ──────────────────────────────────────┴► an array in the layout of input.format

Samples of other inputs than one picture are read by formats/input_samples.py.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, kind_and_reason, listed, with_suggestion
from build_tasks.runtime.limits import check_archive
from build_tasks.spec.model import Model
from build_tasks.spec.model_files import walk
from build_tasks.spec.source_checks import FOLDERS, TENSOR_SUFFIXES
from build_tasks.tensors import INPUT, layout_dims

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

RANDOM_SAMPLES = "random values, by the ranges of [[inputs]]"  # the source in reports
SHIPPED_PHOTOGRAPHS = "build_tasks/verification/photographs"
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_DIGITS = 9  # of the index of a class
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow's names of them


def samples_source(model: Model) -> str | None:
    """Return the folder or file of the accuracy samples.

    None: random ones, because the spec names none, and its inputs are more than the picture of [input].
    """
    if samples := model.spec.accuracy.samples:
        return model.source(samples)
    return None if model.spec.inputs else SHIPPED_PHOTOGRAPHS


def sample_files(source: str) -> list[str]:
    """Return the files of a set of samples: all pictures and .npz files under a folder, or the file itself."""
    if source.endswith(TENSOR_SUFFIXES):
        return [source]
    return sorted(path for path in walk(source) if path.lower().endswith((*PICTURE_SUFFIXES, ".npz")))


def picture_files(source: str) -> list[str]:
    """Return the pictures of a set of samples, none if they are tensors."""
    return [path for path in sample_files(source) if path.lower().endswith(PICTURE_SUFFIXES)]


def name_in(source: str, path: str) -> str:
    """Return the name of a file of the samples: its path in their folder.

    Raises:
        UserError: If it is not UTF-8.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{source}: the name of {path!a} is not UTF-8; rename it") from error
    return os.path.relpath(path, source).replace(os.sep, "/")


def group_files(source: str, paths: list[str], endings: Sequence[str] | None) -> dict[str, list[str]]:
    """Return the pictures of each sample, by the name of the sample: its path in the folder.

    Args:
        source: The folder.
        paths: All pictures in it.
        endings: input.files of the spec: the endings of the files of a sample, whose name then lacks the ending.
    Raises:
        UserError: If a file has another ending, or if a sample lacks a file.
    """
    names = {path: name_in(source, path) for path in paths}
    if not endings or source == SHIPPED_PHOTOGRAPHS:  # a photograph that ships stands for all files of a sample
        return {name: [path] * len(endings or [""]) for path, name in names.items()}
    samples: dict[str, list[str]] = {}
    for path, name in names.items():
        ending = next((each for each in endings if name.endswith(each)), None)
        if ending is None:
            raise UserError(f"{path}: expected a name that ends in one of input.files, {listed(endings)}")
        samples.setdefault(name.removesuffix(ending), []).append(path)
    for name, found in samples.items():
        ordered = [f"{source}/{name}{ending}" for ending in endings]
        if missing := sorted({*ordered} - {*found}):
            raise UserError(f"{missing[0]} does not exist, and input.files needs it beside {found[0]}")
        samples[name] = ordered
    return samples


def read_encoded(model: Model) -> "np.ndarray | None":
    """Return the accuracy samples as encoded pictures, bytes (samples, pictures), the input of an ensemble.

    None if the samples are tensors.
    """
    import numpy as np

    source = samples_source(model)
    if source is None or not (pictures := picture_files(source)):
        return None
    return np.array(
        [
            [Path(path).read_bytes() for path in paths]
            for paths in group_files(source, pictures, model.spec.input.files).values()
        ],
        dtype=object,
    )


def load_samples(
    source: str,
    paths: list[str],
    transform: "Callable[[], Callable[[Sequence[Image]], torch.Tensor]]",
    preprocessing: dict[str, Any],
    input_format: str,
) -> "tuple[list[str], np.ndarray]":
    """Return the names of the samples, and the samples in the layout of input.format.

    Args:
        source: The folder or file of the samples.
        paths: The pictures, if it is a folder.
        transform: Makes the preprocessing of the model. It is called only for pictures.
        preprocessing: timm's data config. Its input_size is the (channels, height, width) that tensors must have.
        input_format: "fp32_nchw" or "uint8_nhwc".
    Raises:
        UserError: If there are no samples, or if one of them cannot be read.
    """
    if source.endswith(TENSOR_SUFFIXES):
        batch = load_tensors(source, tuple(preprocessing["input_size"]), input_format)
        return [str(index) for index in range(len(batch))], batch
    if not paths:
        raise UserError(f"{source}: the folder contains no pictures ({', '.join(PICTURE_SUFFIXES)})")
    samples = group_files(source, paths, preprocessing.get("files"))
    return [name.replace("\n", " ") for name in samples], preprocess([*samples.values()], transform(), preprocessing)


def preprocess(
    samples: list[list[str]], transform: "Callable[[Sequence[Image]], torch.Tensor]", preprocessing: dict[str, Any]
) -> "np.ndarray":
    """Return the pictures after the transform, as one array (samples, …).

    Args:
        samples: The paths of the pictures of each sample.
        preprocessing: The data config that the transform was made from.
    Raises:
        UserError: If a file cannot be read as a picture, or is a picture that the preprocessing model refuses.
    """
    import torch

    from build_tasks.triton.preprocess_model.preprocessing import PictureError, colors_of, decode

    if not (colors := colors_of(preprocessing)):
        raise UserError(
            f"accuracy.samples: expected an .npz or .json file of preprocessed samples, or input.files, since "
            f"input.shape has {preprocessing['input_size'][0]} channels, found pictures, which have 1, 3 or 4"
        )
    inputs = []
    for paths in samples:
        images = []
        for path, color in zip(paths, colors, strict=True):
            try:
                images.append(decode(path, preprocessing, PICTURE_FORMATS, color))
            except PictureError as error:
                raise UserError(f"{path}: {error}") from error
        inputs.append(transform(images))
    batch: np.ndarray = torch.stack(inputs).numpy()
    return batch


def load_tensors(path: str, shape: tuple[int, int, int], input_format: str) -> "np.ndarray":
    """Return samples that are already preprocessed.

    An .npz file holds them as INPUT__0, or as its only array. A .json file is what Polygraphy's --save-inputs writes.

    Args:
        path: The .npz or .json file.
        shape: (channels, height, width).
        input_format: "fp32_nchw" for float32 (samples, channels, height, width), "uint8_nhwc" for uint8 (samples,
            height, width, channels).
    Raises:
        UserError: If the file has no finite tensors of this shape.
    """
    import numpy as np
    from polygraphy.json import load_json

    if not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    check_archive(path)
    try:
        feeds: list[dict[str, Any]] = [dict(np.load(path))] if path.endswith(".npz") else load_json(path)
        batch = np.concatenate([feed[INPUT] if INPUT in feed else _only_array(feed) for feed in feeds])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # zipfile, pickle and Polygraphy raise different errors for a broken file
        raise UserError(f"{path} cannot be read as samples ({kind_and_reason(error)})") from error
    if input_format == "uint8_nhwc":
        if batch.dtype != np.uint8:
            raise UserError(f"{path}: expected uint8, because input.format is {input_format}, found {batch.dtype}")
    else:
        batch = np.asarray(batch, dtype=np.float32)
    dims = layout_dims(shape, input_format)
    if list(batch.shape[1:]) != dims or not len(batch):
        expected = f"[samples, {', '.join(map(str, dims))}]"
        raise UserError(f"{path}: expected an array of shape {expected}, found {list(batch.shape)}")
    if not np.isfinite(batch).all():
        raise UserError(f"{path}: the samples contain a NaN or an infinity")
    return batch


def _only_array(feed: dict[str, Any]) -> Any:
    if len(feed) != 1:
        raise UserError(f"expected the array {INPUT}, or a single one, found {', '.join(sorted(feed)) or 'none'}")
    return next(iter(feed.values()))


def read_truth(source: str, names: list[str], labels: list[str] | None) -> dict[int, int]:
    """Return the class of each sample by the sample's index. Samples without a class are left out.

    Args:
        source: A CSV file with lines `sample,class`, or FOLDERS. A class is its label, or else its index.
        names: The names of the samples.
        labels: The labels of the classes, if the spec has labels.
    Raises:
        UserError: If a sample or a class does not exist, or if no sample has a class.
    """
    if source == FOLDERS:
        truth = {i: _class_index(n.split("/")[0], labels, n) for i, n in enumerate(names) if "/" in n}
        if not truth:
            raise UserError(
                f"accuracy.truth: no sample lies in a folder that is named after its class; {names[0]}, for example, "
                "does not"
            )
        return truth
    indices = {name: index for index, name in enumerate(names)}
    truth = {}
    for number, row in _read_rows(source):
        where = f"{source}, line {number}"
        if len(row) < 2:
            raise UserError(f"{where}: expected `sample,class`, found {','.join(row)!r}")
        name, text = row[0].strip(), ",".join(row[1:]).strip()  # labels of ImageNet contain commas
        if name not in indices:
            raise UserError(f"{where}: there is no sample {with_suggestion(name, names)}")
        if truth.setdefault(indices[name], index := _class_index(text, labels, where)) != index:
            raise UserError(f"{where}: an earlier line gives {name!r} another class")
    if not truth:
        raise UserError(f"{source}: the file has no line `sample,class`")
    return truth


def _read_rows(path: str) -> list[tuple[int, list[str]]]:
    """The lines of a CSV file that are not empty, each with its number, which begins with 1."""
    import csv

    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [(number, row) for number, row in enumerate(csv.reader(file), 1) if row and row[0].strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as lines `sample,class`: {error}") from error


def _class_index(text: str, labels: list[str] | None, where: str) -> int:
    """The index of a class that is given by its label or its index. `where` begins the message of an error."""
    indices = [index for index, label in enumerate(labels or ()) if label.casefold() == text.casefold()]
    if len(indices) > 1:
        raise UserError(
            f"{where}: {len(indices)} classes have the label {text!r}; write the index of the class instead"
        )
    if indices:
        return indices[0]
    if not text.isdecimal():
        if labels is None:
            raise UserError(f"{where}: expected the index of a class, because the spec has no labels, found {text!r}")
        raise UserError(f"{where}: there is no class {with_suggestion(text, labels)}")
    if len(text) > MAX_DIGITS:
        raise UserError(f"{where}: expected the index of a class, found {text}")
    if labels and int(text) >= len(labels):
        raise UserError(f"{where}: there is no class {text}; the labels have the indices 0 to {len(labels) - 1}")
    return int(text)
