"""Checkpoints as people have them: which tensors are taken, dropped or converted, and what a refusal says."""

import argparse
import collections
import datetime
import decimal
import functools
import gzip
import json
import pathlib
import pickle
import re
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from build_tasks.errors import UserError
from build_tasks.formats import checkpoints, state_dicts

State = dict[str, torch.Tensor]


class Tied(nn.Module):
    """A network in which two layers share a weight."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.encoder = nn.Linear(8, 8, bias=False)
        self.decoder = nn.Linear(8, 8, bias=False)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(8, classes)


def network(**arguments: Any) -> nn.Module:
    module: nn.Module = timm.create_model("test_efficientnet", **arguments)
    return module


def state_of(module: nn.Module) -> State:
    return dict(module.state_dict())


def fit(
    content: Any, module: nn.Module, folder: Path, prefix: str | None = None, ema: bool = False
) -> tuple[State, dict[str, Any]]:
    """What the stage `weights` takes from a checkpoint that torch.save writes."""
    torch.save(content, folder / "net.pth")
    return fit_file(folder / "net.pth", module, prefix, ema)


def fit_file(
    path: Path, module: nn.Module, prefix: str | None = None, ema: bool = False
) -> tuple[State, dict[str, Any]]:
    checkpoint = checkpoints.read_checkpoint(str(path))
    state, notes = state_dicts.fit(checkpoint, module, path.name, prefix, str(path), ema)
    return state_dicts.match_keys(state, state_of(module), path.name), notes


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def counted(state: State) -> State:
    return {**state, "conv_stem.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}


def averaged(state: State) -> State:
    return {"n_averaged": torch.tensor(3), **prefixed("module.", state)}


def arrays(state: State) -> dict[str, Any]:
    return {key: tensor.numpy() for key, tensor in state.items()}


def other(state: State) -> State:
    return {key: tensor + 1 for key, tensor in state.items()}


TAKEN: dict[str, tuple[Callable[[State], Any], dict[str, Any]]] = {
    "plain": (lambda s: s, {}),
    "state_dict": (lambda s: {"epoch": 1, "state_dict": s, "optimizer": {"state": {}}}, {"taken from": "state_dict"}),
    "only the average fits": (
        lambda s: {"state_dict": {"x": s["bn1.bias"]}, "state_dict_ema": s},
        {"taken from": "state_dict_ema, an average (EMA)"},
    ),
    "an average beside": (
        lambda s: {"model": s, "model_ema": other(s)},
        {"taken from": "model", "left": "model_ema, an average (weights.ema = true takes it)"},
    ),
    "an average over steps beside": (
        lambda s: {"model": s, "swa_model": other(s)},
        {"taken from": "model", "left": "swa_model, an average (weights.ema = true takes it)"},
    ),
    "only the average over steps": (lambda s: {"avg_model": s}, {"taken from": "avg_model, an average"}),
    "others that fit": (
        lambda s: {"state_dict": s, "model": other(s), "best": other(s), "model_ema": other(s)},
        {
            "taken from": "state_dict",
            "left": "model, best, which would fit too; model_ema, an average (weights.ema = true takes it)",
        },
    ),
    "model_state_dict": (lambda s: {"model_state_dict": s}, {"taken from": "model_state_dict"}),
    "net": (lambda s: {"net": s, "acc": 91.2}, {"taken from": "net"}),
    "params_ema beside params": (
        lambda s: {"params": s, "params_ema": other(s)},
        {"taken from": "params", "left": "params_ema, an average (weights.ema = true takes it)"},
    ),
    "two levels": (lambda s: {"trainer": {"weights": s}}, {"taken from": "trainer.weights"}),
    "wrappers": (
        lambda s: {"model": prefixed("_orig_mod.module.", s)},
        {"taken from": "model", "removed": "_orig_mod.module. before 88 of 88 names"},
    ),
    "one wrapped name": (
        lambda s: {("module." if key == "bn1.bias" else "") + key: tensor for key, tensor in s.items()},
        {"removed": "module. before 1 of 88 names"},
    ),
    "a number beside the tensors": (lambda s: {**s, "epoch": 3}, {}),
    "plain objects": (
        lambda s: {
            "state_dict": s,
            "args": argparse.Namespace(lr=1),
            "best": [np.float64(0.3), np.int8(3)],
            "rng": np.random.RandomState(0).get_state(),
        },
        {"taken from": "state_dict"},
    ),
    "profiler": (counted, {"dropped": "2 of a profiler or an average, such as conv_stem.total_ops"}),
    "other plain objects": (
        lambda s: {
            "state_dict": collections.defaultdict(list, s),
            "torch_version": torch.__version__,
            "at": {datetime.date(2026, 1, 1): datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)},
            "history": collections.deque([1, 2], maxlen=3),
            "steps": [range(10**12), slice(3), frozenset({1}), decimal.Decimal("1e999999999")],
            "paths": [Path("a"), pathlib.PureWindowsPath("a")],
            "config": types.SimpleNamespace(lr=1),
        },
        {"taken from": "state_dict"},
    ),
    "arrays of NumPy": (
        lambda s: {"net": arrays(s), "at": np.array("2026-01-01", "M8[D]"), "names": np.array(["cat", "dog"])},
        {"taken from": "net"},
    ),
    "an array beside the tensors": (lambda s: {**s, "class_means": np.ones(3)}, {}),
    "averaged model": (
        averaged,
        {
            "removed": "module. before 88 of 89 names",
            "dropped": "1 of a profiler or an average, such as n_averaged",
        },
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_fits_is_taken_and_said(tmp_path: Path, case: str) -> None:
    make, expected_notes = TAKEN[case]
    expected = state_of(network())
    found, notes = fit(make(expected), network(), tmp_path)
    assert_same(found, expected)
    assert notes == expected_notes


def test_an_average_is_taken_where_the_spec_asks_for_it(tmp_path: Path) -> None:
    state = state_of(network())
    found, notes = fit({"model": other(state), "model_ema": state}, network(), tmp_path, ema=True)
    assert_same(found, state)
    assert notes == {"taken from": "model_ema, an average (EMA)"}
    with pytest.raises(UserError, match=r"expected averaged weights, since weights\.ema = true, found none"):
        fit(state, network(), tmp_path, ema=True)


def broken(state: State) -> State:
    damaged = {key: tensor.clone() for key, tensor in state.items()}
    damaged["conv_stem.weight"][0] = torch.nan
    damaged["bn1.running_var"][1] = torch.inf
    return damaged


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "two dicts": (
        lambda: {"a": state_of(network()), "b": state_of(network())},
        "net.pth has 2 sets of weights that fit, a, b: choose one with weights.converter",
    ),
    "prefix": (
        lambda: prefixed("backbone.", state_of(network())),
        'which 88 of its 88 tensors have: set weights.prefix = "backbone."',
    ),
    "prefix beside others": (
        lambda: {"state_dict": {**prefixed("model.", state_of(network())), "loss.center": torch.zeros(3)}},
        'which 88 of its 89 tensors have: set weights.prefix = "model."',
    ),
    "two prefixes": (
        lambda: {
            "state_dict": prefixed("model.teacher.", state_of(network()))
            | prefixed("model.student.", state_of(network()))
        },
        "net.pth has 2 sets of weights that fit, each with a prefix: choose one, set weights.prefix = "
        '"model.teacher." or "model.student."',
    ),
    "a prefix, and one in an average": (
        lambda: {"swa": prefixed("ema.", state_of(network())), "net": prefixed("body.", state_of(network()))},
        'set weights.prefix = "body."',
    ),
    "a stem of another width": (
        lambda: state_of(network(num_classes=10)) | {"conv_stem.weight": torch.zeros(5, 3, 3, 3)},
        "conv_stem.weight [5, 3, 3, 3] instead of [24, 3, 3, 3]; set architecture.arguments.num_classes = 10",
    ),
    "ten classes": (
        lambda: state_of(network(num_classes=10)),
        "classifier.weight [10, 256] instead of [1000, 256]; set architecture.arguments.num_classes = 10",
    ),
    "gray": (lambda: state_of(network(in_chans=1)), "; set architecture.arguments.in_chans = 1"),
    "gray, ten classes": (
        lambda: state_of(network(in_chans=1, num_classes=10)),
        "; set architecture.arguments.num_classes = 10 and architecture.arguments.in_chans = 1",
    ),
    "no classifier": (lambda: state_of(network(num_classes=0)), "set architecture.arguments.num_classes = 0"),
    "not finite": (
        lambda: broken(state_of(network())),
        "net.pth has NaN or infinity in 2 tensors: conv_stem.weight, bn1.running_var; train it again",
    ),
    "a prefix, ten classes": (
        lambda: {"state_dict": prefixed("backbone.", state_of(network(num_classes=10)))},
        'set architecture.arguments.num_classes = 10; and set weights.prefix = "backbone."',
    ),
    "a counter and a head without their dimensions": (
        lambda: {
            key: tensor.reshape(-1)[0]
            if key == "classifier.weight"
            else tensor.reshape(1)
            if not tensor.ndim
            else tensor
            for key, tensor in state_of(network()).items()
        },
        "bn1.num_batches_tracked [1] instead of []",
    ),
    "a head without dimensions": (
        lambda: state_of(network()) | {"classifier.weight": torch.tensor(1.0)},
        "1 wrongly shaped: classifier.weight [] instead of [1000, 256]",
    ),
    "integers": (
        lambda: state_of(network()) | {"classifier.weight": torch.ones(1000, 256, dtype=torch.int32)},
        "classifier.weight is quantized (int32): save the weights in fp32",
    ),
    "weights in a list": (lambda: {"nets": [state_of(network())]}, "found no tensor with a name, at most 3 dicts deep"),
    "a list": (lambda: [1, 2], "expected a dict of tensors, found list; save the state_dict()"),
    "nothing": (
        lambda: {"epoch": 3},
        "net.pth: expected weights, found no tensor with a name, at most 3 dicts deep; its keys are epoch",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_the_cause_and_the_key(tmp_path: Path, case: str) -> None:
    make, line = REFUSED[case]
    with pytest.raises(UserError, match=re.escape(line)):
        fit(make(), network(), tmp_path)


def test_weights_prefix_chooses_tensors(tmp_path: Path) -> None:
    expected = state_of(network())
    both = {**prefixed("student.", expected), **prefixed("teacher.", broken(expected))}
    found, _ = fit(both, network(), tmp_path, "student.")
    assert_same(found, expected)
    with pytest.raises(
        UserError,
        match=r"found no tensor whose name begins with weights.prefix = 'net.'; they begin with student\., teacher\.$",
    ):
        fit(both, network(), tmp_path, "net.")
    for state in (expected, state_of(network(num_classes=10))):  # the whole prefix is offered, not the rest of it
        with pytest.raises(UserError, match=r'set weights\.prefix = "student\.body\."'):
            fit(prefixed("student.body.", state), network(), tmp_path, "student.")


def test_a_stem_without_other_channels_needs_no_argument(tmp_path: Path) -> None:
    state = state_of(network()) | {"conv_stem.weight": torch.zeros(5, 3, 3, 3)}
    with pytest.raises(UserError, match=r"\[5, 3, 3, 3\] instead of \[24, 3, 3, 3\]$"):
        fit(state, network(), tmp_path)


def test_a_value_that_the_dtype_does_not_have_is_named_as_that(tmp_path: Path) -> None:
    state = state_of(network())
    state |= {"bn1.bias": torch.full_like(state["bn1.bias"], 1e300, dtype=torch.float64)}
    with pytest.raises(UserError, match=r"has values too large for float32 in 1 tensors: bn1\.bias"):
        fit(state, network(), tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "module.backbone.", "backbone."])
def test_weights_prefix_may_contain_a_wrapper(tmp_path: Path, prefix: str) -> None:
    expected = state_of(network())
    before = "module.backbone." if "backbone" in prefix else prefix
    found, notes = fit(prefixed(before, expected) | {"loss": torch.ones(1)}, network(), tmp_path, prefix)
    assert_same(found, expected)
    assert notes["left out"] == f"1 without the prefix {prefix}, such as loss"


class Wrapped(nn.Module):
    """A network with layers of the names of wrappers."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.module = nn.Linear(3, classes)
        self.head = nn.Linear(3, 3)


