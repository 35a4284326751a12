"""Prepares a picture as a model's input, as timm's transform for evaluation does. Needs only NumPy and Pillow.

This file is published without changes: beside the client examples, and in the Python model of an ensemble.
preprocessing.json, beside it, holds its settings.

Source of the rules: timm.data.transforms_factory.transforms_imagenet_eval, and torchvision's Resize and CenterCrop.
"""

import io
import json
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image

Preprocessing = dict[str, Any]


def read(folder: str | pathlib.Path = pathlib.Path(__file__).parent) -> Preprocessing:
    """Return the settings in a folder's preprocessing.json."""
    settings: Preprocessing = json.loads((pathlib.Path(folder) / "preprocessing.json").read_text(encoding="utf-8"))
    return settings


def preprocess(picture: bytes | str, settings: Preprocessing) -> np.ndarray:
    """Return a JPEG or PNG as the model's input.

    Args:
        picture: The bytes of the file, or its path.
        settings: From preprocessing.json.

    Returns:
        float32 (channels, height, width) or uint8 (height, width, channels), as settings["format"] says.

    Raises:
        ValueError: If it is not a picture.
    """
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            pixels = np.asarray(cropped(resized(image.convert("RGB"), settings), settings))
    except Exception as error:  # a broken file may raise errors of Pillow, zlib or struct
        raise ValueError(f"not a picture: {error}") from error
    if settings["format"] == "uint8_nhwc":
        return pixels
    mean, std = (np.array(settings[key], np.float32) for key in ("mean", "std"))
    normalized: np.ndarray = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(normalized.transpose(2, 0, 1))


def resized(image: Image.Image, settings: Preprocessing) -> Image.Image:
    """Return the picture at the size from which the center is cropped, by crop_pct and crop_mode."""
    height, width = (math.floor(length / settings["crop_pct"]) for length in settings["input_size"][1:])
    how = Image.Resampling[settings["interpolation"].upper()]
    if settings["crop_mode"] == "squash":
        return image.resize((width, height), how)
    if settings["crop_mode"] != "border" and height == width:  # torchvision's rule, which rounds down
        short = min(image.size)
        return image.resize((height * image.width // short, height * image.height // short), how)
    ratios = image.height / height, image.width / width
    ratio = max(ratios) if settings["crop_mode"] == "border" else min(ratios)
    return image.resize((round(image.width / ratio), round(image.height / ratio)), how)


def cropped(image: Image.Image, settings: Preprocessing) -> Image.Image:
    """Return the center of the picture, with a border if the picture is smaller."""
    height, width = settings["input_size"][1:]
    if width > image.width or height > image.height:
        border = settings["crop_mode"] == "border"
        fill = tuple(round(255 * value) for value in np.broadcast_to(settings["mean"], 3)) if border else (0, 0, 0)
        padded = Image.new("RGB", (max(width, image.width), max(height, image.height)), fill)
        padded.paste(image, ((padded.width - image.width) // 2, (padded.height - image.height) // 2))
        image = padded
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
