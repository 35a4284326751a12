"""Models whose source is a file of TorchScript or torch.export: from the file to what Triton serves."""

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from torch import nn
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build_tasks.verification import accuracy_samples
from tests.support.project import Project, failure_line

SIDE = 16
SPEC = """\
formats = {formats}
max_batch_size = 4

[input]
shape = [3, {side}, {side}]
{more}

[weights]
source = "{file}"
"""


class Branching(nn.Module):
    """A network with a branch that a trace would not keep, and with an output that is a list."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        rows: list[torch.Tensor] = []
        for image, row in zip(x, self.network(x)):  # noqa: B905  # TorchScript has no strict
            if bool(image.mean() > 0):
                row = row * 2
            rows.append(row)
        y = torch.stack(rows)
        return [y, y + 1]


def network(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, classes)).eval().requires_grad_(False)


def export(folder: Path, batch: int, dynamic: bool) -> None:
    dims = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
    program = torch.export.export(network(), (torch.randn(batch, 3, SIDE, SIDE),), dynamic_shapes=dims)
    torch.export.save(program, folder / "network.pt2")


def save_traced(folder: Path, freeze: bool = False, training: bool = False) -> None:
    trace = torch.jit.trace(network(), torch.randn(2, 3, SIDE, SIDE))
    trace = torch.jit.freeze(trace) if freeze else trace
    (trace.train() if training else trace).save(folder / "network.pt")


def add(project: Project, name: str, write: Callable[[Path], object], file: str = "network.pt", **keys: Any) -> None:
    """Add a model whose source is a file that `write` puts into its folder."""
    keys = {"formats": '["torchscript", "onnx"]', "more": "", "side": SIDE, **keys}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        write(project.model(name, SPEC.format(file=file, **keys)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("built") / "project")
    add(project, "scripted", lambda folder: torch.jit.script(Branching(network())).save(folder / "network.ts"),
        "network.ts", formats='["torchscript"]')  # fmt: skip
    add(project, "traced", save_traced, formats='["torchscript", "onnx", "rtx"]')
    add(project, "frozen", lambda folder: save_traced(folder, freeze=True))
    add(project, "bytes", save_traced, more='format = "uint8_nhwc"\n[output]\nsoftmax = true\ntop_k = 2')
    add(project, "exported", lambda folder: export(folder, 2, True), "network.pt2")
    project.edit("models/exported/model.toml", "[weights]", "[onnx]\nopset = 18\n\n[weights]")
    project.built(CUDA_VISIBLE_DEVICES="")
    return project


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(batch))


def run_published(project: Project, name: str, batch: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """The outputs of the file that Triton loads."""
    folder = project / f"model_repository/{name}/1"
    if (folder / "model.pt").exists():
        outputs = torch.jit.load(folder / "model.pt")(batch)
        return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else [outputs])]
    import onnxruntime

    return list(onnxruntime.InferenceSession(str(folder / "model.onnx")).run(None, {"INPUT__0": batch.numpy()}))


@pytest.mark.parametrize("name", ["traced", "traced_onnx", "frozen", "frozen_onnx", "exported", "exported_onnx"])
def test_a_file_with_a_network_is_served_as_it_computes(built: Project, name: str) -> None:
    for batch in (1, 4):
        (found,) = run_published(built, name, images(batch))
        np.testing.assert_allclose(found, network()(images(batch)).numpy(), atol=1e-5)


def test_a_branch_of_a_script_is_kept_and_a_list_becomes_a_tuple(built: Project) -> None:
    for batch in (1, 2, 4):
        first, second = run_published(built, "scripted", images(batch))
        factors = 1 + (images(batch).mean((1, 2, 3)) > 0).int()
        assert batch < 4 or set(factors.tolist()) == {1, 2}, "both sides of the branch"
        expected = network()(images(batch)).numpy() * factors[:, None].numpy()
        np.testing.assert_allclose(first, expected, atol=1e-5)
        np.testing.assert_allclose(second, expected + 1, atol=1e-5)


def test_the_keys_of_input_and_output_hold_for_such_a_file(built: Project) -> None:
    for name in ("bytes", "bytes_onnx"):
        text = (built / f"model_repository/{name}/config.pbtxt").read_text()
        config = text_format.Parse(text, ModelConfig())
        assert [list(output.dims) for output in config.output] == [[2], [2]]
        assert list(config.input[0].dims) == [SIDE, SIDE, 3]


def test_each_file_is_its_own_reference_and_compiles(built: Project) -> None:
    out = built.built("list", "--all").out
    assert "outputs of PyTorch" in out
    assert (built / "build/traced/model.rtx").stat().st_size > 0
    assert '"exporter": "dynamo"' in (built / "build/exported/model.onnx.export.json").read_text()
    assert (built / "build/exported/weights.pt2").read_bytes() == (built / "models/exported/network.pt2").read_bytes()
    assert built.built(CUDA_VISIBLE_DEVICES="").ran == []


def write_nan(folder: Path) -> None:
    module = network()
    module[0].weight[0] = torch.nan  # type: ignore[index]
    torch.jit.script(module).save(folder / "network.pt")


def write_nan_buffer(folder: Path) -> None:
    module = network()
    module[1].running_mean[0] = torch.nan  # type: ignore[index]
    torch.jit.script(module).save(folder / "network.pt")


class Encoder(nn.Module):
    """A network without forward."""

    @torch.jit.export
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class Listing(nn.Module):
    """A network that takes a list, as the detectors of torchvision do."""

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(images).mean((2, 3))


REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "nan_buffer": (
        write_nan_buffer,
        "network.pt",
        "network.pt has NaN or infinity in 1 tensors: program.1.running_mean",
    ),
    "no_forward": (
        lambda folder: torch.jit.script(Encoder()).save(folder / "network.pt"),
        "network.pt",
        "models/no_forward/network.pt has no method forward: script a network around it",
    ),
    "list_of_images": (
        lambda folder: torch.jit.script(Listing()).save(folder / "network.pt"),
        "network.pt",
        "forward takes images as List[Tensor]: script a network around it that takes one tensor for each input",
    ),
    "checkpoint": (
        lambda folder: torch.save(network().state_dict(), folder / "network.pt"),
        "network.pt",
        "contains no network: expected TorchScript or torch.export, found another file; if it is a checkpoint, set "
        "architecture.timm or architecture.network",
    ),
    "pickled": (lambda folder: torch.save(network(), folder / "network.pth"), "network.pth", "contains no network"),
    "pointer": (
        lambda folder: (folder / "network.pt").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "network.pt",
        "is a pointer of Git LFS, not the file itself",
    ),
    "one_batch": (
        lambda folder: export(folder, 1, False),
        "network.pt2",
        "does not run on float32[2, 3, 16, 16]: the network refuses [2, 3, 16, 16]: Guard failed: "
        "input.size()[0] == 1; expected the inputs of the spec, in batches of any size",
    ),
    "half": (
        lambda folder: torch.jit.script(network().half()).save(folder / "network.pt"),
        "network.pt",
        "expected the inputs of the spec, in batches of any size",
    ),
    "training": (
        lambda folder: torch.jit.trace(network().train(), images(2), check_trace=False).save(folder / "network.pt"),
        "network.pt",
        "network.pt was saved in training mode, in which its answers are random or depend on the other samples of a "
        "batch (batch_norm, dropout): call eval() on the network before it is traced or exported",
    ),
    "not_finite": (write_nan, "network.pt", "network.pt has NaN or infinity in 1 tensors: program.0.weight"),
}


def test_a_file_that_cannot_be_served_is_refused_with_its_cause(project: Project) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (write, file, _) in REFUSED.items():
            add(project, name, write, file)
    run = project.doit("weights")
    assert run.code == 1
    for name, (_, _, line) in REFUSED.items():
        found = failure_line(run, f"weights:{name}")
        assert line in found, found
        assert "Traceback" not in found


def test_a_contradiction_with_the_spec_is_found_before_anything_runs(project: Project) -> None:
    reason = "expected nothing, since weights.source contains the network"
    for name, more, line in (
        ("converted", 'converter = "c.py:f"', f"weights.converter: {reason}"),
        ("prefixed", 'prefix = "a."', f"weights.prefix: {reason}"),
        ("argued", "[architecture]\narguments = { a = 1 }", f"architecture.arguments: {reason}"),
        ("dynamo", '[onnx]\nexporter = "dynamo"', "onnx.exporter: expected auto or torchscript, since the dynamo"),
    ):
        folder = project.model(name, SPEC.format(formats='["onnx"]', side=SIDE, more="", file="n.pt") + more + "\n")
        run = project.doit("list")
        assert run.code == 3
        assert re.search(rf"models/{name}/model.toml: {re.escape(line)}", run.out), run.out
        (folder / "model.toml").unlink()
        folder.rmdir()


def flat(channels: int, side: int) -> nn.Module:
    """A network that takes one size only."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * (side - 2) ** 2, 4)).eval()