@pytest.mark.parametrize("prefix", ["", "module.", "net.", "module.net."])
def test_a_layer_with_the_name_of_a_wrapper_is_no_wrapper(tmp_path: Path, prefix: str) -> None:
    expected = state_of(Wrapped())
    found, _ = fit(prefixed(prefix, expected), Wrapped(), tmp_path, "net." if "net" in prefix else None)
    assert_same(found, expected)
    with pytest.raises(UserError, match=r"2 wrongly shaped: module\.bias \[5\] instead of \[4\]"):
        fit(state_of(Wrapped(5)), Wrapped(), tmp_path)


class Lenient(nn.Module):
    """A network that takes any checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def normalized(new: bool) -> nn.Module:
    norm = torch.nn.utils.parametrizations.weight_norm if new else torch.nn.utils.weight_norm
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.Linear(4, 2))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_hooks_of_the_network_convert_checkpoints(tmp_path: Path) -> None:
    old, new = normalized(new=False), normalized(new=True)
    found, notes = fit({"net": state_of(old)}, new, tmp_path)
    assert notes == {"taken from": "net", "converted": "by the network"}
    reference = normalized(new=True)
    reference.load_state_dict(old.state_dict())
    assert_same(found, state_of(reference))
    with pytest.raises(UserError, match=r"2 missing: 0\.parametrizations\.weight\.original0"):
        fit(state_of(old) | {"0.weight_g": torch.ones(7, 1)}, new, tmp_path)


def test_a_network_that_takes_any_checkpoint_gets_no_random_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 missing: layer\.bias; 1 unexpected: x"):
        fit({"layer.weight": torch.ones(3, 3), "x": torch.ones(3)}, Lenient(), tmp_path)


def test_tied_weights_are_saved_once_and_restored(tmp_path: Path) -> None:
    tied = Tied()
    save_model(tied, str(tmp_path / "tied.safetensors"))
    found, _ = fit_file(tmp_path / "tied.safetensors", Tied())
    assert_same(found, state_of(tied))
    kept = {key: tensor for key, tensor in state_of(tied).items() if key != "encoder.weight"}
    found, _ = fit(kept, Tied(), tmp_path)
    assert_same(found, state_of(tied))


def test_a_head_of_a_network_of_ones_own_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"head of the file has 10 outputs, not 4: set architecture\.arguments"):
        fit(state_of(Tied(10)), Tied(4), tmp_path)


def old_swin(state: State) -> State:
    """The keys of the authors of Swin: another numbering, another name of the head, and buffers."""
    old = {
        re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key).replace(
            "head.fc.", "head."
        ): tensor
        for key, tensor in state.items()
    }
    return {**old, "layers.0.blocks.1.attn_mask": torch.zeros(4, 4)}


def old_convnext(state: State) -> State:
    """The keys of the authors of ConvNeXt."""
    old = {}
    for key, tensor in state.items():
        name = re.sub(r"stem\.(\d)", r"downsample_layers.0.\1", key)
        name = re.sub(r"stages\.(\d)\.blocks\.(\d+)", r"stages.\1.\2", name)
        name = re.sub(r"stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", name)
        name = re.sub(r"\.conv_dw\.", ".dwconv.", re.sub(r"\.mlp\.fc(\d)\.", r".pwconv\1.", name))
        old[name.replace("head.norm.", "norm.").replace("head.fc.", "head.")] = tensor
    return old


def test_timm_converts_checkpoints_of_the_authors(tmp_path: Path) -> None:
    for name, convert in (("swin_tiny_patch4_window7_224", old_swin), ("test_convnext", old_convnext)):
        module = timm.create_model(name)
        found, notes = fit({"model": convert(state_of(module))}, timm.create_model(name), tmp_path)
        assert_same(found, state_of(module))
        assert notes == {"taken from": "model", "converted": "by timm"}


def test_position_embeddings_of_another_size_are_resampled(tmp_path: Path) -> None:
    small: Any = timm.create_model("test_vit", img_size=96)
    found, notes = fit(state_of(small), timm.create_model("test_vit", img_size=160), tmp_path)
    assert notes == {"converted": "by timm, pos_embed resized from [1, 37, 64] to [1, 101, 64]"}
    assert found["pos_embed"].shape != small.pos_embed.shape
    assert torch.equal(found["head.weight"], small.head.weight)


def save_npz(path: Path, arrays: Any) -> None:
    np.savez(path, **arrays)


def test_the_arrays_of_an_npz_file_are_weights(tmp_path: Path) -> None:
    expected = state_of(network())
    save_npz(tmp_path / "net.npz", {key: tensor.numpy() for key, tensor in expected.items()})
    found, _ = fit_file(tmp_path / "net.npz", network())
    assert_same(found, expected)
    others = {"classes": np.array(["cat", "dog"]), "date": np.array("2026-01-01", "M8[D]")}
    big_endian = {
        key: tensor.numpy().astype(tensor.numpy().dtype.newbyteorder(">")) for key, tensor in expected.items()
    }
    save_npz(tmp_path / "others.npz", big_endian | others)
    found, _ = fit_file(tmp_path / "others.npz", network())
    assert_same(found, expected)
    np.savez(tmp_path / "pickled.npz", classifier=np.array([object()]))
    with pytest.raises(UserError, match="cannot be read as weights"):
        fit_file(tmp_path / "pickled.npz", network())


def jax_arrays(vit: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a ViT as its authors publish them."""
    arrays = {
        "cls": vit.cls_token,
        "embedding/kernel": vit.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": vit.patch_embed.proj.bias,
        "Transformer/posembed_input/pos_embedding": vit.pos_embed,
        "Transformer/encoder_norm/scale": vit.norm.weight,
        "Transformer/encoder_norm/bias": vit.norm.bias,
        "head/kernel": vit.head.weight.T,
        "head/bias": vit.head.bias,
    }
    for index, block in enumerate(vit.blocks):
        at, heads = f"Transformer/encoderblock_{index}", block.attn.num_heads
        attention, width = f"{at}/MultiHeadDotProductAttention_1", vit.embed_dim
        for name, weight, bias in zip(
            ("query", "key", "value"), block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True
        ):
            arrays[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = block.attn.proj.weight.T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = block.attn.proj.bias
        for number, norm in ((0, block.norm1), (2, block.norm2)):
            arrays |= {f"{at}/LayerNorm_{number}/scale": norm.weight, f"{at}/LayerNorm_{number}/bias": norm.bias}
        for number, layer in ((0, block.mlp.fc1), (1, block.mlp.fc2)):
            arrays[f"{at}/MlpBlock_3/Dense_{number}/kernel"] = layer.weight.T
            arrays[f"{at}/MlpBlock_3/Dense_{number}/bias"] = layer.bias
    return {name: tensor.detach().numpy() for name, tensor in arrays.items()}


def test_timm_reads_an_npz_file_of_jax(tmp_path: Path) -> None:
    create = functools.partial(timm.create_model, "vit_tiny_patch16_224", depth=2)
    vit = create()
    arrays = jax_arrays(vit)
    save_npz(tmp_path / "vit.npz", arrays)
    found, notes = fit_file(tmp_path / "vit.npz", create())
    assert_same(found, state_of(vit))
    assert notes == {"converted": "by timm"}
    save_npz(tmp_path / "headless.npz", {name: a for name, a in arrays.items() if not name.startswith("head")})
    with pytest.raises(UserError, match=r"2 missing: head\.bias, head\.weight"):
        fit_file(tmp_path / "headless.npz", create())


def test_an_index_names_only_files_beside_it(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for text in ('{"weight_map": {"a": "../other.safetensors"}}', '{"weight_map": {"a": "absent.safetensors"}}'):
        index.write_text(text)
        name = json.loads(text)["weight_map"]["a"]
        with pytest.raises(UserError, match=re.escape(f"lists {name!r}, which is not beside it")):
            fit_file(index, network())
    for text, reason in (
        ("[]", "expected an index of shards"),
        ('{"weight_map": {"a": 3}}', "expected an index of shards"),
        (f'{{"weight_map": {{"a": "{index.name}"}}}}', "which is an index and no shard"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=reason):
            fit_file(index, network())


def write_torch(content: Callable[[State], Any]) -> Callable[[Path, State], None]:
    return lambda path, state: torch.save(content(state), path)


def write_bytes(content: bytes) -> Callable[[Path, State], None]:
    return lambda path, state: (path.write_bytes(content), None)[1]


def quantized(state: State) -> dict[str, Any]:
    """The weights as torch.ao.quantization saves them."""
    return {
        key: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8) if value.is_floating_point() else value
        for key, value in state.items()
    }


def eight_bits(state: State) -> dict[str, Any]:
    """The weights as programs save them that keep a scale beside each weight."""
    integers = {key: value.to(torch.int8) if value.ndim > 1 else value for key, value in state.items()}
    return integers | {f"{key}_scale": torch.ones(1) for key, value in state.items() if value.ndim > 1}


def write_pickle(protocol: int, convert: Callable[[State], Any]) -> Callable[[Path, State], None]:
    return lambda path, state: (path.write_bytes(pickle.dumps(convert(state), protocol)), None)[1]


def write_zip(path: Path, state: State) -> None:
    torch.save(state, path.with_name("best.pth"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_name("best.pth"), "best.pth")


KEY = "conv_stem.weight"  # the first one of the network
NOT_WEIGHTS: dict[str, tuple[Callable[[Path, State], None], str]] = {
    "page.pth": (write_bytes(b"\n <!DOCTYPE HTML><title>Sign in</title>"), "it is a web page: download the file again"),
    "page.npz": (write_bytes(b"<html>404</html>"), "it is a web page: download the file again"),
    "denied.safetensors": (write_bytes(b'<?xml version="1.0"?><Error/>'), "it is an answer in XML"),
    "answer.bin": (write_bytes(b'{"error": "not found"}'), "it is text in JSON"),
    "empty.pth": (write_bytes(b""), "it is empty"),
    "empty.npz": (write_bytes(b""), "it is empty"),
    "packed.pth": (write_bytes(gzip.compress(b"weights")), "it is compressed by gzip: unpack it"),
    "archive.pth.tar": (write_bytes(bytes(257) + b"ustar\x0000"), "it is a tar archive: unpack it"),
    "keras.pth": (write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90)), "it is a file of HDF5, as Keras writes it"),
    "language.bin": (write_bytes(b"GGUF\x03\0\0\0" + bytes(90)), "it is a GGUF file"),
    "zeros.pth": (write_bytes(bytes(9000)), "it is a file that begins with zeros: copy or download it again"),
    "arrays.pkl": (write_pickle(4, arrays), "it is a pickle that torch.save did not write: if you trust it, load it"),
    "tensors.pth": (write_pickle(2, lambda s: s), "it is a pickle that torch.save did not write"),
    "network.pkl": (write_pickle(2, lambda s: network()), "wants the class timm.models.efficientnet.EfficientNet, and"),
    "old_arrays.pkl": (write_pickle(2, arrays), "it is a pickle that torch.save did not write"),
    "best.pth.zip": (write_zip, "it is a zip archive of best.pth: unpack it"),
    "jax.npz": (
        lambda path, s: np.savez(path, w=np.ones(3, "V2")),
        "found w of the type |V2; NumPy cannot",
    ),
    "text.pth": (write_bytes(b"hello\n"), "it is not a checkpoint"),
    "quantized.pth": (write_torch(quantized), f"{KEY} is quantized (qint8): save the weights in fp32"),
    "eight_bits.pth": (write_torch(eight_bits), f"{KEY} is quantized (int8): save the weights in fp32"),
    "complex.pth": (write_torch(lambda s: s | {KEY: s[KEY].to(torch.complex64)}), f"{KEY} has complex numbers"),
    "empty_meta.pth": (write_torch(lambda s: {k: v.to("meta") for k, v in s.items()}), f"{KEY} has no values"),
    "adapter_model.bin": (
        write_torch(lambda s: {f"base_model.model.head.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}),
        "it has adapters of LoRA, which only change the weights of another checkpoint: merge them into it",
    ),
    "kohya.bin": (write_torch(lambda s: {"lora_unet_x.lora_up.weight": torch.ones(2, 2)}), "adapters of LoRA"),
    "renamed.pth": (lambda path, s: save_file(s, path), "is a safetensors file: let its name end with .safetensors"),
    "LOUD.SAFETENSORS": (lambda path, s: save_file(s, path), "let its name end with .safetensors"),
    "renamed.safetensors": (write_torch(lambda s: s), "is a file that torch.save wrote: let its name end with .pth"),
    "old.safetensors": (
        lambda path, s: torch.save(s, path, _use_new_zipfile_serialization=False),
        "let its name end with .pth",
    ),
    "arrays.pth": (lambda path, s: np.savez(path.open("wb"), a=np.ones(3)), "let its name end with .npz"),
    "list.bin.index.json": (write_bytes(b'{"weight_map": []}'), "expected an index of shards"),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's, about quantized tensors
@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_the_kind_of_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    write, reason = NOT_WEIGHTS[name]
    write(tmp_path / name, state_of(network()))
    with pytest.raises(UserError, match=re.escape(reason)) as raised:
        fit_file(tmp_path / name, network())
    assert "\n" not in str(raised.value)


WEIGHTS: dict[str, Callable[[Path, State], None]] = {
    "model_best.pth.tar": write_torch(
        lambda state: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    ),
    "compiled.pt": write_torch(lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()}),
    "sparse.pth": write_torch(lambda state: state | {KEY: state[KEY].to_sparse()}),
    "doubled.pth": write_torch(lambda s: {k: v.double() if v.is_floating_point() else v for k, v in s.items()}),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("name", WEIGHTS)
def test_other_forms_of_the_same_weights_are_taken(tmp_path: Path, name: str) -> None:
    state = state_of(network())
    WEIGHTS[name](tmp_path / name, state)
    assert_same(fit_file(tmp_path / name, network())[0], state)


@pytest.mark.parametrize("length", [0x280, 0x380])
def test_the_length_of_a_header_is_no_mark_of_a_pickle(tmp_path: Path, length: int) -> None:
    """Its two lowest bytes may be those with which a pickle begins."""
    layer = nn.Linear(2, 2)
    save_file(state_of(layer), tmp_path / "net.safetensors", {"note": ""})
    header = int.from_bytes((tmp_path / "net.safetensors").read_bytes()[:8], "little")
    save_file(state_of(layer), tmp_path / "net.safetensors", {"note": "x" * (length - header)})
    assert (tmp_path / "net.safetensors").read_bytes()[:2] == bytes([0x80, length >> 8])
    assert_same(fit_file(tmp_path / "net.safetensors", nn.Linear(2, 2))[0], state_of(layer))


def test_shards_that_torch_save_wrote_are_read_through_their_index(tmp_path: Path) -> None:
    state = state_of(network())
    names = sorted(state)
    shards = {"pytorch_model-1.bin": names[:40], "pytorch_model-2.bin": names[40:]}
    for shard, keys in shards.items():
        torch.save({key: state[key] for key in keys}, tmp_path / shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}))
    assert_same(fit_file(index, network())[0], state)
