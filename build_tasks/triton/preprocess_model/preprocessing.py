"""Prepares a picture as a model's input, as timm's transform for evaluation does. Needs only NumPy and Pillow.

This file is published without changes: beside the client examples, and in the Python model of an ensemble.
preprocessing.json, beside it, holds its settings.

Pictures may come from anybody. What would take long to decode, or much memory, is refused after a look at its header.

Source of the rules: timm.data.transforms_factory.transforms_imagenet_eval, and torchvision's Resize and CenterCrop.
"""

import io
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

Preprocessing = dict[str, Any]

MODES = {"gray": "L", "rgb": "RGB", "bgr": "RGB", "rgba": "RGBA", "bgra": "RGBA"}  # Pillow's, of each color
FORMATS = ("JPEG", "PNG")  # Pillow has decoders of many more, and one of them starts another program, Ghostscript
MAX_PIXELS = 2**26  # of the encoded picture and of the resized one; Pillow needs 4 bytes for each
MAX_RATIO = 100  # of the longer side to the shorter one
MAX_SCANS = 100  # of a JPEG; usual ones have 1 to 10, and each takes as long as a whole picture
# The next marker of a JPEG. Bytes 0xFF of its pixels are followed by 0x00 or by 0xD0 to 0xD7.
# Two more markers have no content, of which one begins the file.
JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
END_OF_IMAGE, START_OF_SCAN = b"\xd9", b"\xda"


class PictureError(ValueError):
    """A picture that is not accepted. The message is one short line."""


def read(folder: str | pathlib.Path = pathlib.Path(__file__).parent) -> Preprocessing:
    """Return the settings in a folder's preprocessing.json."""
    settings: Preprocessing = json.loads((pathlib.Path(folder) / "preprocessing.json").read_text(encoding="utf-8"))
    return settings


def preprocess(picture: bytes | str | Sequence[bytes | str], settings: Preprocessing) -> np.ndarray:
    """Return the pictures of a sample, JPEG or PNG, as the model's input.

    Args:
        picture: The bytes of the file, or its path; a sequence of them if settings["files"] names several.
        settings: From preprocessing.json.

    Returns:
        float32 (channels, height, width) or uint8 (height, width, channels), as settings["format"] says, or what
        settings["layout"] and settings["dtype"] say. The channels are in the order of settings["color"].

    Raises:
        PictureError: If `decode` does not accept it.
    """
    pictures = [picture] if isinstance(picture, bytes | str) else picture
    bands, first = [], 0
    for image in decode_all(pictures, settings):
        bands.append(np.atleast_3d(np.asarray(cropped(resized(image, settings), settings, first))))
        first += bands[-1].shape[2]
    pixels = np.concatenate(bands, axis=2) if len(bands) > 1 else bands[0]
    layout = "nhwc"
    if settings["format"] != "uint8_nhwc":
        layout = "nchw"
        mean, std = (np.array(settings[key], np.float32) for key in ("mean", "std"))
        scaled = pixels.astype(np.float32) / np.float32(255 / settings.get("scale", 1))
        pixels = (scaled - mean) / std
    if settings.get("layout", layout) == "nchw":
        pixels = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels, settings.get("dtype"))


def colors_of(settings: Preprocessing) -> list[str]:
    """Return the color of each picture of a sample. Empty if the input is no picture."""
    colors: list[str] = settings.get("color", ["rgb"])
    return colors


def decode_all(
    pictures: Sequence[bytes | str], settings: Preprocessing, formats: tuple[str, ...] = FORMATS
) -> list[Image.Image]:
    """Return the pictures of a sample in their colors.

    Args:
        pictures: The bytes of the files, or their paths.
        settings: From preprocessing.json.
        formats: Pillow's names of the formats that are accepted.

    Raises:
        PictureError: If there are more or fewer than a sample has, or if `decode` does not accept one.
    """
    colors = colors_of(settings)
    if len(pictures) != len(colors):
        raise PictureError(f"expected {len(colors)} pictures for a sample, found {len(pictures)}")
    return [decode(picture, settings, formats, color) for picture, color in zip(pictures, colors, strict=True)]