def test_doit_new_writes_a_spec_that_builds_or_says_what_to_fill_in(project: Project, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(flat(1, 28), torch.zeros(2, 1, 28, 28)).save(tmp_path / "digits.pt")
        torch.jit.script(flat(2, 21)).save(tmp_path / "odd.ts")
        export(tmp_path, 2, True)
        torch.save(network().state_dict(), tmp_path / "state.pth")
    digits = project.built("new", "--from-torch", str(tmp_path / "digits.pt")).out
    assert "fill in" not in digits, "the photographs that ship become gray"
    assert "fill in" not in project.built("new", "exported", "--from-torch", str(tmp_path / "network.pt2")).out
    text = (project / "models/digits/model.toml").read_text()
    assert re.search(r"shape = \[1, 28, 28\] .*found by trial", text), text
    assert "shape = [3, 16, 16]" in (project / "models/exported/model.toml").read_text()
    odd = project.built("new", "--from-torch", str(tmp_path / "odd.ts")).out
    assert "fill in: shape in models/odd/model.toml: those that the file takes; no size that was tried fits" in odd
    assert "fill in: samples in models/odd/model.toml: put preprocessed samples of 2 channels into this file" in odd
    project.edit("models/odd/model.toml", "[2, 224, 224]", "[2, 21, 21]")
    project.edit("models/odd/model.toml", "samples.npz", "samples")
    (project / "models/odd/samples").mkdir()
    shutil.copy(Path(accuracy_samples.SHIPPED_PHOTOGRAPHS) / "coffee.jpg", project / "models/odd/samples")
    refused = project.doit("new", "--from-torch", str(tmp_path / "state.pth"))
    assert refused.code == 3
    assert "state.pth contains no network" in refused.out
    run = project.doit("publish:digits", "publish:exported_onnx", "publish:odd")
    assert {"publish:digits", "publish:exported_onnx"} <= set(run.ran), run.out
    line = failure_line(run, "reference:odd")
    assert "since input.shape has 2 channels, found pictures, which have 1, 3 or 4" in line


class HalfInside(nn.Module):
    """A network in float16 or bfloat16 that takes and returns float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.network = network().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.network(x.to(self.dtype))
        return answer.float()


def test_a_network_in_half_precision_is_served_as_torchscript_alone(project: Project, tmp_path: Path) -> None:
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network().half(), images(2).half(), check_trace=False).save(tmp_path / "half.pt")
        torch.jit.trace(HalfInside(torch.bfloat16), images(2), check_trace=False).save(tmp_path / "inside.pt")
        torch.jit.trace(network().bfloat16(), images(2).bfloat16(), check_trace=False).save(tmp_path / "narrow.pt")
        program = torch.export.export(network().half(), (images(2).half(),), dynamic_shapes=(batch,))
        torch.export.save(program, tmp_path / "half.pt2")
    for name, file in (("half", "half.pt"), ("exported", "half.pt2"), ("inside", "inside.pt")):
        assert "fill in" not in project.built("new", name, "--from-torch", str(tmp_path / file)).out
    text = (project / "models/half/model.toml").read_text()
    assert 'formats = ["torchscript"]             # it computes in float16; ONNX is checked in float32' in text
    assert 'dtype = "float16"\nshape = [3, 224, 224]\n' in text
    project.built("publish:half", "publish:exported", "publish:inside")
    found = torch.jit.load(project / "model_repository/half/1/model.pt")(images(3).half())
    torch.testing.assert_close(found, network().half()(images(3).half()))
    project.edit("models/inside/model.toml", '["torchscript"]', '["torchscript", "onnx"]')
    line = failure_line(project.doit("onnx:inside"), "onnx:inside")
    assert "the network computes in bfloat16, and ONNX is checked in float32: serve TorchScript alone" in line
    refused = project.doit("new", "narrow", "--from-torch", str(tmp_path / "narrow.pt"))
    assert re.search(r"narrow.pt: \w+ is bfloat16, which Triton lacks for PyTorch", refused.out)
    assert (refused.code, (project / "models/narrow").exists()) == (3, False)


class TwoImages(nn.Module):
    """A network whose second input can be passed by its name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, left: torch.Tensor, *, right: torch.Tensor) -> torch.Tensor:
        difference: torch.Tensor = self.network(left) - self.network(right)
        return difference


