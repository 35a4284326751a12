"""fp32 artifacts against fp64: no false alarm over families of timm, and every planted fault is found.

python -m tests.formats.test_fp32_comparison [FAMILY…]     prints the table of docs/explanation/accuracy.md
"""

import copy
import functools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from build_tasks.errors import UserError
from build_tasks.formats import fp32_comparison, torchscript_device, torchscript_graph
from build_tasks.formats.fp32_comparison import Comparison, InaccurateError
from build_tasks.formats.onnx_runtime import onnx_session
from build_tasks.spec.interface import interface_of
from build_tasks.spec.model import Spec
from build_tasks.spec.tables import Input, Weights
from build_tasks.tensors import Interface

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES = (1, 2, 3, 8)
Run = Callable[[list[torch.Tensor]], list[np.ndarray]]


def interface(shape: tuple[int, int, int]) -> Interface:
    return interface_of(Spec(weights=Weights(source="random://0"), input=Input(shape=[*shape])))


FAMILIES = [
    *("resnet18", "resnet26d", "resnext26ts", "seresnet33ts", "resnetv2_18", "regnetx_002", "regnety_002"),
    *("efficientnet_b0", "efficientnet_b3", "efficientnet_lite0", "efficientnetv2_rw_t", "mobilenetv2_050"),
    *("mobilenetv3_small_050", "mobilenetv4_conv_small", "mnasnet_small", "mixnet_s", "ghostnet_050", "tinynet_e"),
    *("densenet121", "dla46_c", "dpn48b", "hrnet_w18_small", "selecsls42b", "vovnet39a", "cspresnet50", "darknet21"),
    *("convnext_atto", "convnextv2_atto", "poolformer_s12", "edgenext_xx_small", "fastvit_t8", "repvgg_a0"),
    *("mobileone_s0", "rexnet_100", "lcnet_050", "vit_tiny_patch16_224", "deit_tiny_patch16_224"),
    *("pit_ti_224", "levit_128s", "tiny_vit_5m_224", "xception41"),
]


def network(name: str, shape: tuple[int, int, int], statistics: str) -> nn.Module:
    """A network of timm with batch statistics of the photographs, or of noise, as training leaves them."""
    import timm

    torch.manual_seed(1)
    module = timm.create_model(name, exportable=True).requires_grad_(False)
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    pictures = Comparison(module.eval(), interface(shape)).batch({}, 2)[0]
    batch = pictures if statistics == "pictures" else torch.randn(8, *shape)
    for layer in norms:
        layer.train()
        layer.momentum = None  # the mean of all batches
        layer.reset_running_stats()
    with torch.no_grad():
        module(batch)
    return module.eval()


def trace(module: nn.Module, shape: tuple[int, int, int], path: str) -> Run:
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(module, torch.randn(2, *shape), check_trace=False))
    torchscript_device.follow_input(traced)
    torchscript_graph.save_torchscript(traced, path)
    return functools.partial(run, torch.jit.load(path))


def run(module: Any, inputs: list[torch.Tensor]) -> list[np.ndarray]:
    with torch.inference_mode():
        return [module(*inputs).numpy()]


def export(path: str, shape: tuple[int, int, int], target: str) -> Run:
    names: dict[str, Any] = {"input_names": ["INPUT__0"], "output_names": ["OUTPUT__0"], "opset_version": 17}
    axes = {"INPUT__0": {0: "batch"}, "OUTPUT__0": {0: "batch"}}
    torch.onnx.export(
        torch.jit.load(path),
        (torch.randn(2, *shape),),
        target,
        dynamo=False,
        dynamic_axes=axes,
        **names,
    )
    session = onnx_session(target, 2)
    return lambda inputs: session({"INPUT__0": inputs[0].numpy()})


def layers(module: nn.Module, kind: type | tuple[type, ...]) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, kind)]


PRODUCTS = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def rounded(dtype: torch.dtype) -> Callable[[nn.Module], object]:
    def edit(module: nn.Module) -> None:
        for layer in layers(module, PRODUCTS):
            layer.weight.copy_(layer.weight.to(dtype).float())

    return edit


