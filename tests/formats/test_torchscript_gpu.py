"""Rewrites of a cast graph for a GPU, with the emulation of their operators on a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from build_tasks.formats import torchscript_gpu, torchscript_graph

Forward = Callable[[Any, Tensor], Tensor]
SIZE = 24

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


class Network(nn.Module):
    """All layers that a case can use; `forward` is the case."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.strided = nn.Conv2d(16, 16, 3, stride=2, padding=1, dilation=1)
        self.dilated = nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.point = nn.Conv2d(16, 16, 1)
        self.plain_point = nn.Conv2d(16, 8, 1, bias=False)
        self.large_point = nn.Conv2d(16, 512, 1)
        self.skip = nn.Conv2d(16, 16, 1, stride=2)
        self.squeeze = nn.Conv2d(16, 4, 1)
        self.excite = nn.Conv2d(4, 16, 1)
        self.grid = nn.Parameter(torch.randn(1, 16, 1, 1).expand(1, 16, SIZE, SIZE).clone())
        self.case = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.case(self, x)


def gate(n: Any, x: Tensor) -> Tensor:
    gated: Tensor = x * torch.sigmoid(n.excite(torch.relu(n.squeeze(x.mean((2, 3), keepdim=True)))))
    return gated


# The forward of each network, and how often each rewrite fits, in the order of REWRITES.
CASES: dict[str, tuple[Forward, tuple[int, int, int]]] = {
    "ReLU": (lambda n, x: torch.relu(n.wide(torch.relu(n.stem(x)))), (0, 2, 0)),
    "ReLU in place": (lambda n, x: n.wide(n.stem(x).relu_()).relu_(), (0, 2, 0)),
    "ReLU of a stride": (lambda n, x: torch.relu(n.strided(torch.relu(n.stem(x)))), (0, 2, 0)),
    "ReLU without a bias": (lambda n, x: torch.relu(n.dilated(torch.relu(n.stem(x)))), (0, 2, 0)),
    "residual": (lambda n, x: torch.relu(n.wide(y := torch.relu(n.stem(x))) + y), (0, 2, 0)),
    "residual in place": (lambda n, x: n.wide(y := torch.relu(n.stem(x))).add_(y).relu_(), (0, 2, 0)),
    "residual first": (lambda n, x: torch.relu((y := torch.relu(n.stem(x))) + n.wide(y)), (0, 2, 0)),
    "residual of two convolutions": (lambda n, x: torch.relu(n.wide(y := n.stem(x)) + n.dilated(y)), (0, 1, 0)),
    "twice a convolution": (lambda n, x: torch.relu((y := n.stem(x)) + y), (0, 0, 0)),
    "residual, scaled": (lambda n, x: torch.relu(torch.add(n.wide(y := n.stem(x)), y, alpha=2)), (0, 0, 0)),
    "residual, broadcast": (
        lambda n, x: torch.relu(n.wide(y := torch.relu(n.stem(x))) + y.mean((2, 3), keepdim=True)),
        (0, 1, 0),
    ),
    "a number in place of a residual": (lambda n, x: torch.relu(n.stem(x) + x.shape[3]), (0, 0, 0)),
    "residual for all images": (lambda n, x: torch.relu(n.wide(torch.relu(n.stem(x))) + n.grid), (0, 1, 0)),
    "groups": (lambda n, x: torch.relu(n.grouped(torch.relu(n.stem(x)))), (0, 1, 0)),
    "two users": (lambda n, x: torch.relu(y := n.stem(x)) + y, (0, 0, 0)),
    "transposed": (lambda n, x: torch.relu(n.up(torch.relu(n.stem(x)))), (0, 1, 0)),
    "1 x 1": (lambda n, x: n.plain_point(n.point(torch.sin(n.stem(x)))), (0, 0, 2)),
    "1 x 1 with a stride": (lambda n, x: n.skip(torch.sin(n.stem(x))), (0, 0, 0)),
    "squeeze and excite": (lambda n, x: n.plain_point(gate(n, torch.sin(n.stem(x)))), (1, 1, 0)),
    "squeeze and excite, with a bias": (lambda n, x: n.point(gate(n, torch.sin(n.stem(x)))), (1, 1, 0)),
    "many filters": (lambda n, x: n.large_point(gate(n, torch.sin(n.stem(x)))), (0, 1, 1)),
    "SiLU": (lambda n, x: nn.functional.silu(n.grouped(nn.functional.silu(n.stem(x), inplace=True))), (0, 0, 0)),
}


class Built(NamedTuple):
    """A network, its cast file, the rewritten one, and how often each rewrite was applied."""

    network: nn.Module
    cast: str
    rewritten: str
    counts: dict[str, int]


def build(forward: Forward, folder: Path) -> Built:
    network = Network(forward).eval()
    exact, cast, rewritten = (str(folder / name / "model.pt") for name in ("exact", "cast", "rewritten"))
    for path in (exact, cast, rewritten):
        Path(path).parent.mkdir()
    with torch.no_grad():
        trace = torch.jit.freeze(torch.jit.trace(network, torch.randn(2, 3, SIZE, SIZE), check_trace=False))
    torchscript_graph.save_torchscript(trace, exact)
    torchscript_graph.save_torchscript(torchscript_graph.cast_trace(exact, "fp16", "channels_last"), cast)
    module = torchscript_graph.cast_trace(exact, "fp16", "channels_last")
    counts = torchscript_gpu.rewrite_for_gpu(module, [torch.empty(2, 3, SIZE, SIZE)])
    torchscript_graph.save_torchscript(module, rewritten)
    return Built(network, cast, rewritten, counts)


def relative_error(answer: Tensor, exact: Tensor) -> float:
    return float((answer - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", CASES)
def test_a_rewrite_fits_and_keeps_the_answers(name: str, tmp_path: Path) -> None:
    forward, counts = CASES[name]
    built = build(forward, tmp_path)
    assert tuple(built.counts.values()) == counts
    sizes = (SIZE, SIZE, SIZE if name == "residual for all images" else 2 * SIZE)
    for batch, size in zip((1, 3, 5), sizes, strict=True):  # neither the batch nor the size is part of the graph
        images = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            exact = built.network(images)
        errors = []
        for path in (built.cast, built.rewritten):
            answer = torchscript_graph.run_with_gpu_rounding(torch.jit.load(path), images)
            assert (answer.dtype, answer.shape) == (torch.float32, exact.shape)
            errors.append(relative_error(answer, exact))
        assert errors[1] < 1.5 * errors[0] + 1e-4


def test_only_operators_of_cudnn_need_a_gpu(tmp_path: Path) -> None:
    built = build(CASES["ReLU"][0], tmp_path)
    assert torchscript_gpu.needs_gpu(torch.jit.load(built.rewritten))
    assert not torchscript_gpu.needs_gpu(torch.jit.load(built.cast))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_has_the_error_of_the_emulation(name: str, tmp_path: Path) -> None:
    built = build(CASES[name][0], tmp_path)
    images = torch.randn(8, 3, SIZE, SIZE)
    with torch.no_grad():
        exact = built.network(images)
        emulated = torchscript_graph.run_with_gpu_rounding(torch.jit.load(built.rewritten), images)
        module = torch.jit.load(built.rewritten, map_location="cuda")
        for _ in range(3):  # PyTorch optimizes a graph after its first runs
            found = module(images.cuda()).cpu()
    assert relative_error(found, exact) == pytest.approx(relative_error(emulated, exact), rel=0.2)
