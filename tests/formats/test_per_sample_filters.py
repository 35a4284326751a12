"""Convolutions with filters of their own for each sample: the batch is the number of groups."""

import json
from typing import Any

import pytest
import torch
from torch.nn import functional

from build_tasks.formats import per_sample_filters
from tests.support import tiny_network
from tests.support.project import Project

# Ways to write such a layer. x has the shape (batch, 5, 14, 14), and each sample weighs its filters by its own means.
FILTERS = "b = x.shape[0]; means = x.mean((2, 3)); "
LAYERS = {
    "modulated": "w = means.reshape(b, 1, 5, 1, 1) * self.conv.weight.repeat(1, 2, 1, 1)[:, :5]; "
    "x = torch.conv2d(x.reshape(1, -1, 14, 14), w.reshape(-1, 5, 3, 3), padding=1, groups=b).reshape(b, 5, 14, 14)",
    "depthwise": "w = means.reshape(-1, 1, 1, 1) * self.conv.weight[:1, :1]; "
    "x = nn.functional.conv2d(x.reshape(1, b * 5, 14, 14), w, means.flatten(), 2, groups=5 * b).reshape(b, 5, 6, 6)",
    "sequence": "w = means.reshape(b, 1, 5, 1) * torch.ones(4, 5, 3); "
    "x = torch.conv1d(x.reshape(1, 5 * b, 196), w.reshape(-1, 5, 3), padding='same', groups=b).reshape(b, 4, 14, 14); "
    "x = torch.cat([x, x[:, :1]], 1)",
}


@pytest.mark.parametrize("layer", LAYERS)
def test_both_formats_serve_every_batch(project: Project, layer: str) -> None:
    tiny_network.add(project, "own", body=FILTERS + LAYERS[layer], formats='"torchscript", "onnx"')
    run = project.built("onnx:own")
    lines = {line.split()[1]: line for line in run.out.splitlines() if line.startswith("✓")}
    assert "batches: 1, 2, 3" in lines["torchscript"]
    assert "exporter: torchscript, first choice" in lines["onnx"]
    assert "device_error" not in json.loads((project / "build/own/model.pt.signature.json").read_text())


def test_a_network_with_usual_convolutions_keeps_its_graph() -> None:
    images, filters = torch.randn(2, 6, 9, 9), torch.randn(6, 3, 3, 3)
    mode = per_sample_filters.PerSampleFilters()
    with mode:
        functional.conv2d(images, filters, groups=2)
        functional.conv2d(images[:1, :3], filters)
    assert not mode.found
    with mode:
        functional.conv2d(images.reshape(1, 12, 9, 9), torch.randn(8, 3, 3, 3), groups=4)
    assert mode.found


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
        {"padding": "same", "dilation": 3},
        {"padding": "valid", "bias": None},
    ],
)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_product_is_the_convolution(options: dict[str, Any], groups: int) -> None:
    torch.manual_seed(1)
    image, filters = torch.randn(2, 12, 11, 13), torch.randn(18, 12 // groups, 3, 4)
    options = {"bias": torch.randn(18), **options, "groups": groups}
    expected = functional.conv2d(image, filters, **options)
    torch.testing.assert_close(per_sample_filters.conv2d(image, filters, **options), expected, atol=1e-4, rtol=1e-4)
    first = {name: value[-1] if isinstance(value, tuple) else value for name, value in options.items()}
    expected = functional.conv1d(image[:, :, 0], filters[:, :, 0], **first)
    answer = per_sample_filters.conv1d(image[:, :, 0], filters[:, :, 0], **first)
    torch.testing.assert_close(answer, expected, atol=1e-4, rtol=1e-4)