def decode(
    picture: bytes | str,
    settings: Preprocessing | None = None,
    formats: tuple[str, ...] = FORMATS,
    color: str = "rgb",
) -> Image.Image:
    """Return a picture with its channels in the order of a color, the first picture of an animation.

    Args:
        picture: The bytes of the file, or its path.
        settings: From preprocessing.json, if the picture will be resized as they say.
        formats: Pillow's names of the formats that are accepted.
        color: A key of MODES. The image has the channels of "bgr" in this order, under Pillow's mode RGB.

    Raises:
        PictureError: If it is no such picture, or larger than it may be.
    """
    expected = f"expected a picture in {' or '.join(formats)}"
    try:
        with (
            io.BytesIO(picture) if isinstance(picture, bytes) else open(picture, "rb") as file,
            Image.open(file, formats=formats) as image,
        ):
            refuse_large(image, file, settings)
            converted = image.convert(MODES[color])
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError(f"{expected}, found another content") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"expected a picture of at most {MAX_PIXELS:,} pixels, found far more") from error
    except Exception as error:  # a broken file may raise errors of Pillow, zlib or struct
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:120] or type(error).__name__
        raise PictureError(f"{expected} that can be read: {reason}") from error
    if color.startswith("bgr"):
        blue, green, red, *alpha = converted.split()
        return Image.merge(converted.mode, (red, green, blue, *alpha))
    return converted


def refuse_large(image: Image.Image, file: IO[bytes], settings: Preprocessing | None) -> None:
    """Raise PictureError if a picture is larger than it may be. Only its header has been read so far."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(f"expected a picture of at most {MAX_PIXELS:,} pixels, found {width} x {height}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise PictureError(f"expected a picture with sides of at most {MAX_RATIO} to 1, found {width} x {height}")
    if settings is not None:
        size = resized_size(image.size, settings)
        if not 0 < math.prod(size) <= MAX_PIXELS:
            found = f"{size[0]} x {size[1]} from {width} x {height}"
            raise PictureError(f"expected 1 to {MAX_PIXELS:,} pixels after the picture is resized, found {found}")
    if image.format in ("JPEG", "MPO"):  # the second: a JPEG that further ones follow in the same file
        file.seek(0)
        if count_scans(file.read()) > MAX_SCANS:
            raise PictureError(f"expected a JPEG of at most {MAX_SCANS} scans, found more")


def count_scans(jpeg: bytes) -> int:
    """Return how many times the first picture in a JPEG file covers its area, up to MAX_SCANS + 1."""
    scans = position = 0
    while scans <= MAX_SCANS and (marker := JPEG_MARKER.search(jpeg, position)) and marker[1] != END_OF_IMAGE:
        scans += marker[1] == START_OF_SCAN
        position = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")  # the length comes first
    return scans


def resized(image: Image.Image, settings: Preprocessing) -> Image.Image:
    """Return the picture at the size from which the center is cropped."""
    return image.resize(resized_size(image.size, settings), Image.Resampling[settings["interpolation"].upper()])


def resized_size(size: tuple[int, int], settings: Preprocessing) -> tuple[int, int]:
    """Return the (width, height) from which the center is cropped, by crop_pct and crop_mode."""
    height, width = (math.floor(length / settings["crop_pct"]) for length in settings["input_size"][1:])
    if settings["crop_mode"] == "squash":
        return width, height
    bordered = settings["crop_mode"] in ("border", "letterbox")
    if not bordered and height == width:  # torchvision's rule, which rounds down
        short = min(size)
        return height * size[0] // short, height * size[1] // short
    ratios = size[1] / height, size[0] / width
    ratio = max(ratios) if bordered else min(ratios)
    return round(size[0] / ratio), round(size[1] / ratio)


def cropped(image: Image.Image, settings: Preprocessing, first: int = 0) -> Image.Image:
    """Return the center of the picture, with a border if the picture is smaller.

    Args:
        first: The channel of the input that the first one of the picture is.
    """
    height, width = settings["input_size"][1:]
    if width > image.width or height > image.height:
        size = max(width, image.width), max(height, image.height)
        padded = Image.new(image.mode, size, border(len(image.getbands()), settings, first))
        padded.paste(image, ((padded.width - image.width) // 2, (padded.height - image.height) // 2))
        image = padded
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def border(bands: int, settings: Preprocessing, first: int) -> tuple[int, ...]:
    """Return the value of the border in each band of a picture."""
    if settings["crop_mode"] == "border":
        mean = np.broadcast_to(settings["mean"], settings["input_size"][0])[first : first + bands]
        return tuple(round(255 * (value / settings.get("scale", 1))) for value in mean)
    return (settings["fill"] if settings["crop_mode"] == "letterbox" else 0,) * bands
