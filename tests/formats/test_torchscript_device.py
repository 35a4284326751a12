"""Tensors that forward creates: in a trace they follow the device of the input, also on a machine without a GPU."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from build_tasks.formats import torchscript_device, torchscript_graph

pytestmark = pytest.mark.filterwarnings("ignore")  # tracing warns, and so do recurrent layers

RNNS = {
    "lstm": nn.LSTM(8, 8, batch_first=True),
    "two layers": nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True),
    "gru": nn.GRU(8, 8, batch_first=True),
    "rnn": nn.RNN(8, 8, batch_first=True),
    "lstm cell": nn.LSTMCell(8, 8),
    "gru cell": nn.GRUCell(8, 8),
    "attention": nn.MultiheadAttention(8, 2, batch_first=True),
    "encoder": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "embedding": nn.Embedding(64, 8),
}
for module in RNNS.values():
    module.requires_grad_(False)  # a trace cannot hold the weights of a module that is not part of the network


def in_place(size: int, operator: str) -> int:
    """Return size * 2, size + 2 and so on by an assignment, which is an operator that writes to a tensor in a trace."""
    return int(getattr(size, f"__i{operator}__", getattr(size, f"__{operator}__"))(2))


def with_ones(x: torch.Tensor) -> torch.Tensor:
    result = torch.zeros(x.size(0), 8)
    if x.size(0) > 1:
        result = result + torch.ones(8)
    return result


@functools.cache
def scripted() -> Any:
    return torch.jit.script(with_ones)  # not at import, where a warning of some versions of PyTorch would be an error


# What forward does with the features: `image` (batch, 8, 6, 6), `f` (batch, 36, 8), `pooled` (batch, 8), all on `at`.
# The trace of each fails on a GPU unless tensors follow the input.
IDIOMS = {
    "zeros": "pooled + torch.zeros(n, 8, device=at)",
    "ones": "pooled * torch.ones(n, 8, device=at)",
    "full": "pooled + torch.full((n, 8), 0.5, device=at)",
    "empty": "pooled + torch.empty(n, 8, device=at).fill_(1)",
    "default device": "pooled + torch.zeros(n, 8)",
    "zeros, moved": "pooled + torch.zeros(n, 8).to(x)",
    "joined": "torch.cat([pooled[:, :4], torch.zeros(n, 4, device=at)], 1)",
    "written into": "torch.zeros(n, 8, device=at).copy_(pooled) + pooled",
    "scattered": "pooled + torch.zeros(n, 8, device=at).scatter(1, torch.zeros(n, 1, device=at).long(), 1.0)",
    "arange": "(f * torch.arange(f.shape[1], device=at)[:, None]).mean(1) / 99",
    "sines": "(f + (torch.arange(f.shape[1], device=at)[:, None] * torch.arange(8, device=at).exp()).sin()).mean(1)",
    "linspace": "(image * torch.linspace(-1, 1, image.shape[3], device=at)).mean((2, 3))",
    "logspace": "(image * torch.logspace(0, -1, image.shape[3], device=at)).mean((2, 3))",
    "hann window": "(image * torch.hann_window(image.shape[3], device=at)).mean((2, 3))",
    "fftfreq": "(torch.fft.fft(image).abs() * torch.fft.fftfreq(image.shape[3], device=at)).mean((2, 3))",
    "tril": "(torch.tril(torch.ones(f.shape[1], f.shape[1], device=at)) @ f).mean(1) / 36",
    "triu": "((f @ f.mT + torch.full((f.shape[1], f.shape[1]), -9.0, device=at).triu(1)).softmax(2) @ f).mean(1)",
    "causal mask": "f.masked_fill(torch.ones(f.shape[:2], device=at).bool().triu(3)[..., None], 0).mean(1)",
    "where": "torch.where(torch.arange(f.shape[1], device=at)[:, None] % 2 == 0, f, torch.zeros(8, device=at)).mean(1)",
    "boolean index": "f[:, torch.arange(f.shape[1], device=at) % 2 == 0].mean(1)",
    "nonzero": "f[:, (torch.arange(f.shape[1], device=at) % 2 == 0).nonzero()[:, 0]].mean(1)",
    "index": "f[torch.arange(n, device=at), -1]",
    "one-hot": "pooled + nn.functional.one_hot(torch.arange(n, device=at) % 8, 8)",
    "eye": "pooled @ torch.eye(f.shape[2], device=at)",
    "cumulative sum": "(f * torch.ones(f.shape[:2], device=at).cumsum(1)[..., None]).mean(1) / 36",
    "meshgrid": "(image * torch.meshgrid(*2 * [torch.arange(image.shape[2], device=at)])[0]).mean((2, 3))",
    "affine grid": "nn.functional.grid_sample(image, nn.functional.affine_grid(torch.eye(2, 3, device=at)"
    ".repeat(n, 1, 1), list(image.shape), align_corners=False), align_corners=False).mean((2, 3))",
    "repeats": "f.repeat_interleave(torch.full((f.shape[1],), 2, device=at), 1).mean(1)",
    "buckets": "pooled + torch.bucketize(pooled, torch.linspace(-1, 1, image.shape[3], device=at))",
    "by way of the CPU": "pooled.cpu() * 2",
    "scripted function": "pooled + scripted()(x)",
    **{
        f"size {operator} in place": f"f[:, : 1 + in_place(f.shape[1], '{operator}') // 3].mean(1)"
        for operator in ("mul", "add", "sub", "floordiv", "mod")
    },
    "padding by a size": "nn.functional.pad(image, [0, image.shape[3] * 2 - 11]).mean((2, 3))",
    "size of sizes in place": "f[:, : in_place(in_place(f.shape[1], 'mul') - 1, 'floordiv')].mean(1)",
    "lstm": "inner(f)[0].mean(1)",
    "two layers": "inner(f)[0].mean(1)",
    "gru": "inner(f)[0].mean(1)",
    "rnn": "inner(f)[0].mean(1)",
    "lstm cell": "inner(f[:, 1], inner(f[:, 0]))[0]",
    "gru cell": "inner(f[:, 1], inner(f[:, 0]))",
    "attention": "inner(f, f, f, attn_mask=torch.ones(f.shape[1], f.shape[1], device=at).bool().triu(1))[0].mean(1)",
    "encoder": "inner(f, nn.Transformer.generate_square_subsequent_mask(f.shape[1], device=at)).mean(1)",
    "embedding": "(f + inner(torch.arange(f.shape[1], device=at))).mean(1)",
    "packed sequence": "nn.utils.rnn.pad_packed_sequence(RNNS['gru'](nn.utils.rnn.pack_padded_sequence("
    "f, torch.full((n,), 9), batch_first=True))[0], batch_first=True)[0].mean(1)",
    "packed sequence, lengths of the data": "nn.utils.rnn.pad_packed_sequence(RNNS['gru']("
    "nn.utils.rnn.pack_padded_sequence(f, (f.mean(2) < 99).sum(1).cpu(), batch_first=True, enforce_sorted=False)"
    ")[0], batch_first=True)[0].mean(1)",
    **{
        f"packed sequence, {title}": "nn.utils.rnn.pad_packed_sequence("
        f"RNNS['{rnn}'](nn.utils.rnn.pack_padded_sequence("
        f"f, {lengths}, batch_first=True))[0], batch_first=True, total_length={total})[0].mean(1)[:, :8]"
        for title, rnn, lengths, total in (
            ("of an lstm", "two layers", "torch.full((n,), 9)", None),
            ("of an rnn, filled up", "rnn", "torch.full((n,), 9)", "f.shape[1]"),
            ("with lengths on the device", "gru", "torch.full((n,), 9, device=at).cpu()", None),
            ("with sorted lengths", "lstm", "(f.mean(2) < 99).sum(1).sort(descending=True)[0].cpu()", "36"),
        )
    },
}

# These create no tensor on another device, and their graph must stay as it is.
PLAIN = {
    "nothing": "pooled",
    "zeros_like": "pooled + torch.zeros_like(pooled)",
    "new_zeros": "pooled + pooled.new_ones(n, 8)",
    "constant": "pooled * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])",
    "number": "pooled * torch.tensor(2.0)",
}


class Network(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.code = compile({**IDIOMS, **PLAIN}[name], name, "eval")
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = RNNS.get(name)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = self.conv(x)
        features = image.flatten(2).transpose(1, 2)
        values = {"image": image, "f": features, "pooled": features.mean(1), "n": x.shape[0], "at": x.device, "x": x}
        result: torch.Tensor = self.head(eval(self.code, globals(), {**values, "inner": self.inner}))
        return result


def trace(module: nn.Module, shape: tuple[int, ...]) -> Any:
    with torch.no_grad():
        return torch.jit.freeze(torch.jit.trace(module, torch.randn(2, *shape), check_trace=False))


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Network(name).eval().requires_grad_(False)


def error_on_meta(path: str) -> str | None:
    return torchscript_device.error_on_meta(torch.jit.load(path), [[torch.empty(1, 3, 6, 6)]])


def cpu_devices(module: Any) -> list[str]:
    """The operators of a graph that use a constant device, or join a size with a tensor that moves to a GPU."""
    found = []
    for node in torchscript_graph.all_nodes(module.graph):
        if node.kind() == "prim::Constant" and node.output().type().kind() == "DeviceObjType":
            found += [use.user.kind() for use in node.output().uses()]
        elif any(value.node().kind() == "prim::NumToTensor" for value in node.inputs()):
            found += [node.kind() for value in node.inputs() if torchscript_device.constant_number(value) is not None]
    return found


@pytest.mark.parametrize("name", IDIOMS)
def test_created_tensors_follow_the_input(name: str, tmp_path: Path) -> None:
    network, path = make(name), str(tmp_path / "model.pt")
    traced = trace(network, (3, 6, 6))
    torchscript_graph.save_torchscript(traced, str(tmp_path / "before.pt"))
    torchscript_device.follow_input(traced)
    assert not cpu_devices(traced)
    torchscript_graph.save_torchscript(traced, path)
    assert error_on_meta(path) is None
    loaded = torch.jit.load(path)
    for batch in (2, 1, 3, 3):
        image = torch.randn(batch, 3, 6, 6)
        torch.testing.assert_close(loaded(image), network(image))


def test_without_that_the_meta_device_refuses_most_of_them(tmp_path: Path) -> None:
    refused = {}
    for name in IDIOMS:
        path = str(tmp_path / f"{name}.pt")
        torchscript_graph.save_torchscript(trace(make(name), (3, 6, 6)), path)
        refused[name] = error_on_meta(path)
        assert not (refused[name] and torchscript_device.joins_one_device(torch.jit.load(path).graph)), name
    found = {name for name, message in refused.items() if message}
    assert {"zeros", "arange", "linspace", "full", "lstm", "gru", "rnn", "joined", "scripted function"} <= found
    assert len(found) > len(IDIOMS) / 2, refused


@pytest.mark.parametrize("name", PLAIN)
def test_a_graph_that_creates_nothing_is_left_as_it_is(name: str, tmp_path: Path) -> None:
    traced = trace(make(name), (3, 6, 6))
    before = str(traced.graph)
    torchscript_device.follow_input(traced)
    assert str(traced.graph) == before
    torchscript_graph.save_torchscript(traced, str(tmp_path / "model.pt"))
    assert error_on_meta(str(tmp_path / "model.pt")) is None


# Whether the graph proves that a run on the meta device finds nothing.
PROVEN = {
    "nothing": True,
    "constant": True,
    "padding by a size": True,  # `follow_input` has made the numbers beside it numbers of the CPU
    "number": False,  # it is on the CPU, and may be joined with every device
    "zeros_like": False,  # not in the list
    "zeros": False,
    "by way of the CPU": False,
    "scripted function": False,  # it has branches
}


@pytest.mark.parametrize("name", PROVEN)
def test_where_the_graph_proves_it_no_run_is_needed(name: str, tmp_path: Path) -> None:
    traced, path = trace(make(name), (3, 6, 6)), str(tmp_path / "model.pt")
    torchscript_device.follow_input(traced)
    torchscript_graph.save_torchscript(traced, path)
    assert torchscript_device.joins_one_device(torch.jit.load(path).graph) == PROVEN[name]


MIXED = {
    "size and input": "%out : Tensor = aten::mul(%size, %input)",
    "written": "%first : Tensor = aten::select(%input, %zero, %zero) %out : Tensor = aten::mul_(%first, %size)",
    "list": "%list : Tensor[] = prim::ListConstruct(%input, %size) %out : Tensor = aten::cat(%list, %zero)",
}


@pytest.mark.parametrize("name", MIXED)
def test_a_size_beside_the_input_is_not_proven(name: str) -> None:
    made = "%size : Tensor = prim::NumToTensor(%zero)"
    lines = ["graph(%input : Tensor):", "%zero : int = prim::Constant[value=0]()", made, *MIXED[name].split(" %")]
    text = "\n  ".join(line if line[0] in "g%" else f"%{line}" for line in lines)
    assert not torchscript_device.joins_one_device(torch._C.parse_ir(f"{text}\n  return (%out)"))


def timm_names() -> list[str]:
    import timm

    names = timm.list_models()
    return [names[index * len(names) // 80] for index in range(80)]


def timm_network(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    import timm

    with torch.device("meta"):
        parameters = sum(value.numel() for value in timm.create_model(name).parameters())
    if parameters > 150e6:
        pytest.skip(f"{parameters / 1e6:.0f} million parameters")
    network = timm.create_model(name, exportable=True).eval().requires_grad_(False)
    return network, timm.data.resolve_data_config(model=network)["input_size"]


@pytest.mark.parametrize(
    "name", ["edgenext_xx_small", *(pytest.param(name, marks=pytest.mark.long) for name in timm_names())]
)
def test_networks_of_timm_follow_the_input(name: str, tmp_path: Path) -> None:
    network, shape = timm_network(name)
    traced, path = trace(network, shape), str(tmp_path / "model.pt")
    torchscript_device.follow_input(traced)
    assert not cpu_devices(traced)
    torchscript_graph.save_torchscript(traced, path)
    assert torchscript_device.device_error(path, [[torch.empty(1, *shape)]]) is None
    images = torch.randn(1, *shape)
    torch.testing.assert_close(torch.jit.load(path)(images), network(images), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="lacks an NVIDIA GPU")
@pytest.mark.parametrize("name", [*IDIOMS, *PLAIN])
def test_on_a_gpu_the_answers_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    network, path = make(name), str(tmp_path / "model.pt")
    traced = trace(network, (3, 6, 6))
    torchscript_device.follow_input(traced)
    torchscript_graph.save_torchscript(traced, path)
    loaded = torch.jit.load(path, map_location="cuda")
    for batch in (2, 1, 3, 3):
        image = torch.randn(batch, 3, 6, 6)
        torch.testing.assert_close(loaded(image.cuda()).cpu(), network(image), rtol=1e-3, atol=1e-3)