def first(kind: type | tuple[type, ...], change: Callable[[Any], object]) -> Callable[[nn.Module], object]:
    return lambda module: change(layers(module, kind)[0])


def last(kind: type | tuple[type, ...], change: Callable[[Any], object]) -> Callable[[nn.Module], object]:
    return lambda module: change(layers(module, kind)[-1])


# Faults in the network that is exported.
WEIGHT_FAULTS: dict[str, Callable[[nn.Module], object]] = {
    "a weight, 1 % larger": first(PRODUCTS, lambda layer: layer.weight[0].mul_(1.01)),
    "two filters exchanged": first(PRODUCTS, lambda layer: layer.weight.copy_(layer.weight.roll(1, 0))),
    "a filter mirrored": first(PRODUCTS, lambda layer: layer.weight.copy_(layer.weight.flip(-1))),
    "the last bias left out": last(nn.Linear, lambda layer: layer.bias.sub_(layer.bias + 0.01)),
    "a row of the classifier, zero": last(nn.Linear, lambda layer: layer.weight[3].zero_()),
    "weights in fp16": rounded(torch.float16),
    "weights in bf16": rounded(torch.bfloat16),
    "the scale of a norm": last(NORMS, lambda layer: layer.weight[0].add_(0.1)),
    "the shift of a norm": last(NORMS, lambda layer: layer.bias[0].add_(0.1)),
    "an epsilon of 1e-2": last(NORMS, lambda layer: setattr(layer, "eps", 1e-2)),
}


def slots(output: np.ndarray, order: Any) -> np.ndarray:
    return output[order % len(output)] if len(output) > 1 else output


def spoil(output: np.ndarray, row: int, value: float) -> np.ndarray:
    output = output.copy()
    output[row, 0] = value
    return output


# Faults in the inputs and outputs of an artifact: (change of the batch, change of the output).
RUN_FAULTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "blue for red": (lambda x: x.flip(1), lambda y: y),
    "moved by a pixel": (lambda x: x.roll(1, 3), lambda y: y),
    "inputs in fp16": (lambda x: x.half().float(), lambda y: y),
    "inputs cut off at 1": (lambda x: x.clamp(-1, 1), lambda y: y),
    "another mean": (lambda x: x + 0.01, lambda y: y),
    "outputs in fp16": (lambda x: x, lambda y: y.astype(np.float16).astype(np.float32)),
    "softmax": (lambda x: x, lambda y: np.exp(y) / np.exp(y).sum(1, keepdims=True)),
    "two classes exchanged": (lambda x: x, lambda y: y[:, [1, 0, *range(2, y.shape[1])]]),
    "0.1 % larger": (lambda x: x, lambda y: y * np.float32(1.001)),
    "NaN in the last slot": (lambda x: x, lambda y: spoil(y, -1, np.nan)),
    "slots exchanged": (lambda x: x, lambda y: slots(y, np.arange(len(y)) + 1)),
    "the first answer in all slots": (lambda x: x, lambda y: slots(y, np.zeros(len(y), int))),
}


def errors(comparison: Comparison, artifact: Callable[[Any], Any]) -> list[float]:
    return [comparison.check(artifact, {}, batch) for batch in BATCHES]


def is_found(comparison: Comparison, artifact: Callable[[Any], Any]) -> bool:
    try:
        errors(comparison, artifact)
    except InaccurateError:
        return True
    return False


