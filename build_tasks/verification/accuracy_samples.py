"""What accuracy is measured on, and what int8 and fp8 are calibrated with: a set of samples, and the classes they show.

a folder of pictures (or of folders of them)   through the model's own preprocessing
an .npz, or Polygraphy's inputs as .json       as they are, in the form of input.format
"""

import glob
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError
from build_tasks.spec.model import Model
from build_tasks.tensors import INPUT, layout_dims

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

SHIPPED_PHOTOGRAPHS = "build_tasks/verification/photographs"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TENSOR_SUFFIXES = (".npz", ".json")

FOLDERS = "folders"  # accuracy.truth where each picture stands in a folder named after its class


def sample_files(source: str) -> list[str]:
    """The files of a set of samples: the pictures of a folder and of those in it, by path; or the file itself."""
    if source.endswith(TENSOR_SUFFIXES):
        return [source]
    found = glob.glob(f"{glob.escape(source)}/**", recursive=True)
    return sorted(path for path in found if path.lower().endswith(SUFFIXES))


def read_encoded(model: Model) -> "np.ndarray | None":
    """The accuracy samples as files, bytes (samples, 1), as an ensemble takes them; None where they are tensors."""
    import numpy as np

    source = model.source(model.spec.accuracy.samples) if model.spec.accuracy.samples else SHIPPED_PHOTOGRAPHS
    if source.endswith(TENSOR_SUFFIXES):
        return None
    contents = []
    for path in sample_files(source):
        with open(path, "rb") as file:
            contents.append([file.read()])
    return np.array(contents, dtype=object)


def load_samples(
    source: str,
    paths: list[str],
    transform: "Callable[[], Callable[[Image], torch.Tensor]]",
    shape: tuple[int, int, int],
    input_format: str,
) -> "tuple[list[str], np.ndarray]":
    """The names of the samples, and the samples as input.format says.

    transform: makes the model's preprocessing; asked for where the samples are pictures.
    shape: (channels, height, width), which tensors must have.
    UserError for an empty set, and for what cannot be read.
    """
    if source.endswith(TENSOR_SUFFIXES):
        batch = tensors(source, shape, input_format)
        return [str(index) for index in range(len(batch))], batch
    if not paths:
        raise UserError(f"{source}: no pictures here ({', '.join(SUFFIXES)})")
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{source}: the name of {path!a} is not UTF-8; rename it") from error
    names = [os.path.relpath(path, source).replace(os.sep, "/").replace("\n", " ") for path in paths]
    return names, preprocessed(paths, transform())


def preprocessed(paths: list[str], transform: "Callable[[Image], torch.Tensor]") -> "np.ndarray":
    """The pictures as the transform makes them, in an array."""
    import torch
    from PIL import UnidentifiedImageError
    from PIL.Image import open as open_image

    ready = []
    for path in paths:
        try:
            with open_image(path) as image:
                ready.append(transform(image.convert("RGB")))
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"{path} cannot be read as a picture ({os.path.basename(path)}: {error})") from error
    batch: np.ndarray = torch.stack(ready).numpy()
    return batch


def tensors(path: str, shape: tuple[int, int, int], input_format: str) -> "np.ndarray":
    """Samples that somebody else has preprocessed. UserError where they are no finite tensors of this shape.

    fp32_nchw: float32 (samples, channels, height, width). uint8_nhwc: uint8 (samples, height, width, channels).

    An .npz holds them as INPUT__0, or as its only array; a .json is what Polygraphy's --save-inputs writes.
    """
    import numpy as np
    from polygraphy.json import load_json

    if not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    try:
        feeds: list[dict[str, Any]] = [dict(np.load(path))] if path.endswith(".npz") else load_json(path)
        parts = [feed[INPUT] if INPUT in feed else _only(feed) for feed in feeds]
        batch = np.concatenate(parts)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # of zipfile, of pickle, of Polygraphy: whatever a foreign file brings about
        raise UserError(f"{path} cannot be read as samples ({type(error).__name__}: {error})") from error
    raw = input_format == "uint8_nhwc"
    if raw and batch.dtype != np.uint8:
        raise UserError(f"{path}: expected uint8, since input.format is {input_format}, found {batch.dtype}")
    batch = batch if raw else np.asarray(batch, dtype=np.float32)
    expected = layout_dims(shape, input_format)
    if list(batch.shape[1:]) != expected or not len(batch):
        wanted = f"[samples, {', '.join(map(str, expected))}]"
        raise UserError(f"{path}: expected an array of shape {wanted}, found {list(batch.shape)}")
    if not np.isfinite(batch).all():
        raise UserError(f"{path}: there is a NaN or an infinity in it")
    return batch


def _only(feed: dict[str, Any]) -> Any:
    if len(feed) != 1:
        raise UserError(f"expected the array {INPUT}, or a single one, found {', '.join(sorted(feed)) or 'none'}")
    return next(iter(feed.values()))


def read_truth(source: str, names: list[str], labels: list[str] | None) -> dict[int, int]:
    """The class that each sample shows, by the sample's place; not every sample needs one.

    source: a CSV file with lines `sample,class`, or FOLDERS. A class is its label, or else its index.
    UserError for samples and classes that there are not, and where no sample has a class.
    """
    if source == FOLDERS:
        found = {i: _class(n.split("/")[0], labels, n) for i, n in enumerate(names) if "/" in n}
        if not found:
            raise UserError(f"accuracy.truth: no sample stands in a folder of its class; {names[0]} does not, say")
        return found
    places = {name: index for index, name in enumerate(names)}
    found = {}
    for number, row in _rows(source):
        where = f"{source}, line {number}"
        if len(row) < 2:
            raise UserError(f"{where}: expected `sample,class`, found {','.join(row)!r}")
        name, shown = row[0].strip(), ",".join(row[1:]).strip()  # ImageNet's labels have commas
        if name not in places:
            raise UserError(f"{where}: there is no sample {name!r}{_near(name, names)}")
        if found.setdefault(places[name], index := _class(shown, labels, where)) != index:
            raise UserError(f"{where}: {name!r} shows another class in a line before")
    if not found:
        raise UserError(f"{source}: no line `sample,class` in it")
    return found


def _rows(path: str) -> list[tuple[int, list[str]]]:
    """The lines of a CSV file that say something, by number. UserError for a file that cannot be read so."""
    import csv

    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [(number, row) for number, row in enumerate(csv.reader(file), 1) if row and row[0].strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as lines `sample,class`: {error}") from error


def _class(shown: str, labels: list[str] | None, where: str) -> int:
    places = [index for index, label in enumerate(labels or ()) if label.casefold() == shown.casefold()]
    if len(places) > 1:
        raise UserError(f"{where}: {shown!r}: {len(places)} classes are called so, name its index")
    if places:
        return places[0]
    if not shown.isdecimal():
        if labels is None:
            raise UserError(f"{where}: expected the index of a class, since the spec has no labels, found {shown!r}")
        raise UserError(f"{where}: there is no class {shown!r}{_near(shown, labels)}")
    if labels and int(shown) >= len(labels):
        raise UserError(f"{where}: class {shown} of {len(labels)}, which begin with 0")
    return int(shown)


def _near(word: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
