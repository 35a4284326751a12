"""Mistakes in specs: each is reported in one line, before anything is built."""

import re
import shutil
from pathlib import Path

import pytest

from build_tasks.errors import UserError
from build_tasks.spec.engine_tables import Engine
from build_tasks.spec.loader import load
from tests.support.project import ROOT, Project
from tests.support.spec_cases import (
    KEEP,
    MISTAKES,
    PRECISIONS,
    PROFILE,
    RELEASE,
    SCHEMES,
    VALID,
    source,
    spec,
    table,
    top,
)

PATH = "models/m/model.toml"


def write(name: str, text: str) -> None:
    folder = Path("models", name)
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(text)


def mistakes(*reserved: str) -> list[str]:
    """Return the lines with which `load` reports the mistakes in the current folder."""
    with pytest.raises(UserError) as error:
        load(reserved)
    return str(error.value).split("\n")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("text", "line"), MISTAKES, ids=[line.partition(": expected")[0] for _, line in MISTAKES])
def test_a_mistake_is_reported_with_the_key_and_what_was_expected_and_found(text: str, line: str) -> None:
    write("m", text)
    assert mistakes() == [f"{PATH}: {line}"]


def test_every_key_of_the_engine_has_a_mistake_of_its_own() -> None:
    keys = {line.removeprefix("engine.").partition(":")[0].partition("[")[0] for _, line in MISTAKES}
    assert set(Engine.__struct_fields__) <= keys


def test_the_spec_without_a_mistake_is_valid() -> None:
    write("m", spec())
    [model] = load()
    assert (model.name, model.seed, model.spec.formats) == ("m", 0, ["torchscript", "onnx", "tensorrt"])


@pytest.mark.parametrize("text", VALID)
def test_what_looks_like_a_mistake_can_be_valid(text: str) -> None:
    write("m", text)
    assert [model.name for model in load()] == ["m"]


@pytest.mark.parametrize(
    ("text", "profile"),
    [
        (spec(), (1, 8, 32)),
        (top("max_batch_size = 4"), (1, 4, 4)),
        (table("engine", "min_batch_size = 16"), (16, 16, 32)),
        (table("engine", "min_batch_size = 64"), (64, 64, 64)),
        (table("engine", "max_batch_size = 4"), (1, 4, 4)),
        (table("engine", "max_batch_size = 64"), (1, 8, 64)),
        (table("engine", "opt_batch_size = 2"), (1, 2, 32)),
        (table("onnx", "batch_size = 5"), (1, 8, 32)),
        (table("onnx", "dynamic_axes = false\nbatch_size = 5"), (5, 5, 5)),
    ],
)
def test_missing_batch_sizes_of_an_engine_follow_from_the_others(text: str, profile: tuple[int, ...]) -> None:
    write("m", text)
    [model] = load()
    assert model.spec.profile == profile


def test_triton_release_is_not_a_field_of_model_config() -> None:
    write("m", table("triton", 'release = "24.10"'))
    write("n", spec())
    assert [model.release for model in load()] == ["24.10", "26.08"]


def test_an_engine_of_tensorrt_rtx_is_built_but_not_served() -> None:
    write("m", top('formats = ["rtx", "tensorrt"]'))
    [model] = load()
    assert (model.served_formats, model.spec.has_engine) == (["tensorrt"], True)
    assert (model.triton_name("tensorrt"), model.files("tensorrt")) == ("m_trt", ["model.plan"])


def test_each_compute_capability_has_its_own_plan() -> None:
    write("m", table("engine", 'compute_capabilities = ["8.6", "12.0"]'))
    [model] = load()
    assert model.files("tensorrt") == ["model.sm86.plan", "model.sm120.plan"]
    assert [model.artifact_task_name("tensorrt", file) for file in model.files("tensorrt")] == [
        "m_trt.sm86",
        "m_trt.sm120",
    ]


