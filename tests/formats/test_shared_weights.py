"""A run in fp64 without a second set of weights: the answers of a copy in fp64, and the network stays as it is."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from build_tasks.formats.fp32_comparison import _forward_in_fp64
from build_tasks.formats.shared_weights import copy_with_same_weights, layers_in_fp64


class Tied(nn.Module):
    """Two layers with one weight, which the network itself uses, too; and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.rand(6))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.second(self.first(values)) @ self.first.weight * self.scale
        return answer


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 4, batch_first=True, bidirectional=True)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.lstm(values[:, None])[0]
        return answer


class Keeping(nn.Module):
    """It keeps a table that it has computed with its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.table: torch.Tensor | None = None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.table = self.layer(torch.ones(1, 6))
        answer: torch.Tensor = self.layer(values) + self.table
        return answer


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), 2, enable_nested_tensor=False)


NETWORKS: dict[str, Any] = {
    "tied": Tied,
    "recurrent": Recurrent,
    "keeping": Keeping,
    "attention": lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), encoder()),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4)),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))),
    "scripted layer": lambda: nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 3))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fp64_without_a_copy_of_the_weights(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    for parameter in network.parameters():
        parameter.requires_grad = False
    inputs = torch.randn(3, 6)
    before = network(inputs)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    found = _forward_in_fp64(network, [inputs])
    assert found is not None
    expected = copy.deepcopy(network).double()(inputs.double()) if name != "keeping" else None
    if expected is not None:
        torch.testing.assert_close(torch.from_numpy(found[0]), expected, rtol=1e-14, atol=1e-14)
    assert {key: value.dtype for key, value in network.state_dict().items()} == {k: v.dtype for k, v in weights.items()}
    assert all(value.equal(weights[key]) for key, value in network.state_dict().items())
    assert network(inputs).equal(before)


def test_a_failure_in_fp64_leaves_the_weights_as_they_were() -> None:
    class Failing(Tied):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    network = nn.Sequential(nn.Linear(6, 6), Failing())
    with pytest.raises(RuntimeError, match="no"), layers_in_fp64(network):
        network(torch.ones(1, 6).double())
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    assert network[0](torch.ones(1, 6)).dtype == torch.float32


def test_a_copy_has_the_same_weights_and_its_own_layers() -> None:
    network = Tied()
    duplicate = copy_with_same_weights(network)
    assert {id(tensor) for tensor in duplicate.state_dict(keep_vars=True).values()} == {
        id(tensor) for tensor in network.state_dict(keep_vars=True).values()
    }
    duplicate.first = nn.Identity()
    assert isinstance(network.first, nn.Linear)