def measure(name: str, statistics: str) -> Iterator[tuple[str, str]]:
    """Yield (what, result) for a family: (format, its error), (fault, "found" or "missed")."""
    import timm

    shape = timm.data.resolve_data_config(model=timm.create_model(name))["input_size"]
    module = network(name, shape, statistics)
    comparison = Comparison(copy.deepcopy(module), interface(shape))
    with tempfile.TemporaryDirectory() as folder:
        artifacts = {"TorchScript": trace(module, shape, f"{folder}/model.pt")}
        artifacts["ONNX"] = export(f"{folder}/model.pt", shape, f"{folder}/model.onnx")
        _, limits = comparison._expected({})
        for kind, artifact in artifacts.items():
            try:
                yield kind, f"{max(errors(comparison, artifact)):.1e}"
            except (InaccurateError, UserError) as error:
                yield kind, f"REFUSED {error}"
        yield "limits", " ".join(f"{min(limit):.0e}" for limit in limits)
        for fault, edit in WEIGHT_FAULTS.items():
            faulty = copy.deepcopy(module)
            try:
                edit(faulty)
            except (IndexError, TypeError, AttributeError):  # it has no such layer
                continue
            yield fault, "found" if is_found(comparison, functools.partial(run, faulty)) else "missed"
        for fault, (before, after) in RUN_FAULTS.items():
            faulty_run = lambda x, before=before, after=after: [after(run(module, [before(x[0])])[0])]  # noqa: E731
            yield fault, "found" if is_found(comparison, faulty_run) else "missed"


@pytest.mark.parametrize("statistics", ["pictures", "noise"])
@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_vit", *(pytest.param(name, marks=pytest.mark.long) for name in FAMILIES)]
)
def test_no_false_alarm_and_every_planted_fault_is_found(name: str, statistics: str) -> None:
    results = dict(measure(name, statistics))
    assert not {what: result for what, result in results.items() if result.startswith(("REFUSED", "missed"))}
    assert len(results) > 20


def test_what_passes_without_fp64_passes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    module = nn.Sequential(*layers).eval().requires_grad_(False)
    needed, default = {}, fp32_comparison.CERTAIN
    for error in (0.0, 1e-6, 3e-6, 1e-5, 2.5e-5, 3.5e-5, 1e-4):
        faulty = lambda x, error=error: [(run(module, x)[0] * (1 + error)).astype(np.float32)]  # noqa: E731
        passed = []
        for certain in (default, 0.0):  # with 0, nothing passes without fp64 that is not equal
            monkeypatch.setattr(fp32_comparison, "CERTAIN", certain)
            comparison = Comparison(module, interface((3, 32, 32)))
            passed.append(not is_found(comparison, faulty))
            needed[error, certain > 0] = bool(comparison.expected)
        assert passed[0] == passed[1] == (error < 3e-5), error
    assert not needed[3e-6, True]
    assert needed[3e-6, False]
    assert needed[1e-5, True]


def test_random_numbers_are_the_networks_own_fault() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5)).eval()
    module[3].train()
    with pytest.raises(UserError, match="does its forward use random numbers"):
        Comparison(module, interface((3, 32, 32))).check(functools.partial(run, module), {}, 2)


def test_a_network_that_does_not_run_in_fp64_is_judged_by_its_sensitivity(capsys: pytest.CaptureFixture[str]) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.float32:
                raise TypeError("fp32 only")
            result: torch.Tensor = self.head(x.mean((2, 3)))
            return result

    module = Mixed().eval().requires_grad_(False)
    comparison = Comparison(module, interface((3, 32, 32)))
    assert comparison.check(functools.partial(run, module), {}, 3) < 1e-6
    assert not capsys.readouterr().out  # the answers are equal, whatever fp64 says
    with pytest.raises(InaccurateError, match=r"on noise, input 1 of the batch \(limit 3e-05\)"):
        comparison.check(lambda batch: [spoil(run(module, batch)[0], 1, 9)], {}, 3)
    assert "does not run in fp64: fp32 only" in capsys.readouterr().out


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for family in sys.argv[1:] or FAMILIES:
        for kind in ("pictures", "noise"):
            table = dict(measure(family, kind))
            missed = [what for what, result in table.items() if result == "missed"]
            found = sum(result == "found" for result in table.values())
            print(
                f"{family:24} {kind:9} TorchScript {table['TorchScript']:8} ONNX {table['ONNX']:8} "
                f"limits {table['limits']:20} faults found {found} of {found + len(missed)}",
                *missed,
                flush=True,
            )