@pytest.mark.parametrize(
    ("lines", "precision", "memory_format", "file"),
    [
        ("", "fp32", "contiguous", "model.pt"),
        ('[triton]\ndevice = "cpu"', "fp32", "contiguous", "model.pt"),
        ('[triton]\ndevice = "gpu"', "fp16", "channels_last", "model.fp16.pt"),
        ('[triton]\ndevice = "gpu"\n[torchscript]\nprecision = "fp32"', "fp32", "contiguous", "model.pt"),
        ('[torchscript]\nprecision = "fp16"\nmemory_format = "contiguous"', "fp16", "contiguous", "model.fp16.pt"),
        ('[torchscript]\nprecision = "bf16"', "bf16", "channels_last", "model.bf16.pt"),
        ('[torchscript]\nmemory_format = "channels_last"', "fp32", "channels_last", "model.fp32.pt"),
    ],
)
def test_torchscript_on_a_gpu_is_fp16_unless_the_spec_says_otherwise(
    lines: str, precision: str, memory_format: str, file: str
) -> None:
    write("m", spec(top='formats = ["torchscript"]', more=lines))
    [model] = load()
    assert (model.torchscript.precision, model.torchscript.memory_format) == (precision, memory_format)
    assert (model.files("torchscript"), model.is_cast) == ([file], file != "model.pt")


def test_bytes_that_are_not_utf_8_are_reported_as_invalid_toml() -> None:
    write("m", "")
    Path(PATH).write_bytes(b'labels = "\xff"\n')
    [line] = mistakes()
    assert line.startswith(f"{PATH}: not valid TOML: ")


def test_all_mistakes_of_a_spec_with_the_right_types_are_reported() -> None:
    write("m", spec(top='formats = ["onnx", "onnx"]', weights='source = "random://"\nconverter = "convert"'))
    assert mistakes() == [
        f"{PATH}: weights.converter: expected `file.py:function`, found 'convert'",
        f"{PATH}: weights.source: expected random:// and a seed, found 'random://'",
        f"{PATH}: formats: expected each format once, found ['onnx', 'onnx']",
    ]


def test_all_mistakes_of_an_engine_are_reported() -> None:
    engine = """
        precision = "tf32"
        keep_fp32 = ["Conv"]
        keep_io_types = false
        calibration = "pictures"
        min_batch_size = 8
        max_batch_size = 4
        strip_plan = true
        compute_capabilities = ["8.6", "8.6"]
        rtx_compute_capabilities = ["8.9", "8.9"]
    """
    write("m", spec(more=f"[input]\nmin_size = [96, 96]\n[triton]\nrelease = '26'\n[engine]{engine}"))
    assert mistakes() == [
        f"{PATH}: input: expected both min_size and max_size, or neither, found one of them",
        f"{PATH}: triton.release: {RELEASE}, found '26'",
        f"{PATH}: engine: expected {PROFILE}, found 8, 8, 4",
        f"{PATH}: engine.keep_io_types: {KEEP}",
        f"{PATH}: engine.keep_fp32: expected nothing, since all nodes of a tf32 graph are fp32, found ['Conv']",
        f"{PATH}: engine.calibration: expected nothing, since tf32 needs no calibration, found 'pictures'",
        f"{PATH}: engine.strip_plan: expected false, since Triton cannot refit a plan without weights, found true",
        f"{PATH}: engine.compute_capabilities: expected each compute capability once, found ['8.6', '8.6']",
        f"{PATH}: engine.rtx_compute_capabilities: expected each compute capability once, found ['8.9', '8.9']",
    ]


def test_mistakes_of_several_models_are_reported_together() -> None:
    write("a", top("max_batch_size = 0"))
    write("b", spec())
    write("c", source("gopher://host/file"))
    assert mistakes() == [
        "models/a/model.toml: max_batch_size: expected int >= 1, found 0",
        f"models/c/model.toml: {SCHEMES}, found 'gopher://'",
    ]


@pytest.mark.parametrize("name", ["a b", "a.b", "é", ".hidden", "-x", "_x"])
def test_a_name_that_tools_could_misunderstand_is_refused(name: str) -> None:
    write(name, spec())
    assert mistakes() == [
        f"models/{name}: a model's name is made of letters, digits, _ and -, and begins with a letter or digit"
    ]


def test_a_reserved_name_is_refused() -> None:
    write("onnx", spec())
    assert mistakes("weights", "onnx") == ["models/onnx: doit has a command or stage named onnx; rename the folder"]


def test_two_models_that_would_be_served_under_the_same_name_are_refused() -> None:
    write("a", spec())
    write("a_onnx", top('formats = ["torchscript"]'))
    assert mistakes() == [
        "models/a_onnx/model.toml: format torchscript is served as a_onnx, and so is format onnx of models/a/model.toml"
    ]


def test_an_engine_cannot_have_the_name_of_another_model() -> None:
    write("a", top('formats = ["tensorrt"]'))
    write("a_trt", top('formats = ["torchscript"]'))
    assert mistakes() == [
        "models/a_trt/model.toml: format torchscript is served as a_trt, and so is format tensorrt of "
        "models/a/model.toml"
    ]


