"""`doit adopt`: repositories as people have them, which specs are written from them, and what is left alone."""

import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from build_tasks.doit_plugin import adopted_ensembles, adoption
from build_tasks.doit_plugin.adopt_command import Adopt
from build_tasks.doit_plugin.adoption import Adoption
from build_tasks.spec.loader import parse
from tests.support.existing_models import CONFIGS, NAMES, write_model
from tests.support.project import ROOT

Doit = Callable[..., tuple[int, str]]
Rows = list[tuple[str, str, str]]

# By the name of the config: the fields that change, or why the model is left alone. All other models come out the same.
PLAN = "a plan belongs to one type of GPU and one TensorRT, and is compiled anew: from "
DIFFERENT: dict[str, Rows] = {
    "labels_of_second": [("output.classes.label_filename", "labels.txt", "labels.classes.txt")],
    "other_file": [("default_model_filename", "resnet.onnx", "model.onnx")],
    "quick_start": [("output.fc6_1.label_filename", "densenet_labels.txt", "labels.txt")],
    "specific_versions": [
        ("version_policy.specific.versions", "[1, 3]", ""),
        ("version_policy.latest.num_versions", "", "1"),
    ],
}
LEFT_ALONE = {
    "cuda_graphs": PLAN + "two_gpus, which has the same tensors; add tensorrt to the formats of its spec",
    "dali_pipeline": "a pipeline of DALI is code, and no artifact that is built",
    "json": "config.pbtxt cannot be read: 1:1 : ",
    "python_model": "a Python model is code, and no artifact that is built",
    "ragged": "input.values.allow_ragged_batch: write the spec by hand (docs/how-to/tensors.md#ragged-batches)",
    "several_profiles": PLAN + "named_tensors, which has the same tensors; add tensorrt to the formats of its spec",
    "three_steps": "an ensemble of models that doit does not build: decode, words",
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for each config in tests/triton/existing."""
    folder = tmp_path_factory.mktemp("existing")
    for name in NAMES:
        write_model(folder, name)
    return folder


@pytest.fixture
def doit_adopt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doit:
    """The command in this process, in an empty project."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("build_tasks").symlink_to(ROOT / "build_tasks")  # a checkout, whose code stages name in fingerprints

    def run(*words: str) -> tuple[int, str]:
        code = Adopt().parse_execute(list(words))
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture(scope="module")
def adopted(repository: Path) -> dict[str, Adoption]:
    found = adopted_ensembles.with_ensembles(adoption.adopt(str(repository)))
    return {each.existing.name: each for each in found}


def test_there_are_configs_of_every_kind() -> None:
    assert len(NAMES) >= 30
    text = "".join((CONFIGS / f"{name}.pbtxt").read_text() for name in NAMES)
    kinds = (
        "reshape, control_input, state, batch_input, profile, label_filename, ensemble_scheduling, version_policy, "
        "gpus, rate_limiter, response_cache, cuda, parameters, input_data_file, gpu_execution_accelerator, TYPE_FP16, "
        "TYPE_UINT8, FORMAT_NHWC, #"
    )
    assert [kind for kind in kinds.split(", ") if kind not in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_config_comes_out_the_same_field_by_field(adopted: dict[str, Adoption], name: str) -> None:
    found = adopted[name]
    if name in LEFT_ALONE:
        assert found.spec is None
        assert found.reason.startswith(LEFT_ALONE[name])
    else:
        rows = found.differences
        assert (found.reason, rows) == ("", DIFFERENT.get(name, []))
        assert found.spec or found.host == "json_like"
        remarks = found.spec.remarks if found.spec else []
        assert [field for field, _ in remarks] == (["version_policy"] if name == "specific_versions" else [])


def test_it_looks_and_writes_nothing(doit_adopt: Doit, repository: Path) -> None:
    before = tree(repository)
    code, out = doit_adopt(str(repository))
    assert code == 0
    assert "reshape: onnx, version 1, 12 of 12 fields the same\n" in out
    assert "  differs: default_model_filename = resnet.onnx, becomes model.onnx\n" in out
    assert "versions: 1, 2 stay where they are, since a spec describes one artifact" in out
    assert f"{len(NAMES) - len(LEFT_ALONE)} of {len(NAMES)} models can be built by doit. Nothing was written." in out
    assert max(map(len, out.replace(str(repository), "").splitlines())) <= 80
    assert (tree(repository), os.listdir("models")) == (before, [])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_table_shows_every_field_before_and_after(doit_adopt: Doit, repository: Path) -> None:
    code, out = doit_adopt("--fields", str(repository / "other_file"))
    assert code == 0
    rows = [row for line in out.splitlines() if len(row := re.split(r" {3,}", line.strip())) in (3, 4)]
    assert ["input.x.dims", "[8]", "[8]"] in rows
    assert ["default_model_filename", "resnet.onnx", "model.onnx", "differs"] in rows
    assert len(rows) == 11  # with the names of the columns


def test_it_writes_specs_that_load_and_copies_of_their_files(doit_adopt: Doit, repository: Path) -> None:
    before = tree(repository)
    code, out = doit_adopt(str(repository), "--write")
    assert code == 0, out
    written = sorted(os.listdir("models"))
    assert written == sorted(set(NAMES) - set(LEFT_ALONE) - {"two_steps"})
    for name in written:
        model = parse(name, Path(f"models/{name}/model.toml").read_bytes())
        assert list(model.triton_models) == [name, *(["two_steps"] if name == "json_like" else [])]
        source = next((repository / name).rglob(f"{max(map(int, versions(repository / name)))}/*"))
        assert Path(f"models/{name}/{model.spec.weights.source}").read_bytes() == source.read_bytes()
    assert (
        Path("models/warm_up_file/warmup/x.bin").read_bytes() == (repository / "warm_up_file/warmup/x.bin").read_bytes()
    )
    assert (
        "fill in: [dimensions] in models/open_length/model.toml: input_ids_0 (1 to 64): the ranges are guesses" in out
    )
    assert tree(repository) == before
    code, out = doit_adopt(str(repository / "commas"), "--write")
    assert (code, out.splitlines()[-1]) == (3, "ERROR: models/commas exists already")


def test_the_steps_of_an_ensemble_are_written_before_the_spec_that_names_them(doit_adopt: Doit, tmp_path: Path) -> None:
    """The first step comes after the last one in the alphabet."""
    for name in ("commas", "json_like", "two_steps"):
        write_model(tmp_path / "repository", name)
    (tmp_path / "repository/commas").rename(tmp_path / "repository/zebra")
    (tmp_path / "repository/json_like/1").rename(tmp_path / "repository/json_like/5")
    for name in ("zebra", "two_steps"):
        config = tmp_path / f"repository/{name}/config.pbtxt"
        config.write_text(config.read_text().replace("commas", "zebra"))
    code, out = doit_adopt("repository", "--write")
    assert code == 0, out
    assert sorted(os.listdir("models")) == ["json_like", "zebra"]
    assert "  version: 1, becomes 5, as that of json_like\n" in out


def versions(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir() if path.name.isdecimal())


def test_a_warm_up_that_triton_would_skip_is_left_out(doit_adopt: Doit, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "repository", "warm_up_file")
    (folder / "warmup/x.bin").write_bytes(b"too short")
    code, out = doit_adopt("repository", "--write")
    assert code == 0
    assert "not in a spec: model_warmup[1]: expected 32 bytes, as dims and data_type say," in " ".join(out.split())
    (warm_up,) = parse("warm_up_file", Path("models/warm_up_file/model.toml").read_bytes()).spec.triton["model_warmup"]
    assert warm_up["name"] == "zeros"


TOKENS = """\
platform: "onnxruntime_onnx" max_batch_size: 16
input [ { name: "ids" data_type: TYPE_INT64 dims: [ -1 ] }, { name: "mask" data_type: TYPE_INT64 dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_INT64 dims: [ -1 ] } ]
parameters { key: "provenance.1.build" value { string_value: "of another checkout" } }
"""
LENGTH_384 = """\
model_warmup {
  name: "long" batch_size: 1
  inputs { key: "ids" value { data_type: TYPE_INT64 dims: 384 zero_data: true } }
  inputs { key: "mask" value { data_type: TYPE_INT64 dims: 384 zero_data: true } }
}
"""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("", ""), "seq = { min = 1, opt = 16, max = 64 }"),
        (("", LENGTH_384), "seq = { min = 1, opt = 384, max = 384 }"),
        (('"mask" data_type: TYPE_INT64 dims: [ -1 ]', '"mask" data_type: TYPE_INT64 dims: [ 512 ]'), "max = 512 }"),
    ],
    ids=["a guess", "warm-up", "dims of the config"],
)
def test_a_range_holds_the_lengths_that_the_config_names(
    doit_adopt: Doit, tmp_path: Path, change: tuple[str, str], expected: str
) -> None:
    folder = tmp_path / "repository/tokens"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(TOKENS.replace(*change) if change[0] else TOKENS + change[1])
    tensors = [helper.make_tensor_value_info(name, TensorProto.INT64, ["N", "seq"]) for name in ("ids", "mask", "y")]
    graph = helper.make_graph([helper.make_node("Mul", ["ids", "mask"], ["y"])], "g", tensors[:2], tensors[2:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "1/model.onnx"
    )
    code, out = doit_adopt("repository", "--write")
    assert code == 0
    assert "provenance.1" not in out, "publish writes these parameters"
    assert expected in Path("models/tokens/model.toml").read_text()


def test_a_model_that_answers_with_strings_is_left_alone(doit_adopt: Doit, tmp_path: Path) -> None:
    (tmp_path / "repository/text/1").mkdir(parents=True)
    tensors = [helper.make_tensor_value_info(name, TensorProto.STRING, ["N", 1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", tensors[:1], tensors[1:])
    onnx.save(helper.make_model(graph), tmp_path / "repository/text/1/model.onnx")
    code, out = doit_adopt("repository")
    assert code == 0
    assert "text: left alone: output.y: it holds strings, which the accuracy gate" in out


def test_a_file_of_labels_outside_the_model_is_not_copied(doit_adopt: Doit, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "repository", "named_tensors")
    (folder / "labels.txt").rename(tmp_path / "repository/labels.txt")
    config = folder / "config.pbtxt"
    config.write_text(config.read_text().replace('"labels.txt"', '"../labels.txt"'))
    code, out = doit_adopt("repository", "--write")
    assert code == 0
    assert "not in a spec: output.logits.label_filename: there is no file '../labels.txt'" in " ".join(out.split())
    assert sorted(os.listdir("models/named_tensors")) == ["model.onnx", "model.toml"]


def test_names_that_doit_or_a_spec_cannot_have(doit_adopt: Doit, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "repository", "from_the_file")
    shutil.copytree(folder, tmp_path / "repository/onnx")
    folder.rename(tmp_path / "repository/resnet50.v1")
    code, out = doit_adopt("repository", "--write")
    assert code == 0, out
    assert tomllib.loads(Path("models/onnx_model/model.toml").read_text())["triton"]["onnx"] == {"name": "onnx"}
    assert "not in a spec: onnx.name: expected a name of letters, digits, _ and -" in " ".join(out.split())
    assert list(parse("resnet50_v1", Path("models/resnet50_v1/model.toml").read_bytes()).triton_models) == [
        "resnet50_v1_onnx"
    ]


ONNX = 'platform: "onnxruntime_onnx"'


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (f'name: "other" {ONNX}', "the config's name is 'other', which Triton refuses"),
        ('backend: "openvino"', "its backend is openvino; what can be built is ONNX, TorchScript and TensorRT"),
        ('platform: "torch_aoti" default_model_filename: "text.onnx"', "a package of AOTInductor is compiled for"),
        (f"{ONNX} version_policy {{ specific {{ versions: 7 }} }}", "no version that Triton serves has a model.onnx"),
        (f"{ONNX} model_transaction_policy {{ decoupled: true }}", "a decoupled model answers a request with"),
        (f'{ONNX} output {{ name: "z" }}', "output: the file has no 'z', only y; Triton refuses the config"),
        (f"{ONNX} unknown: 3", "config.pbtxt cannot be read: 1:30 : Message type"),
        (f'{ONNX} default_model_filename: "../../secret"', "expected the name of a file, found '../../secret'"),
        (f'{ONNX} default_model_filename: "text.onnx"', "text.onnx cannot be read as ONNX"),
        ('platform: "pytorch_libtorch"', "no version that Triton serves has a model.pt"),
    ],
)
def test_what_is_left_alone_has_a_reason(doit_adopt: Doit, tmp_path: Path, config: str, reason: str) -> None:
    folder = write_model(tmp_path / "repository", "from_the_file")
    (folder / "1/text.onnx").write_text("no graph")
    (folder / "config.pbtxt").write_text(config)
    code, out = doit_adopt("repository")
    assert code == 0
    assert reason in " ".join(out.split())
    assert "0 of 1 models can be built by doit" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "expected: doit adopt PATH [--fields] [--write | --compare | --replace]"),
        ("models --write --replace", "expected: doit adopt PATH [--fields] [--write | --compare | --replace]"),
        ("absent", "expected a model repository or the folder of a model, found 'absent', which is no folder"),
        ("models", "models: expected folders with a config.pbtxt or with versions, found none"),
    ],
)
def test_a_mistake_is_one_line(doit_adopt: Doit, words: str, line: str) -> None:
    assert doit_adopt(*words.split()) == (3, f"ERROR: {line}\n")
