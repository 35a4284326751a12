"""Mistakes in specs: each is answered with one line, before anything is built."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, Project

from build_tasks.errors import UserError
from build_tasks.reading import load
from build_tasks.spec import Engine

PATH = "models/m/model.toml"


def spec(
    top: str = "",
    architecture: str = 'timm = "test_efficientnet"',
    weights: str = 'source = "random://0"',
    more: str = "",
) -> str:
    """A valid spec, but for what the arguments say otherwise."""
    return f"{top}\n[architecture]\n{architecture}\n[weights]\n{weights}\n{more}\n"


def table(name: str, line: str) -> str:
    return spec(more=f"[{name}]\n{line}")


def top(line: str) -> str:
    return spec(top=line)


def source(value: str) -> str:
    return spec(weights=f'source = "{value}"')


def network(line: str) -> str:
    return spec(architecture=line, more="[input]\nshape = [3, 8, 8]")


TOP = (
    "top level: expected one of architecture, weights, input, formats, max_batch_size, labels, onnx, engine, accuracy, "
    "triton"
)
SCHEMES = "weights.source: expected one of hf://, https://, http://, package://, timm://, random:// or a path"
DERIVED = "expected nothing, since it follows from the artifact"

MISTAKES = [
    # Keys that do not exist, with the nearest one that does
    (top("opset = 11"), f"{TOP}, found 'opset'"),
    (top("max_batchsize = 4"), f"{TOP}, found 'max_batchsize' (did you mean 'max_batch_size'?)"),
    (table("oonx", "opset = 11"), f"{TOP}, found 'oonx' (did you mean 'onnx'?)"),
    (
        spec(architecture='tim = "x"'),
        "architecture: expected one of timm, network, arguments, found 'tim' (did you mean 'timm'?)",
    ),
    (
        spec(weights='source = "random://0"\nsha = "x"'),
        "weights: expected one of source, sha256, converter, found 'sha' (did you mean 'sha256'?)",
    ),
    (
        table("input", "means = [0.5, 0.5, 0.5]"),
        "input: expected one of shape, min_size, max_size, mean, std, interpolation, crop_pct, crop_mode, "
        "found 'means' (did you mean 'mean'?)",
    ),
    (
        table("onnx", "batchsize = 11"),
        "onnx: expected one of exporter, opset, dynamic_axes, batch_size, external_data, found 'batchsize' "
        "(did you mean 'batch_size'?)",
    ),
    (
        table("engine", "max_batch = 8"),
        f"engine: expected one of {', '.join(Engine.__struct_fields__)}, found 'max_batch' "
        "(did you mean 'max_batch_size'?)",
    ),
    (
        table("accuracy", "tolerence = 1e-3"),
        "accuracy: expected one of samples, tolerance, top1, allow_untestable, found 'tolerence' "
        "(did you mean 'tolerance'?)",
    ),
    (
        table("onnx", '"a\\nb" = 1'),
        "onnx: expected one of exporter, opset, dynamic_axes, batch_size, external_data, found 'a\\nb'",
    ),
    # Keys that are missing
    ('[weights]\nsource = "random://0"\n', "top level: expected the key 'architecture', found nothing"),
    ('[architecture]\ntimm = "x"\n', "top level: expected the key 'weights', found nothing"),
    (spec(weights=""), "weights: expected the key 'source', found nothing"),
    # Values of another type
    (table("onnx", 'opset = "11"'), "onnx.opset: expected int, found '11'"),
    (table("onnx", "opset = 11.0"), "onnx.opset: expected int, found 11.0"),
    (table("onnx", 'dynamic_axes = "yes"'), "onnx.dynamic_axes: expected bool, found 'yes'"),
    (top("max_batch_size = true"), "max_batch_size: expected int, found True"),
    (top("labels = 7"), "labels: expected str, found 7"),
    (top('engine = "fp16"'), "engine: expected table, found 'fp16'"),
    (table("input", "shape = 224"), "input.shape: expected array, found 224"),
    (table("input", 'shape = [3, 224, "224"]'), "input.shape[2]: expected int, found '224'"),
    (table("accuracy", 'tolerance = "1e-4"'), "accuracy.tolerance: expected float, found '1e-4'"),
    (spec(weights="source = 3"), "weights.source: expected str, found 3"),
    # Values out of range
    (table("onnx", "opset = 24"), "onnx.opset: expected int <= 23, found 24"),
    (table("onnx", "opset = 6"), "onnx.opset: expected int >= 7, found 6"),
    (top("max_batch_size = 0"), "max_batch_size: expected int >= 1, found 0"),
    (table("input", "shape = [3, 224]"), "input.shape: expected array of length >= 3, found [3, 224]"),
    (table("input", "shape = [3, 0, 224]"), "input.shape[1]: expected int >= 1, found 0"),
    (table("input", "crop_pct = 1.5"), "input.crop_pct: expected float <= 1.0, found 1.5"),
    (table("input", "std = [0.2, 0.0, 0.2]"), "input.std[1]: expected float > 0.0, found 0.0"),
    (table("accuracy", "tolerance = 0"), "accuracy.tolerance: expected float > 0.0, found 0"),
    (table("accuracy", "tolerance = inf"), "accuracy.tolerance: expected float < 1.0, found inf"),
    (table("accuracy", "top1 = 2"), "accuracy.top1: expected float <= 1.0, found 2"),
    (top('labels = ""'), "labels: expected str of length >= 1, found ''"),
    (
        spec(weights='source = "random://0"\nsha256 = "abc"'),
        "weights.sha256: expected str matching regex '^[0-9a-f]{64}$', found 'abc'",
    ),
    (
        table("engine", "min_batch_size = 4\nopt_batch_size = 2"),
        "engine: expected min_batch_size <= opt_batch_size <= max_batch_size, found 4, 2, 32",
    ),
    (
        table("engine", "opt_batch_size = 64"),
        "engine: expected min_batch_size <= opt_batch_size <= max_batch_size, found 1, 64, 32",
    ),
    # Choices
    (
        table("onnx", 'exporter = "torchscrpt"'),
        "onnx.exporter: expected one of auto, torchscript, dynamo, found 'torchscrpt' (did you mean 'torchscript'?)",
    ),
    (
        table("engine", 'precision = "half"'),
        "engine.precision: expected one of fp32, tf32, fp16, bf16, int8, fp8, found 'half'",
    ),
    (
        table("input", 'interpolation = "cubic"'),
        "input.interpolation: expected one of nearest, bilinear, bicubic, lanczos, found 'cubic' "
        "(did you mean 'bicubic'?)",
    ),
    (
        top('formats = ["torchscript", "tensorflow"]'),
        "formats[1]: expected one of torchscript, onnx, tensorrt, rtx, found 'tensorflow' (did you mean 'tensorrt'?)",
    ),
    (
        top('formats = ["onxx"]'),
        "formats[0]: expected one of torchscript, onnx, tensorrt, rtx, found 'onxx' (did you mean 'onnx'?)",
    ),
    (
        table("engine", "keep_io_types = false\nprecision = 'int8'"),
        "engine.keep_io_types: expected true, since clients have fp32 and fp16 and nothing narrower, found false",
    ),
    (
        table("engine", "keep_io_types = false\nprecision = 'bf16'"),
        "engine.keep_io_types: expected true, since clients have fp32 and fp16 and nothing narrower, found false",
    ),
    (
        table("engine", "keep_fp32 = ['Conv']\nprecision = 'tf32'"),
        "engine.keep_fp32: expected nothing, since all of tf32 is fp32, found ['Conv']",
    ),
    (table("engine", "keep_fp32 = 'Conv'"), "engine.keep_fp32: expected array, found 'Conv'"),
    (
        table("engine", "calibration = 'pictures'"),
        "engine.calibration: expected nothing, since fp16 is not calibrated, found 'pictures'",
    ),
    (
        table("engine", "strip_plan = true"),
        "engine.strip_plan: expected false, since Triton cannot refit a plan without weights, found true",
    ),
    (table("engine", "workspace = 0"), "engine.workspace: expected int >= 1, found 0"),
    (table("engine", "optimization_level = 6"), "engine.optimization_level: expected int <= 5, found 6"),
    (table("engine", "tolerance = 0"), "engine.tolerance: expected float > 0.0, found 0"),
    (table("engine", "top1 = 2"), "engine.top1: expected float <= 1.0, found 2"),
    (table("engine", "sparse_weights = 1"), "engine.sparse_weights: expected bool, found 1"),
    (table("engine", "refittable = 'no'"), "engine.refittable: expected bool, found 'no'"),
    (table("engine", "version_compatible = 1"), "engine.version_compatible: expected bool, found 1"),
    (table("engine", "timing_cache = ''"), "engine.timing_cache: expected str of length >= 1, found ''"),
    (
        table("engine", "profiling_verbosity = 'verbose'"),
        "engine.profiling_verbosity: expected one of none, layer_names_only, detailed, found 'verbose'",
    ),
    (
        table("engine", "hardware_compatibility = 'ampere'"),
        "engine.hardware_compatibility: expected one of none, ampere_plus, same_compute_capability, found 'ampere' "
        "(did you mean 'ampere_plus'?)",
    ),
    (
        table("engine", "compute_capabilities = ['8.6', '8.6']"),
        "engine.compute_capabilities: expected each once, found ['8.6', '8.6']",
    ),
    (
        table("engine", "compute_capabilities = ['sm_86']"),
        "engine.compute_capabilities[0]: expected str matching regex '^[1-9][0-9]?\\\\.[0-9]$', found 'sm_86'",
    ),
    (
        table("engine", "rtx_compute_capabilities = ['8.6', '8.6']"),
        "engine.rtx_compute_capabilities: expected each once, found ['8.6', '8.6']",
    ),
    (table("input", "min_size = [96, 96]"), "input: expected min_size and max_size, or neither, found one of them"),
    (
        table("input", "min_size = [96, 96]\nmax_size = [224, 224]"),
        "input.shape: expected [channels, height, width], the size between min_size and max_size to tune for, "
        "found nothing",
    ),
    (
        table("input", "shape = [3, 64, 128]\nmin_size = [96, 96]\nmax_size = [224, 224]"),
        "input: expected min_size <= height and width of shape <= max_size, found [96, 96], [64, 128], [224, 224]",
    ),
    (
        table("input", "min_size = [96]\nmax_size = [224, 224]"),
        "input.min_size: expected array of length >= 2, found [96]",
    ),
    (
        table("triton", "release = 26.08"),
        'triton.release: expected a release of Triton\'s containers, such as "26.08", found 26.08',
    ),
    (
        table("triton", "cc_model_filenames = {}"),
        "triton.cc_model_filenames: expected nothing, since it follows from the artifact "
        "(of engine.compute_capabilities), found {}",
    ),
    (top('formats = ["onnx", "onnx"]'), "formats: expected each format once, found ['onnx', 'onnx']"),
    (top("formats = []"), "formats: expected array of length >= 1, found []"),
    # The network
    (
        network('timm = "x"\nnetwork = "n.py:build"'),
        "architecture: expected either `timm` or `network`, found both",
    ),
    (spec(architecture=""), "architecture: expected either `timm` or `network`, found neither"),
    (
        spec(architecture='network = "n.py:build"'),
        "input.shape: expected [channels, height, width], since the network is your own, found nothing",
    ),
    (network('network = "n.py"'), "architecture.network: expected `file.py:function`, found 'n.py'"),
    (
        spec(weights='source = "random://0"\nconverter = "convert.to_timm"'),
        "weights.converter: expected `file.py:function`, found 'convert.to_timm'",
    ),
    # Sources
    (source("ftp://host/file"), f"{SCHEMES}, found 'ftp://' (did you mean 'http://'?)"),
    (source("gopher://host/file"), f"{SCHEMES}, found 'gopher://'"),
    (source(""), "weights.source: expected str of length >= 1, found ''"),
    (source("timm://"), "weights.source: expected something after ://, found 'timm://'"),
    (source("random://"), "weights.source: expected random:// and a seed, found 'random://'"),
    (source("random://-1"), "weights.source: expected random:// and a seed, found 'random://-1'"),
    (
        source("random://18446744073709551616"),
        "weights.source: expected random:// and a seed below 2**64, found 'random://18446744073709551616'",
    ),
    (
        source("hf://owner/repository"),
        "weights.source: expected `hf://owner/repository/file@revision`, found 'hf://owner/repository'",
    ),
    (
        source("hf://owner/repository/file@"),
        "weights.source: expected `hf://owner/repository/file@revision`, found 'hf://owner/repository/file@'",
    ),
    (source("package://torch"), "weights.source: expected `package://package/path/in/it`, found 'package://torch'"),
    (source("https://host"), "weights.source: expected `https://host/path/file`, found 'https://host'"),
    (source("http://host/path/"), "weights.source: expected `http://host/path/file`, found 'http://host/path/'"),
    # Triton's fields
    (table("triton", 'name = "x"'), f"triton.name: {DERIVED}, found 'x'"),
    (
        table("triton", "max_batch_size = 7"),
        f"triton.max_batch_size: {DERIVED} (the key max_batch_size stands above the tables), found 7",
    ),
    (table("triton", 'platform = "x"'), f"triton.platform: {DERIVED}, found 'x'"),
    (
        table("triton.dynamic_batchin", ""),
        "triton: expected fields of Triton's ModelConfig, found 'dynamic_batchin' (did you mean 'dynamic_batching'?)",
    ),
    # TOML
    ("labels = \n" + spec(), "not valid TOML: Invalid value (at line 1, column 10)"),
    (spec(architecture='timm = "x"\ntimm = "y"'), "not valid TOML: Cannot overwrite a value (at line 4, column 11)"),
]


def write(name: str, text: str) -> None:
    folder = Path("models", name)
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(text)


def mistakes(*reserved: str) -> list[str]:
    """What `load` has against the specs of the current folder, a line each."""
    with pytest.raises(UserError) as refusal:
        load(reserved)
    return str(refusal.value).split("\n")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("text", "line"), MISTAKES, ids=[line.partition(": expected")[0] for _, line in MISTAKES])
def test_a_mistake_is_told_with_key_expectation_and_finding(text: str, line: str) -> None:
    write("m", text)
    assert mistakes() == [f"{PATH}: {line}"]


def test_the_spec_that_the_mistakes_were_made_in_is_valid() -> None:
    write("m", spec())
    [model] = load()
    assert (model.name, model.seed, model.spec.formats) == ("m", 0, ["torchscript", "onnx", "tensorrt"])


def test_bytes_that_are_no_text_are_no_valid_toml() -> None:
    write("m", "")
    Path(PATH).write_bytes(b'labels = "\xff"\n')
    [line] = mistakes()
    assert line.startswith(f"{PATH}: not valid TOML: ")


def test_every_mistake_of_a_spec_that_has_the_right_types_is_told() -> None:
    write("m", spec(top='formats = ["onnx", "onnx"]', weights='source = "random://"\nconverter = "convert"'))
    assert mistakes() == [
        f"{PATH}: weights.converter: expected `file.py:function`, found 'convert'",
        f"{PATH}: weights.source: expected random:// and a seed, found 'random://'",
        f"{PATH}: formats: expected each format once, found ['onnx', 'onnx']",
    ]


def test_mistakes_of_several_models_are_told_in_one_go() -> None:
    write("a", top("max_batch_size = 0"))
    write("b", spec())
    write("c", source("gopher://host/file"))
    assert mistakes() == [
        "models/a/model.toml: max_batch_size: expected int >= 1, found 0",
        f"models/c/model.toml: {SCHEMES}, found 'gopher://'",
    ]


@pytest.mark.parametrize("name", ["a b", "a.b", "é", ".hidden", "-x", "_x"])
def test_a_name_that_tools_could_take_for_something_else_is_refused(name: str) -> None:
    write(name, spec())
    assert mistakes() == [
        f"models/{name}: a model's name is made of letters, digits, _ and -, and begins with a letter or digit"
    ]


def test_a_reserved_name_is_refused() -> None:
    write("onnx", spec())
    assert mistakes("weights", "onnx") == ["models/onnx: doit knows a command or stage named onnx; rename the folder"]


def test_two_models_that_would_be_served_under_one_name_are_refused() -> None:
    write("a", spec())
    write("a_onnx", top('formats = ["torchscript"]'))
    assert mistakes() == [
        "models/a_onnx/model.toml: format torchscript is served as a_onnx, and so is format onnx of models/a/model.toml"
    ]


def test_a_name_that_only_looks_like_another_s_format_is_fine() -> None:
    write("a", top('formats = ["torchscript"]'))
    write("a_onnx", top('formats = ["torchscript"]'))
    assert [model.name for model in load()] == ["a", "a_onnx"]


def test_no_models_at_all_is_a_mistake() -> None:
    expected = ["models/: there is no model here; a model is a folder with a file model.toml"]
    assert mistakes() == expected
    Path("models/notes").mkdir(parents=True)
    assert mistakes() == expected


def test_the_shipped_specs_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = [model.name for model in load()]
    assert names == sorted(path.parent.name for path in (ROOT / "models").glob("*/model.toml"))
    assert {"efficientnet_b3", "efficientnet_lite0"} <= set(names)


# ---------------------------------------------------------------------------------------------------------------
# Through doit


def test_doit_tells_all_mistakes_at_once_and_creates_nothing(project: Project) -> None:
    project.model("a", top("max_batch_size = 0"))
    project.model("b", source("gopher://host/file"))
    project.model("fine")
    project.model("onnx")
    for arguments in ([], ["fine"], ["list"], ["clean"]):
        run = project.doit(*arguments)
        assert run.code == 3
        assert run.out.splitlines() == [
            "ERROR: models/a/model.toml: max_batch_size: expected int >= 1, found 0",
            f"models/b/model.toml: {SCHEMES}, found 'gopher://'",
            "models/onnx: doit knows a command or stage named onnx; rename the folder",
        ]
    assert project.tree("build") == {}
    assert project.tree("model_repository") == {}


def test_a_model_cannot_be_named_like_a_command_or_a_stage(project: Project) -> None:
    """`doit list` would list, and never build the model of that name."""
    names = ["clean", "engine", "forget", "help", "info", "list", "prune", "publish", "run", "weights"]
    for name in names:
        project.model(name)
    run = project.doit()
    assert run.code == 3
    expected = [f"models/{name}: doit knows a command or stage named {name}; rename the folder" for name in names]
    assert run.out.removeprefix("ERROR: ").splitlines() == expected


def test_doit_accepts_the_shipped_models(project: Project) -> None:
    shutil.copytree(ROOT / "models", project / "models", dirs_exist_ok=True)
    listed = project.built("list").out
    for path in (ROOT / "models").glob("*/model.toml"):
        assert re.search(rf"^{path.parent.name} ", listed, re.MULTILINE)


def test_an_override_that_is_no_number_is_refused_by_the_command_line(tiny: Project) -> None:
    run = tiny.doit("onnx:tiny", "--opset_version", "x")
    assert run.code == 3
    assert "opset" in run.out
    assert "'x'" in run.out
    assert "Traceback" not in run.out
    assert tiny.tree("build").keys() <= {".doit.sqlite3", ".digests.sqlite3"}


def test_an_unknown_override_is_refused_by_the_command_line(tiny: Project) -> None:
    run = tiny.doit("onnx:tiny", "--opsets", "17")
    assert run.code == 3
    assert "opsets" in run.out
    assert "Traceback" not in run.out


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (["onnx:tiny", "--opset_version", "99"], "--opset_version 99: onnx.opset: expected int <= 23, found 99"),
        (["onnx:tiny", "--batch_size", "0"], "--batch_size 0: onnx.batch_size: expected int >= 1, found 0"),
        (
            ["engine:tiny", "--engine_precision", "FP15"],
            "--engine_precision fp15: engine.precision: expected one of fp32, tf32, fp16, bf16, int8, fp8, "
            "found 'fp15' (did you mean 'fp16'?)",
        ),
        (
            ["rtx:tiny", "--opt_engine_batch_size", "9", "--max_engine_batch_size=8"],
            "--opt_engine_batch_size 9 --max_engine_batch_size 8: engine: expected min_batch_size <= opt_batch_size <= "
            "max_batch_size, found 1, 9, 8",
        ),
        (
            ["engine:tiny", "--no-dynamic_axes", "--max_engine_batch_size", "8"],
            "--max_engine_batch_size 8 --dynamic_axes False: engine.max_batch_size: expected 1, the batch that "
            "onnx.dynamic_axes = false fixes, found 8",
        ),
    ],
)
def test_overrides_that_no_spec_may_say_are_refused_before_anything_runs(
    tiny: Project, override: list[str], line: str
) -> None:
    tiny.edit("models/tiny/model.toml", '"onnx"]', '"onnx", "tensorrt", "rtx"]')
    run = tiny.doit(*override)
    assert run.code == 3
    assert f"ERROR: models/tiny/model.toml {line}" in run.out.splitlines()
    assert tiny.tree("build").keys() <= {".doit.sqlite3", ".digests.sqlite3"}