def test_an_input_that_is_passed_by_its_name_is_served(project: Project, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            TwoImages().eval(), (images(2),), {"right": images(3)[:2]},
            dynamic_shapes={"left": {0: batch}, "right": {0: batch}},
        )  # fmt: skip
        torch.export.save(program, tmp_path / "pair.pt2")
        export(tmp_path, 2, dynamic=False)
    project.built("new", "pair", "--from-torch", str(tmp_path / "pair.pt2"))
    project.built("publish:pair", "publish:pair_onnx")
    left, right = images(3), images(5)[:3]
    found = torch.jit.load(project / "model_repository/pair/1/model.pt")(left, right)
    np.testing.assert_allclose(found.numpy(), TwoImages()(left, right=right).detach().numpy(), atol=1e-5)
    refused = project.doit("new", "fixed", "--from-torch", str(tmp_path / "network.pt2"))
    assert (
        "input has the fixed shape [2, 3, 16, 16], also its batch: export the network with an open batch" in refused.out
    )
    assert (refused.code, (project / "models/fixed").exists()) == (3, False)


class Structured(nn.Module):
    """A network whose arguments are a dict, a tuple with nothing in it, a number, and a dict by its name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(
        self,
        first: dict[str, torch.Tensor],
        pair: tuple[torch.Tensor, torch.Tensor | None],
        scale: int = 1,
        *,
        other: dict[str, torch.Tensor],
        negative: bool = False,
    ) -> dict[str, torch.Tensor]:
        answer = self.layer(first["a"]) + scale * first["b"] + pair[0]
        return {"y": -answer if negative else answer, "z": answer + other["q"]}


def test_what_a_file_of_torch_export_was_exported_with_is_passed_on(project: Project, tmp_path: Path) -> None:
    """Tensors in dicts and tuples are inputs; numbers, flags and nothing stay as they were."""
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    a, b, c, q = torch.rand(2, 4), torch.rand(2, 3), torch.rand(2, 3), torch.rand(2, 3)
    program = torch.export.export(
        Structured().eval(), ({"a": a, "b": b}, (c, None), 3), {"other": {"q": q}, "negative": True},
        dynamic_shapes={
            "first": {"a": batch, "b": batch}, "pair": (batch, None), "scale": None,
            "other": {"q": batch}, "negative": None,
        },
    )  # fmt: skip
    torch.export.save(program, tmp_path / "structured.pt2")
    assert "fill in" not in project.built("new", "net", "--from-torch", str(tmp_path / "structured.pt2")).out
    project.built("publish:net", "publish:net_onnx")
    tensors = [torch.cat([each, 2 * each]) for each in (a, b, c, q)]
    expected = Structured()(
        {"a": tensors[0], "b": tensors[1]}, (tensors[2], None), 3, other={"q": tensors[3]}, negative=True
    )
    found = torch.jit.load(project / "model_repository/net/1/model.pt")(*tensors)
    for answer, name in zip(found, "yz", strict=True):
        np.testing.assert_allclose(answer.numpy(), expected[name].detach().numpy(), atol=1e-5)


def test_a_length_without_a_largest_value_is_left_to_the_user(project: Project, tmp_path: Path) -> None:
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU()).eval()
    program = torch.export.export(layers, (torch.rand(2, 5, 4),), dynamic_shapes=(dims,))
    torch.export.save(program, tmp_path / "open.pt2")
    out = project.built("new", "net", "--from-torch", str(tmp_path / "open.pt2")).out
    assert "fill in: max in models/net/model.toml: the largest length that is served" in out
    project.built("publish:net", "publish:net_onnx")
