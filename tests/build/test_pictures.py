"""Pictures of other channels: gray, BGR, alpha, several files; letterbox, and pixels from 0 to 255."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from polygraphy.json import load_json
from safetensors.torch import load_file, save_file
from torch import nn

from build_tasks.formats import picture_transform, pytorch_network
from build_tasks.formats.input_samples import picture_reader, picture_settings
from build_tasks.spec.picture_keys import CHANNELS
from build_tasks.triton.preprocess_model.preprocessing import MODES, decode_all, preprocess
from tests.support.project import ROOT, Project, failure_line

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


@pytest.mark.parametrize(
    ("dtype", "shape", "layout"),
    [("float32", [3, 24, 16], "nchw"), ("float32", [24, 16, 3], "nhwc"), ("float16", [1, 24, 16], "nchw"),
     ("float64", [24, 16, 4], "nhwc"), ("uint8", [24, 16, 3], "nhwc"), ("uint8", [3, 24, 16], "nchw"),
     ("uint8", [4, "height", 16], "nchw")],
)  # fmt: skip
def test_a_picture_among_several_inputs_is_that_of_the_samples_to_the_bit(
    dtype: str, shape: list[Any], layout: str
) -> None:
    table = {"name": "image", "dtype": dtype, "shape": shape, "layout": layout}
    interface: Any = {"inputs": [table], "dimensions": {"height": {"min": 8, "opt": 24, "max": 32}}}
    (settings,) = picture_settings(nn.Identity(), interface, [{"crop_mode": "letterbox"}]).values()
    expected = picture_reader(settings)([WIDE])
    actual = preprocess(WIDE, json.loads(json.dumps(settings)))
    assert actual.dtype == expected.dtype == dtype
    assert np.array_equal(actual, expected)
    assert list(actual.shape) == [24 if dim == "height" else dim for dim in shape]


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


@pytest.mark.parametrize(("channels", "mean"), [(1, [0.449]), (2, [0.449] * 2), (3, [0.485, 0.456, 0.406])])
def test_a_network_of_timm_has_the_channels_of_its_argument(channels: int, mean: list[float]) -> None:
    architecture = {"timm": "test_efficientnet", "network": None, "arguments": {"in_chans": channels}}
    network = pytorch_network.create_network({"model": "m", "architecture": architecture})
    config = picture_transform.data_config(network, {})
    assert config["input_size"] == (channels, 160, 160)
    assert list(config["mean"]) == mean
    assert config.get("color") == {1: ["gray"], 2: []}.get(channels)


NETWORK = """\
from torch import nn


def build(channels):
    return nn.Sequential(nn.Conv2d(channels, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
"""
SPEC = """\
formats = [{formats}]
max_batch_size = 3
ensemble = "{ensemble}"
[architecture]
network = "network.py:build"
arguments = {{ channels = {channels} }}
[weights]
source = "weights.safetensors"
[input]
shape = [{channels}, 24, 20]
{keys}
[accuracy]
{accuracy}
"""


def add(project: Project, name: str, channels: int, keys: str = "", accuracy: str = "", ensemble: str = "onnx") -> Path:
    """Add a model with a small network for this number of channels, and return its folder."""
    formats = f'"{ensemble}"'
    text = SPEC.format(formats=formats, ensemble=ensemble, channels=channels, keys=keys, accuracy=accuracy)
    folder = project.model(name, text, network_py=NETWORK)
    torch.manual_seed(0)
    layers = nn.ModuleDict({"0": nn.Conv2d(channels, 5, 3), "3": nn.Linear(5, 4)})
    save_file(layers.state_dict(), folder / "weights.safetensors")
    return folder


def add_bands(folder: Path) -> None:
    """Put four samples of two files each into the folder of a model: a photograph, and another one in gray."""
    (folder / "bands").mkdir()
    for index, (color, infrared) in enumerate(zip(PICTURES, reversed(PICTURES), strict=True)):
        with Image.open(color) as image:
            image.resize((60, 40)).save(folder / f"bands/{index}_rgb.png")
        with Image.open(infrared) as image:
            image.convert("L").resize((60, 40)).save(folder / f"bands/{index}_nir.png")


BANDS = 'files = ["_rgb.png", "_nir.png"]\ncolor = ["rgb", "gray"]'


def test_the_whole_chain_takes_them(project: Project) -> None:
    """From the samples to the ensemble: gray digits, a detector's input, two files of a sample."""
    add(project, "gray", 1)
    boxes = 'format = "uint8_nhwc"\ncolor = "bgr"\nscale = 255\ncrop_mode = "letterbox"'
    add(project, "boxes", 3, boxes, ensemble="torchscript")
    add_bands(add(project, "bands", 4, BANDS, 'samples = "bands"\nallow_untestable = true'))
    project.built()
    for name, shape, images in (
        ("gray", [7, 1, 24, 20], 1),
        ("boxes", [7, 24, 20, 3], 1),
        ("bands", [4, 4, 24, 20], 2),
    ):
        (samples,) = load_json(project / f"build/{name}/samples.json")
        assert list(samples["INPUT__0"].shape) == shape
        config = (project / f"model_repository/{name}_ensemble/config.pbtxt").read_text()
        assert f'name: "IMAGE"\n  data_type: TYPE_STRING\n  dims: {images}\n' in config
    steps = json.loads((project / "model_repository/boxes/preprocessing.json").read_text())
    assert [steps[key] for key in ("color", "scale", "fill", "mean")] == [["bgr"], 255, 114, [0.0] * 3]
    pixels = torch.from_numpy(load_json(project / "build/boxes/samples.json")[0]["INPUT__0"])
    script = torch.jit.load(project / "build/boxes/model.pt")
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    network.load_state_dict(load_file(project / "build/boxes/weights.safetensors"))
    expected = network(pixels.permute(0, 3, 1, 2).float())  # as they are, from 0 to 255
    assert torch.allclose(script(pixels), expected, rtol=1e-4)
    client = (project / "build/bands/clients/bands_onnx/http_client.py").read_text()
    assert "python http_client.py image_rgb.png image_nir.png ..." in client


def test_a_sample_without_one_of_its_files_is_named(project: Project) -> None:
    folder = add(project, "bands", 4, BANDS, 'samples = "bands"')
    add_bands(folder)
    (folder / "bands/1_nir.png").rename(folder / "bands/1_nit.png")
    run = project.doit("reference:bands")
    assert run.code == 1
    path = "models/bands/bands/1_nit.png"
    line = f"{path}: expected a name that ends in one of input.files, _rgb.png, _nir.png"
    assert line in failure_line(run, "reference:bands")
    (folder / "bands/1_nit.png").unlink()
    line = "bands/bands/1_nir.png does not exist, and input.files needs it beside models/bands/bands/1_rgb.png"
    assert line in failure_line(project.doit("reference:bands"), "reference:bands")