def test_a_name_that_looks_like_a_format_of_another_model_is_allowed() -> None:
    write("a", top('formats = ["torchscript"]'))
    write("a_onnx", top('formats = ["torchscript"]'))
    assert [model.name for model in load()] == ["a", "a_onnx"]


def test_a_project_without_models_is_a_mistake() -> None:
    expected = ["models/: there is no model; a model is a folder with a file model.toml"]
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


def test_doit_reports_all_mistakes_together_and_creates_nothing(project: Project) -> None:
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
            "models/onnx: doit has a command or stage named onnx; rename the folder",
        ]
    assert project.tree("build") == {}
    assert project.tree("model_repository") == {}


def test_a_model_cannot_be_named_like_a_command_or_a_stage(project: Project) -> None:
    """`doit list` would run the command of that name, so the model could never be built by its name."""
    stages = ["container", "engine", "precision", "prune", "publish", "rtx", "weights"]
    names = sorted(["clean", "forget", "help", "info", "list", "run", *stages])
    for name in names:
        project.model(name)
    run = project.doit()
    assert run.code == 3
    expected = [f"models/{name}: doit has a command or stage named {name}; rename the folder" for name in names]
    assert run.out.removeprefix("ERROR: ").splitlines() == expected


def test_doit_accepts_the_shipped_models(project: Project) -> None:
    shutil.copytree(ROOT / "models", project / "models", dirs_exist_ok=True)
    listed = project.built("list").out
    for path in (ROOT / "models").glob("*/model.toml"):
        assert re.search(rf"^{path.parent.name} ", listed, re.MULTILINE)


@pytest.fixture
def compiled(project: Project) -> Project:
    """Return a project whose model `tiny` has all formats."""
    project.model("tiny", spec(top='formats = ["torchscript", "onnx", "tensorrt", "rtx"]'))
    return project


def assert_refused(project: Project, *command: str) -> str:
    """Run a command that doit refuses before any task runs, and return its output."""
    run = project.doit(*command)
    assert run.code == 3
    assert "Traceback" not in run.out
    assert project.tree("build").keys() <= {".doit.sqlite3", ".digests.sqlite3"}
    return run.out


@pytest.mark.parametrize(
    "option",
    [
        *("--opset_version", "--batch_size"),
        *("--min_engine_batch_size", "--opt_engine_batch_size", "--max_engine_batch_size"),
    ],
)
def test_an_override_that_is_not_a_number_is_refused_by_the_command_line(compiled: Project, option: str) -> None:
    out = assert_refused(compiled, "engine:tiny", option, "x")
    assert f"option {option}: expected a whole number, found 'x'" in out


@pytest.mark.parametrize(
    "command",
    [
        ["onnx:tiny", "--opsets", "17"],
        ["onnx:tiny", "--engine_precision", "fp16"],
        ["engine:tiny", "--engine_precisions", "fp16"],
        ["weights:tiny", "--opset_version", "17"],
        ["tiny", "--opset_version", "17"],
    ],
    ids=" ".join,
)
def test_an_option_that_a_task_does_not_have_is_refused_by_the_command_line(
    compiled: Project, command: list[str]
) -> None:
    assert f"there is no option '{command[1]}'" in assert_refused(compiled, *command)


