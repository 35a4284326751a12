"""Pictures of other channels: gray, BGR, alpha, several files; letterbox, and pixels from 0 to 255."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from polygraphy.json import load_json
from safetensors.torch import save_file
from tests.support.project import ROOT, Project, failure_line
from torch import nn

from build_tasks.formats import picture_transform, pytorch_network
from build_tasks.spec.picture_keys import CHANNELS
from build_tasks.triton.preprocess_model.preprocessing import MODES, decode_all, preprocess

PHOTOGRAPHS = ROOT / "build_tasks/verification/photographs"
PICTURES = [PHOTOGRAPHS / f"{name}.jpg" for name in ("chelsea", "coffee", "rocket", "camera")]
WIDE = str(PICTURES[0])

CASES: dict[str, dict[str, Any]] = {
    "gray": {"shape": [1, 28, 28]},
    "gray, bytes, letterbox": {"shape": [1, 40, 60], "format": "uint8_nhwc", "crop_mode": "letterbox"},
    "bgr, border in its mean": {"shape": [3, 64, 48], "color": "bgr", "crop_mode": "border", "mean": [0.1, 0.4, 0.9]},
    "bgr, letterbox": {"shape": [3, 64, 64], "color": "bgr", "crop_mode": "letterbox", "scale": 255, "fill": 7},
    "mean of pixels up to 255": {"shape": [3, 64, 64], "scale": 255, "mean": [104, 117, 123], "crop_mode": "border"},
    "rgba": {"shape": [4, 64, 64], "mean": [0.1, 0.2, 0.3, 0.4], "std": [0.5]},
    "bgra, bytes": {"shape": [4, 64, 48], "color": "bgra", "format": "uint8_nhwc", "crop_mode": "squash"},
    "two files": {"shape": [4, 64, 48], "color": ["bgr", "gray"], "files": ["a", "b"], "crop_mode": "letterbox"},
    "five files": {"shape": [5, 32, 32], "files": [*"abcde"], "mean": [0.1, 0.2, 0.3, 0.4, 0.5], "crop_mode": "border"},
}


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES)
def test_the_published_preprocessing_is_that_of_the_samples_to_the_bit(keys: dict[str, Any]) -> None:
    keys = {"format": "fp32_nchw", **keys}
    config = picture_transform.data_config(nn.Identity(), keys)
    transform = picture_transform.transform(config, keys["format"])
    settings = json.loads(json.dumps({"format": keys["format"], **config}))
    for index in range(len(PICTURES)):
        sample = [str(PICTURES[(index + file) % len(PICTURES)]) for file in range(len(keys.get("files", "a")))]
        expected = transform(decode_all(sample, settings)).numpy()
        actual = preprocess(sample, settings)
        assert actual.dtype == expected.dtype
        assert np.array_equal(actual, expected)
        shape = keys["shape"] if keys["format"] == "fp32_nchw" else [*keys["shape"][1:], keys["shape"][0]]
        assert list(actual.shape) == shape


def prepared(**keys: Any) -> np.ndarray:
    """The first photograph that is not square, as the input of a network without a config of its own."""
    config = picture_transform.data_config(nn.Identity(), keys)
    return preprocess(WIDE, {"format": "fp32_nchw", **config})


def test_the_channels_and_pixels_are_those_that_the_keys_name() -> None:
    """Against Pillow alone, not against the transform."""
    with Image.open(WIDE) as image:
        squashed = {mode: np.asarray(image.convert(mode).resize((8, 8), 3)) for mode in ("RGB", "L")}
    plain: dict[str, Any] = {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bicubic", "scale": 255}
    bgr = prepared(shape=[3, 8, 8], color="bgr", **plain)
    assert np.array_equal(bgr, squashed["RGB"].transpose(2, 0, 1)[::-1])
    assert np.array_equal(prepared(shape=[1, 8, 8], **plain)[0], squashed["L"])
    gray = prepared(shape=[1, 8, 8], **{**plain, "scale": 1})
    assert np.allclose(gray[0], (squashed["L"] / 255 - 0.449) / 0.226, atol=1e-6)  # the averages of timm's mean and std
    assert MODES.keys() == CHANNELS.keys()


def test_a_letterbox_keeps_the_whole_picture_in_a_border() -> None:
    with Image.open(WIDE) as image:
        width, height = image.size
        inner = round(48 * height / width)
        resized = np.asarray(image.convert("L").resize((48, inner), 3))
    assert inner < 48
    top = (48 - inner) // 2
    for fill, value in ((None, 114), (0, 0)):
        boxed = prepared(shape=[1, 48, 48], scale=255, crop_mode="letterbox", fill=fill)[0]
        assert np.array_equal(boxed[top : top + inner], resized)
        assert {*boxed[:top].flat, *boxed[top + inner :].flat} == {value}
