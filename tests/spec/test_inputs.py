"""Specs and files that would hang or crash a command, publish a file of the host, or write to the terminal."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from build_tasks.errors import MAX_LINE, UserError, message_line, printable
from build_tasks.spec import model_files
from build_tasks.spec.loader import load
from tests.support.project import TINY, Project
from tests.support.spec_cases import network, rule, source, spec, table, top

INSIDE = "expected a path in models/m/, after links are resolved"
DATA = f"{INSIDE}, or in a folder that the environment variable BUILD_DATA_FOLDERS lists"
DEEP = "[" * 1000 + "]" * 1000


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the model `m`, the only one in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BUILD_DATA_FOLDERS", raising=False)
    folder = tmp_path / "models/m"
    folder.mkdir(parents=True)
    return folder


def refused(text: str | bytes) -> list[str]:
    """Return the lines with which a spec is refused, without the path of the spec."""
    content = text if isinstance(text, bytes) else text.encode()
    Path("models/m/model.toml").write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(UserError) as error:
        load()
    assert time.perf_counter() - started < 5
    lines = str(error.value).split("\n")
    assert max(map(len, lines)) <= MAX_LINE
    return [line.removeprefix("models/m/model.toml: ") for line in lines]


def accepted(text: str) -> None:
    Path("models/m/model.toml").write_text(text)
    [model] = load()
    assert model.name == "m"


# ---------------------------------------------------------------------------------------------------------------
# What is no spec


def test_a_fifo_or_a_device_is_no_spec(folder: Path) -> None:
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(folder / "model.toml")
        with pytest.raises(UserError, match=r"models/m/model\.toml: expected a file, found a FIFO or a device"):
            load()
        (folder / "model.toml").unlink()


def test_a_spec_of_100_mb_is_not_read(folder: Path) -> None:
    with (folder / "model.toml").open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(UserError, match="expected at most 1048576 bytes, found a larger file"):
        load()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"max_batch_size = {'9' * 5000}", "not valid TOML: Exceeds the limit (4300 digits)"),
        (f"max_batch_size = 0x{'f' * 5000}", "max_batch_size: expected an integer of at most 64 bits, found one of 20"),
        (f"formats = {DEEP}", "expected at most 16 tables and lists within each other, found more"),
        (f"formats = {'[' * 20}{']' * 20}", "formats[0][0][0]"),
        ('labels = "a\\u0000b"', "labels: expected a string without NUL, found 'a\\x00b'"),
        ('"a\\u0000" = 1', "top level: expected keys without NUL, found 'a\\x00'"),
        ("max_batch_size = 2020-01-01", "max_batch_size: expected a string, a number or a boolean, found date 2020"),
        (f'max_batch_size = "{"x" * 900_000}"', "max_batch_size: expected int, found 'xxx"),
        (f"{'x' * 900_000} = 1", "top level: expected one of architecture, weights"),
        ("max_batch_size = 1000000000", "max_batch_size: expected int <= 65536, found 1000000000"),
    ],
    ids=lambda value: value[:20],
)
def test_what_python_cannot_handle_is_one_short_line(text: str, line: str) -> None:
    [found] = refused(spec(top=text))
    assert found.startswith(line)


def test_only_so_many_mistakes_of_one_spec_are_listed() -> None:
    rules = "".join('[[accuracy.gate]]\nprecision = "int8"\n' for _ in range(10_000))
    lines = refused(spec(more=rules))
    assert len(lines) == 21
    assert lines[-1] == "there are more mistakes than these 20"


@pytest.mark.parametrize("letters", [101, 245])
def test_a_long_name_of_a_model_is_refused(letters: int) -> None:
    Path("models/m").rename(f"models/{'m' * letters}")
    Path(f"models/{'m' * letters}/model.toml").write_text(spec())
    with pytest.raises(UserError) as error:
        load()
    assert str(error.value) == (
        f"models/{'m' * 20}…: a model's name has at most 100 characters, and this one has {letters}"
    )


def test_a_std_of_1_beside_a_mean_of_bytes_is_one_of_bytes_too() -> None:
    assert [line.partition(", found")[0] for line in refused(table("input", "mean = [104]\nstd = [1]"))] == [
        "input.mean: expected a value for pixels from 0 to 1, probably [0.4078]",
        "input.std: expected a value for pixels from 0 to 1, probably [0.003922]",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (table("input", "crop_pct = nan"), "input.crop_pct: expected float > 0.0, found nan"),
        (table("input", "mean = [nan, 0.5, 0.5]"), "input.mean[0]: expected float >= -1000000.0, found nan"),
        (table("input", "std = [inf, 0.5, 0.5]"), "input.std[0]: expected float <= 1000000.0, found inf"),
        (
            table("input", "mean = [123.675, 116.28, 103.53]\nstd = [0.229, 0.224, 0.225]"),
            "input.mean: expected a value for pixels from 0 to 1, probably [0.485, 0.456, 0.406], "
            "found [123.675, 116.28, 103.53], for 0 to 255, which need input.scale = 255",
        ),
        (
            table("input", "std = [58.395, 57.12, 57.375]"),
            "input.std: expected a value for pixels from 0 to 1, probably [0.229, 0.224, 0.225], "
            "found [58.395, 57.12, 57.375], for 0 to 255, which need input.scale = 255",
        ),
        (
            table("input", "mean = [104, 117, 123]"),
            "input.mean: expected a value for pixels from 0 to 1, probably [0.4078, 0.4588, 0.4824], "
            "found [104.0, 117.0, 123.0], for 0 to 255, which need input.scale = 255",
        ),
        (table("input", "mean = []"), "input.mean: expected a value for each channel, found []"),
        (
            table("input", "shape = [3, 8, 8]\nmean = [0.5, 0.5]"),
            "input.mean: expected 3 values, one for each channel, found [0.5, 0.5]",
        ),
        (
            spec(architecture='timm = "x"\narguments = { a = [1.0, { b = nan }] }'),
            "architecture.arguments.a[1].b: expected a finite float, found nan",
        ),
        (table("triton", "parameters = { a = inf }"), "triton.parameters.a: expected a finite float, found inf"),
        (table("input", "shape = [3, 1000000000000, 1]"), "input.shape[1]: expected int <= 65536, found 1000000000000"),
        (
            table("input", "shape = [3, 65536, 65536]"),
            "input: expected inputs of at most 2**31 - 1 values, the most that a tensor holds, in a batch of 32, "
            "found 32 x [3, 65536, 65536]",
        ),
        (
            spec(top="max_batch_size = 65536", more="[input]\nshape = [3, 224, 224]"),
            "max_batch_size: expected inputs of at most 2**31 - 1 values, the most that a tensor holds, in a batch of "
            "65536, found 65536 x [3, 224, 224]",
        ),
        (table("engine", "workspace = 999999999"), "engine.workspace: expected int <= 16777216, found 999999999"),
        (table("triton", "keep_versions = 100000"), "triton.keep_versions: expected int <= 1000, found 100000"),
        (
            table("engine", 'keep_fp32 = ["Conv", "(a"]'),
            "engine.keep_fp32[1]: expected a type of operator, or a regular expression for names of nodes, found '(a' "
            "(missing ), unterminated subpattern at position 0)",
        ),
        (
            table("triton", "torchscript = true\ndynamic_batching = {}"),
            "triton.torchscript: expected a table, found True",
        ),
        (rule("relative_l2 = nan"), "accuracy.gate[0].relative_l2: expected float > 0.0, found nan"),
    ],
)
def test_what_only_a_stage_would_find_is_refused_at_once(text: str, line: str) -> None:
    assert refused(text) == [line]


# ---------------------------------------------------------------------------------------------------------------
# Sources


@pytest.mark.parametrize(
    "value",
    ["package://__main__/../x", "package://torch//etc/passwd", "package://torch/../x", "package://torch/a/./b"],
)
def test_a_file_of_a_package_stays_in_the_package(value: str) -> None:
    [line] = refused(source(value))
    assert line.startswith("weights.source: expected `package://package/path/in/it`, found ")


@pytest.mark.parametrize(
    "value", ["hf://owner/repository/..", "hf://owner/../file", "https://host/a/..", "timm://../x"]
)
def test_a_source_has_no_parts_that_lead_upwards(value: str) -> None:
    [line] = refused(source(value))
    assert line.startswith("weights.source: expected `")


@pytest.mark.parametrize(
    "value",
    [
        "https://user:sesame@host/file",
        "https://sesame@host/file",
        "https://user:ses/sesame@host/file",
        "http://user:sesame@host/file?a=sesame",
        "https://host:sesame/file",
        "https://user:sesame@host",
    ],
)
def test_a_password_in_a_source_is_refused_and_not_shown(value: str) -> None:
    [line] = refused(source(value))
    assert line.startswith("weights.source: expected `http")
    assert "sesame" not in line


def test_a_password_in_a_wrong_place_is_not_shown() -> None:
    [line] = refused('weights = "https://user:sesame@host/file?q=sesame"\n[architecture]\ntimm = "x"')
    assert line == "weights: expected table, found 'https://…@host/file?…'"


def test_http_needs_a_digest() -> None:
    [line] = refused(source("http://host/file"))
    assert line.startswith("weights.sha256: expected the digest of the file, since nothing else protects a download")
    accepted(spec(weights=f'source = "http://host/file"\nsha256 = "{"0" * 64}"'))


def test_the_spec_of_a_model_does_not_hold_the_query_of_its_source() -> None:
    Path("models/m/model.toml").write_text(source("https://host/a.onnx?x=sesame#y").replace(
        '[architecture]\ntimm = "test_efficientnet"', 'formats = ["onnx"]\n[input]\nshape = [3, 8, 8]'
    ))  # fmt: skip
    [model] = load()
    assert (model.spec.weights.source, model.query) == ("https://host/a.onnx", "?x=sesame")
    assert "sesame" not in repr(model.spec)


# ---------------------------------------------------------------------------------------------------------------
# Paths

STRICT: list[tuple[str, Callable[[str], str]]] = [
    ("labels", lambda path: top(f'labels = "{path}"')),
    ("accuracy.truth", lambda path: table("accuracy", f'truth = "{path}"')),
    (
        "weights.converter",
        lambda path: spec(weights=f'source = "random://0"\nconverter = "{path.removesuffix(".py")}.py:f"'),
    ),
    ("architecture.network", lambda path: network(f'network = "{path.removesuffix(".py")}.py:f"')),
]
AS_DATA: list[tuple[str, Callable[[str], str]]] = [
    ("weights.source", source),
    ("accuracy.samples", lambda path: table("accuracy", f'samples = "{path}"')),
    ("engine.calibration", lambda path: table("engine", f'precision = "int8"\ncalibration = "{path}"')),
    ("engine.timing_cache", lambda path: table("engine", f'timing_cache = "{path}"')),
]


@pytest.mark.parametrize(("key", "text"), STRICT + AS_DATA, ids=[key for key, _ in STRICT + AS_DATA])
@pytest.mark.parametrize("path", ["../../../etc/passwd", "/etc/passwd", "../n/file", "link.py"])
def test_no_path_of_a_spec_leaves_the_model_s_folder(
    folder: Path, key: str, text: Callable[[str], str], path: str
) -> None:
    (folder / "link.py").symlink_to("/etc/passwd")
    [line] = refused(text(path))
    assert line.startswith(f"{key}: {INSIDE}")
    assert line.endswith("'/etc/passwd'") or path != "link.py"


@pytest.mark.parametrize(("key", "text"), STRICT + AS_DATA, ids=[key for key, _ in STRICT + AS_DATA])
def test_listed_folders_may_hold_data_and_nothing_that_is_published_or_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, text: Callable[[str], str]
) -> None:
    monkeypatch.setenv("BUILD_DATA_FOLDERS", f"/nowhere:{tmp_path / 'data'}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file.py").write_text("")
    path = str(tmp_path / "data/file.py")
    if key in dict(AS_DATA):
        accepted(text(path))
        [line] = refused(text(f"{path}/../../other"))
        assert line.startswith(f"{key}: {DATA}, found ")
    else:
        [line] = refused(text(path))
        assert line == f"{key}: {INSIDE}, found {path!r}"


def test_a_relative_folder_in_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD_DATA_FOLDERS", "data")
    Path("models/m/model.toml").write_text(spec())
    with pytest.raises(
        UserError, match=r"^BUILD_DATA_FOLDERS: expected absolute paths, separated by ':', found 'data'$"
    ):
        load()


@pytest.mark.parametrize(("key", "text"), STRICT + AS_DATA, ids=[key for key, _ in STRICT + AS_DATA])
def test_a_path_is_a_file_of_the_disk(folder: Path, key: str, text: Callable[[str], str]) -> None:
    os.mkfifo(folder / "fifo.py")
    (folder / "loop.py").symlink_to("loop.py")
    [line] = refused(text("fifo.py"))
    assert re.fullmatch(rf"{key}: expected a file( or a folder)?, found 'fifo\.py', which is a FIFO", line)
    [line] = refused(text("loop.py"))
    assert line.startswith(f"{key}: expected a path that can be read, found 'loop.py'")
    [line] = refused(text("x" * 300))
    assert line.startswith(f"{key}: expected a path of at most 4000 bytes, with names of at most 255, found 'xxx")
    [line] = refused(text("a\\u001b[31m"))
    assert line == f"{key}: expected a path without control characters, found " + line.rpartition("found ")[2]
    accepted(text("missing.py"))  # the stage that reads it names it


def test_links_within_the_folder_and_a_linked_folder_of_a_model_are_fine(tmp_path: Path, folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data/labels.txt").write_text("a\n")
    (folder / "labels.txt").symlink_to("data/labels.txt")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    accepted(top('labels = "labels.txt"'))


def test_a_link_among_the_samples_cannot_leave_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "samples").mkdir()
    (tmp_path / "private.jpg").write_bytes(b"")
    (folder / "samples/a.jpg").symlink_to(tmp_path / "private.jpg")
    [line] = refused(table("accuracy", 'samples = "samples"'))
    assert line.startswith(
        "accuracy.samples: expected a folder that can be listed, found models/m/samples/a.jpg: expected a link"
    )


def test_a_folder_with_an_onnx_file_has_no_links_to_folders(folder: Path) -> None:
    """Its digest covers all files below it, and would have to follow the links."""
    text = top('formats = ["onnx"]').replace('[architecture]\ntimm = "test_efficientnet"', "[input]\nshape = [3, 8, 8]")
    text = text.replace("random://0", "net.onnx")
    (folder / "net.onnx").mkdir()
    accepted(text)
    (folder / "net.onnx/again").symlink_to(".")
    assert refused(text) == [
        "weights.source: expected a folder without links to folders, found 'models/m/net.onnx/again'"
    ]


def test_a_folder_as_a_source_is_refused_with_what_can_be_one(folder: Path) -> None:
    (folder / "saved").mkdir()
    for name, architecture in (("saved", '[architecture]\ntimm = "test_efficientnet"'), ("saved", "[input]")):
        text = top('formats = ["onnx"]').replace('[architecture]\ntimm = "test_efficientnet"', architecture)
        line = refused(text.replace("random://0", name))[-1]
        assert line.startswith(
            "weights.source: expected a checkpoint (.safetensors, its .index.json, .pth, .npz), ONNX"
        )
        assert line.endswith("found 'saved', which is a folder")


def test_samples_that_link_to_each_other_are_listed_once(folder: Path) -> None:
    from build_tasks.verification.accuracy_samples import sample_files

    (folder / "samples/cats").mkdir(parents=True)
    (folder / "samples/cats/1.jpg").write_bytes(b"")
    for name in ("loop", "again", "more"):
        (folder / f"samples/{name}").symlink_to(".")
        (folder / f"samples/cats/{name}").symlink_to("..")
    accepted(table("accuracy", 'samples = "samples"'))
    assert sample_files("models/m/samples") == ["models/m/samples/cats/1.jpg"]


def test_a_walk_over_samples_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = refused(table("accuracy", 'samples = "/"'))
    assert line == f"accuracy.samples: {DATA}, found '/'"
    monkeypatch.setattr(model_files, "MAX_ENTRIES", 3)
    (folder / "samples").mkdir()
    for name in range(4):
        (folder / f"samples/{name}.jpg").write_bytes(b"")
    [line] = refused(table("accuracy", 'samples = "samples"'))
    assert line.endswith("models/m/samples: expected at most 3 files and folders in it, found more")


@pytest.mark.parametrize("file", ["../../../../etc/passwd", "../model.toml", "/etc/passwd", "link"])
def test_a_file_of_a_warm_up_stays_in_its_folder(folder: Path, file: str) -> None:
    (folder / "warmup").mkdir()
    (folder / "warmup/link").symlink_to("/etc/passwd")
    tensor = f'{{ data_type = "TYPE_FP32", dims = [1], input_data_file = "{file}" }}'
    warm_up = f'model_warmup = [{{ name = "w", batch_size = 1, inputs = {{ INPUT__0 = {tensor} }} }}]'
    lines = refused(spec(top='formats = ["onnx"]', more=f"[triton]\n{warm_up}"))
    assert lines[0].startswith("triton.model_warmup: expected ")


# ---------------------------------------------------------------------------------------------------------------
# What reaches the terminal


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\x1b]0;x\x07b\x9bc\u202ed\u2028e\nf\x7f\udce9", r"a\x1b]0;x\x07b\u009bc\u202ed\u2028e\nf\x7f\udce9"),
        ("get https://user:word@host/f?x=1&y=2 (url: /f?x=1&y=2)", "get https://…@host/f?… (url: /f?…"),
        ("did you mean 'a'? b = c; hf://o/r/f@main", "did you mean 'a'? b = c; hf://o/r/f@main"),
        ("x" * 1000, f"{'x' * 197} … {'x' * 100}"),
    ],
)
def test_a_message_is_one_printable_line_without_secrets(text: str, line: str) -> None:
    assert message_line(text) == line
    assert str(UserError(text)) == line
    assert message_line(line) == line


def test_the_lines_of_a_table_stay() -> None:
    assert printable("a\n\tb\x1b") == "a\n\\tb\\x1b"


# ---------------------------------------------------------------------------------------------------------------
# Through doit


def test_commands_end_beside_fifos_and_links(project: Project) -> None:
    text = TINY.replace('"onnx"', '"onnx", "tensorrt"').replace(
        "\n[accuracy]", 'converter = "convert.py:f"\n[accuracy]'
    )
    folder = project.model("tiny", text, convert_py="", labels_txt="a\n")
    for name in ("model.safetensors", "keep_fp32.lock", "x.py"):
        os.mkfifo(folder / name)
    for name in ("a", "b", "c"):
        (folder / name).symlink_to(".")
    for words in (["list", "--all"], ["plan"], ["info", "weights:tiny"], ["tiny"]):
        process = project.start(*words)
        out, _ = process.communicate(timeout=60)
        assert process.returncode in (0, 1), out
        assert "Traceback" not in out
    assert "models/tiny/weights.safetensors does not exist" in out


def test_a_package_without_a_spec_is_a_package_that_is_not_installed(project: Project) -> None:
    project.model("m", source("package://__main__/x"))
    assert project.doit("list", "--all").code == 0
    run = project.doit("weights:m")
    assert "the package __main__ is not installed" in run.out


def test_a_file_of_the_host_is_not_published_as_labels(project: Project) -> None:
    project.model("tiny", TINY.replace("labels.txt", "../../../../../../../../etc/passwd"))
    run = project.doit()
    assert run.code == 3
    assert run.out.startswith("ERROR: models/tiny/model.toml: labels: expected a path in models/tiny/")
    assert project.tree("model_repository") == {}


def test_plan_names_what_lies_outside(project: Project, tmp_path: Path) -> None:
    file = tmp_path / "big disk/weights.safetensors"
    project.model("tiny", TINY.replace("weights.safetensors", str(file)).replace('labels = "labels.txt"\n', ""))
    assert project.doit("plan").code == 3
    out = project.built("plan", BUILD_DATA_FOLDERS=str(file.parent)).out
    expected = f"models/tiny/model.toml: weights.source leads to {file}, outside the model's folder"
    assert expected in out.splitlines()


def test_control_characters_of_a_spec_do_not_reach_the_terminal(project: Project) -> None:
    project.model("m", spec(top='max_batch_size = "\\u001b]0;title\\u0007"'))
    run = project.doit("list")
    assert run.out == r"ERROR: models/m/model.toml: max_batch_size: expected int, found '\x1b]0;title\x07'" + "\n"
    project.model("m", spec(architecture='timm = "\\u001b[31mred"'))
    for words in (["list", "--all"], ["plan"], ["info", "weights:m"], ["weights:m"]):
        assert "\x1b" not in project.doit(*words).out