def test_an_override_without_a_value_is_refused_by_the_command_line(compiled: Project) -> None:
    out = assert_refused(compiled, "engine:tiny", "--engine_precision")
    assert "option --engine_precision requires argument" in out


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("onnx:tiny --opset_version 99", "--opset_version 99: onnx.opset: expected int <= 23, found 99"),
        ("run -n 2 onnx:tiny --opset_version=99", "--opset_version 99: onnx.opset: expected int <= 23, found 99"),
        ("weights:tiny onnx:tiny --opset_version 6", "--opset_version 6: onnx.opset: expected int >= 7, found 6"),
        ("onnx:tiny --batch_size 0", "--batch_size 0: onnx.batch_size: expected int >= 1, found 0"),
        ("engine:tiny --batch_size 0", "--batch_size 0: onnx.batch_size: expected int >= 1, found 0"),
        (
            "engine:tiny --engine_precision FP15",
            f"--engine_precision fp15: engine.precision: expected one of {PRECISIONS}, found 'fp15' "
            "(did you mean 'fp16'?)",
        ),
        (
            "rtx:tiny --engine_precision half",
            f"--engine_precision half: engine.precision: expected one of {PRECISIONS}, found 'half'",
        ),
        *(
            (
                f"{stage}:tiny --{point}_engine_batch_size 0",
                f"--{point}_engine_batch_size 0: engine.{point}_batch_size: expected int >= 1, found 0",
            )
            for stage in ("engine", "rtx")
            for point in ("min", "opt", "max")
        ),
        (
            "rtx:tiny --opt_engine_batch_size 9 --max_engine_batch_size=8",
            f"--opt_engine_batch_size 9 --max_engine_batch_size 8: engine: expected {PROFILE}, found 1, 9, 8",
        ),
        (
            "engine:tiny --no-dynamic_axes --max_engine_batch_size 8",
            "--max_engine_batch_size 8 --no-dynamic_axes: engine.max_batch_size: expected 1, the batch that "
            "onnx.dynamic_axes = false fixes, found 8",
        ),
    ],
)
def test_overrides_that_a_spec_could_not_contain_are_refused_before_anything_runs(
    compiled: Project, command: str, line: str
) -> None:
    assert assert_refused(compiled, *command.split()) == f"ERROR: models/tiny/model.toml {line}\n"


@pytest.mark.parametrize(
    ("more", "command", "line"),
    [
        (
            '[engine]\nprecision = "int8"\ncalibration = "pictures"',
            "engine:tiny --engine_precision FP16",
            "--engine_precision fp16: engine.calibration: expected nothing, since fp16 needs no calibration, "
            "found 'pictures'",
        ),
        (
            "[engine]\nkeep_io_types = false",
            "rtx:tiny --engine_precision bf16",
            f"--engine_precision bf16: engine.keep_io_types: {KEEP}",
        ),
        (
            "[engine]\nopt_batch_size = 16",
            "engine:tiny --max_engine_batch_size 8",
            f"--max_engine_batch_size 8: engine: expected {PROFILE}, found 1, 16, 8",
        ),
        (
            "[onnx]\ndynamic_axes = false\n[engine]\nopt_batch_size = 1",
            "rtx:tiny --batch_size 8",
            "--batch_size 8: engine.opt_batch_size: expected 8, the batch that onnx.dynamic_axes = false fixes, "
            "found 1",
        ),
        (
            '[engine]\ncompute_capabilities = ["8.6", "8.9"]',
            "engine:tiny.sm86 --min_engine_batch_size 64 --max_engine_batch_size 32",
            f"--min_engine_batch_size 64 --max_engine_batch_size 32: engine: expected {PROFILE}, found 64, 64, 32",
        ),
    ],
)
def test_overrides_that_contradict_the_spec_are_refused_before_anything_runs(
    compiled: Project, more: str, command: str, line: str
) -> None:
    compiled.model("tiny", spec(top='formats = ["torchscript", "tensorrt", "rtx"]', more=more))
    assert assert_refused(compiled, *command.split()) == f"ERROR: models/tiny/model.toml {line}\n"


def test_two_overrides_of_one_key_are_refused(compiled: Project) -> None:
    out = assert_refused(compiled, "onnx:tiny", "--opset_version", "13", "rtx:tiny", "--opset_version", "16")
    assert out == "ERROR: tiny: --opset_version 13 contradicts --opset_version 16\n"


def test_a_batch_that_is_fixed_for_one_run_overrides_the_profile_of_the_spec() -> None:
    write("m", table("engine", "opt_batch_size = 4"))
    [model] = load(overrides={"m": {("onnx", "dynamic_axes"): ("--no-dynamic_axes", False)}})
    assert model.spec.profile == (1, 1, 1)


def test_a_graph_with_its_own_gate_has_the_name_of_no_model(compiled: Project) -> None:
    compiled.model("a", spec(top='formats = ["rtx"]', more='[engine]\nprecision = "fp32"'))
    compiled.model("a_onnx", spec(top='formats = ["torchscript"]'))
    listed = compiled.built("list", "--all").out
    assert "accuracy:a.fp32" in listed
    assert "accuracy:a_onnx" in listed


def test_an_override_applies_to_one_model_only(compiled: Project) -> None:
    compiled.model("other", top("max_batch_size = 0"))
    assert assert_refused(compiled, "onnx:tiny", "--opset_version", "99").splitlines() == [
        "ERROR: models/other/model.toml: max_batch_size: expected int >= 1, found 0",
        "models/tiny/model.toml --opset_version 99: onnx.opset: expected int <= 23, found 99",
    ]
