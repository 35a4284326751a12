"""From a picture to a model's input, as timm's transform for evaluation does it. Needs NumPy and Pillow, nothing else.

It is published as it stands: beside the client examples, and as a part of the Python model of an ensemble. What it
does is written in preprocessing.json, beside it.

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
    """The settings in a folder's preprocessing.json."""
    settings: Preprocessing = json.loads((pathlib.Path(folder) / "preprocessing.json").read_text(encoding="utf-8"))
    return settings


def preprocess(picture: bytes | str, settings: Preprocessing) -> np.ndarray:
    """A JPEG or PNG, its bytes or its path -> float32 (channels, height, width), or uint8 (height, width, channels).

    Which of the two is the model's input.format. ValueError for what is no picture.
    """
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            pixels = np.asarray(cropped(resized(image.convert("RGB"), settings), settings))
    except Exception as error:  # of Pillow, of zlib, of struct: whatever a foreign file brings about
        raise ValueError(f"not a picture: {error}") from error
    if settings["format"] == "uint8_nhwc":
        return pixels
    mean, std = (np.array(settings[key], np.float32) for key in ("mean", "std"))
    normalised: np.ndarray = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def resized(image: Image.Image, settings: Preprocessing) -> Image.Image:
    """The picture at the size from which the middle is taken: crop_pct of it will be left, by its crop_mode."""
    height, width = (math.floor(length / settings["crop_pct"]) for length in settings["input_size"][1:])
    how = Image.Resampling[settings["interpolation"].upper()]
    if settings["crop_mode"] == "squash":
        return image.resize((width, height), how)
    if settings["crop_mode"] != "border" and height == width:  # torchvision's own rule, which rounds down
        short = min(image.size)
        return image.resize((height * image.width // short, height * image.height // short), how)
    ratios = image.height / height, image.width / width
    ratio = max(ratios) if settings["crop_mode"] == "border" else min(ratios)
    return image.resize((round(image.width / ratio), round(image.height / ratio)), how)


def cropped(image: Image.Image, settings: Preprocessing) -> Image.Image:
    """The middle of the picture; with a border around it where it is smaller."""
    height, width = settings["input_size"][1:]
    if width > image.width or height > image.height:
        border = settings["crop_mode"] == "border"
        fill = tuple(round(255 * value) for value in np.broadcast_to(settings["mean"], 3)) if border else (0, 0, 0)
        padded = Image.new("RGB", (max(width, image.width), max(height, image.height)), fill)
        padded.paste(image, ((padded.width - image.width) // 2, (padded.height - image.height) // 2))
        image = padded
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
