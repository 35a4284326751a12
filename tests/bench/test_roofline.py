"""The FLOPs and bytes that `benchmarks/serving.py --roofline` counts for a network."""

import sys

import pytest
import torch

from tests.support.project import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from roofline import Ceilings, count_operators, images_per_second  # benchmarks/ is no package


class Attention(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = images.flatten(2)  # (batch, 3, 256)
        return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


NETWORKS = {
    # 16 x 16 pixels, 3 to 8 channels, 3 x 3 filters; the activation is free
    "convolution": (
        torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False, device="meta"), torch.nn.SiLU()),
        [(2 * 2 * 256 * 8 * 27, 2 * 256 * (3 + 8) + 8 * 27)],
    ),
    "product": (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10, bias=False, device="meta")),
        [(2 * 2 * 768 * 10, 2 * (768 + 10) + 7680)],
    ),
    "pooling": (torch.nn.AdaptiveAvgPool2d(1), [(0, 2 * 3 * (256 + 1))]),
    # Three tokens of 256 values; their 3 x 3 scores stay in the kernel
    "attention": (Attention(), [(2 * 2 * 3 * 3 * (256 + 256), 4 * 2 * 3 * 256)]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_operators_are_counted_by_their_formula(name: str) -> None:
    network, expected = NETWORKS[name]
    assert count_operators(network, (3, 16, 16), 2) == expected


def test_each_operator_takes_the_longer_of_its_two_times() -> None:
    operators = count_operators(NETWORKS["convolution"][0], (3, 16, 16), 2)
    [(flops, values)] = operators
    assert images_per_second(operators, 2, Ceilings(1e9, 1e30), 4) == pytest.approx(2 / (flops / 1e9))
    assert images_per_second(operators, 2, Ceilings(1e30, 1e9), 4) == pytest.approx(2 / (values * 4 / 1e9))
    assert images_per_second(operators * 2, 2, Ceilings(1e9, 1e30), 4) == pytest.approx(1 / (flops / 1e9))
