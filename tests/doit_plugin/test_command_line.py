"""Help, and mistakes on the command line: each command says what can be typed, or what is wrong in one line."""

import json
import os
import re
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from build_tasks.doit_plugin.reserved_names import COMMANDS, STAGES
from build_tasks.doit_plugin.usage import USAGE
from tests.support.project import DOIT, OTHER, Project

TAKES_TASKS = ("plan", "list", "help", "info", "clean", "forget", "ignore", "reset-dep")


# An environment that was made before this project had a loader of its own uses that of doit.
needs_loader = pytest.mark.skipif(
    not entry_points(group="doit.LOADER"), reason="the installed doit_model_repository is older than its loader"
)


@pytest.fixture
def other(project: Project) -> Project:
    project.model("other", OTHER.replace('["torchscript"]', '["torchscript", "onnx"]'))
    return project


def test_the_overview_names_all_that_can_be_typed_on_80_columns() -> None:
    words = set(USAGE.replace(":", " ").replace(",", " ").replace("(", " ").split())
    assert set(STAGES) | set(COMMANDS) <= words
    assert max(map(len, USAGE.splitlines())) <= 80
    assert len(USAGE.splitlines()) <= 60, "it fits one tall screen"


@pytest.mark.parametrize(
    "words",
    [["help"], ["-h"], ["help", "-h"], ["run", "--help"], pytest.param(["--help"], marks=needs_loader)],
)
def test_help_is_the_overview(other: Project, words: list[str]) -> None:
    assert other.built(*words).out == f"{USAGE}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(other: Project, command: str) -> None:
    for words in (["help", command], *([] if command in ("run", "help") else [[command, "--help"]])):
        out = other.built(*words).out
        assert "CmdOption" not in out
        assert out.startswith("PURPOSE\n")
        assert not [
            default for default in ("[default: .doit.db]", "[default: dbm]", "[default: md5]") if default in out
        ]


def test_dumpdb_prints_the_record_of_each_task(built_tiny: Project, other: Project) -> None:
    lines = built_tiny.built("dumpdb").out.splitlines()
    assert "weights:tiny -> {" in lines
    assert any(line.startswith('  "seconds": ') for line in lines)
    assert other.built("dumpdb").out == ""


def test_the_help_of_run_shows_the_defaults_of_this_project(other: Project) -> None:
    out = " ".join(other.built("help", "run").out.split())
    assert "'thread': uses threads [default: thread]" in out
    assert "continue executing tasks even after a failure [default: True]" in out


@pytest.mark.parametrize("words", [["help", "onnx"], ["onnx", "--help"], ["onnx:other", "-h"]])
def test_a_stage_has_the_options_of_its_tasks(other: Project, words: list[str]) -> None:
    out = other.built(*words).out
    assert out.startswith("onnx")
    assert "--opset_version" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--wrong"], "there is no option '--wrong'"),
        (["--contnue"], "there is no option '--contnue' (did you mean '--continue'?)"),
        (["onnx:other", "--opsett_version=3"], "there is no option '--opsett_version' (did you mean '--opset_version'"),
        (["list", "--statuss"], "there is no option '--statuss' (did you mean '--status'?)"),
        (["check", "--sever", "core"], "there is no option '--sever' (did you mean '--server'?)"),
        (["plan", "-x"], "option -x not recognized"),
        (["-n", "two"], "option -n: expected a whole number, found 'two'"),
        (["-n"], "option -n requires argument"),
        (["onnx:other", "--dynamic_axes=maybe"], "option --dynamic_axes: expected True or False, found 'maybe'"),
        (["othr"], "'othr' (did you mean 'other'?) is no command, task or target"),
        (["chekc"], "'chekc' (did you mean 'check'?) is no command"),
        (["onnx:othe"], "'onnx:othe' (did you mean 'onnx:other'?) is no command"),
        *(([command, "onnx:othe"], "'onnx:othe' (did you mean 'onnx:other'?) is no") for command in TAKES_TASKS),
        (["info"], "`info` failed, must select *one* task"),
        ([" "], "' ' is no command, task or target"),
        (["onnx:"], "'onnx:' (did you mean 'onnx'?) is no command"),
        (["opset_version=11"], "'opset_version=11' is no command, task or target; options begin with --;"),
        (["plan", "onnx:other", "a=b"], "'a=b' is no command, task or target; options begin with --;"),
        (["adopt", "/no=where", "--fields"], "expected a model repository or the folder of a model, found '/no=where'"),
        pytest.param([""], "one word of the command line is empty", marks=needs_loader),
        pytest.param(["plan", "other", ""], "one word of the command line is empty", marks=needs_loader),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(other: Project, words: list[str], expected: str) -> None:
    run = other.doit(*words)
    assert run.code == 3
    assert run.out.startswith(f"ERROR: {expected}")
    assert run.out.count("\n") == 1
    assert len(run.out) < 300


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--dynamic_axes", "True"], True),
        (["--dynamic_axes=true"], True),
        (["--dynamic_axes", "--batch_size", "1"], True),
        (["--dynamic_axes", "False"], False),
        (["--dynamic_axes=False"], False),
        (["--no-dynamic_axes"], False),
        (["--batch_size", "1", "--dynamic_axes", "0"], False),
    ],
)
def test_a_switch_takes_a_value_as_in_the_guide(other: Project, words: list[str], value: bool) -> None:
    other.edit("models/other/model.toml", "formats", f"onnx.dynamic_axes = {json.dumps(not value)}\nformats")
    run = other.doit("plan", "onnx:other", *words)
    assert run.code == 0, run.out
    settings = subprocess.run(
        ["python", "-c", CODE, "doit", "onnx:other", *words], cwd=other.root, capture_output=True, text=True, check=True
    )
    assert json.loads(settings.stdout) is value


CODE = """
import json, sys
from build_tasks.spec import overrides
from build_tasks.spec.loader import read_model
sys.argv = sys.argv[1:]
print(json.dumps(read_model("other", overrides.from_command_line(sys.argv)["other"]).spec.onnx.dynamic_axes))
"""


LINES_OF = (
    ["help", "run"], ["help", "onnx"], ["new", "--help"], ["list", "--all", "--status"], ["plan"], ["check"],
    ["info", "engine:other"], ["upgrade", "25.03"], ["smoke", "--url", "localhost:1"], ["cache"], ["verify"],
    ["nosuch"],
)  # fmt: skip


@pytest.mark.parametrize("columns", [80, 50])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_broken(other: Project, columns: int) -> None:
    other.edit("models/other/model.toml", '"onnx"', '"onnx", "tensorrt"')
    for words in LINES_OF if columns == 80 else LINES_OF[-4:]:
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", other.terminal(*words, COLUMNS=str(columns)))
        for line in shown.splitlines():
            assert len(line) <= columns or " " not in line.strip(), (words, line)
        log = other.doit(*words).out
        assert shown.split() == log.split() or words == ["upgrade", "25.03"], words  # its table is split


def test_what_may_be_copied_keeps_its_lines(other: Project) -> None:
    assert json.loads(other.terminal("-r", "json", "prune", COLUMNS="50"))["aborted"] == []
    assert other.terminal("tabcompletion", COLUMNS="50").splitlines() == other.built("tabcompletion").out.splitlines()


def test_a_word_with_an_equals_sign_is_no_variable(other: Project) -> None:
    """Checkpoints of PyTorch Lightning have such names."""
    out = other.built("new", "mine", "--architecture", "resnet18", "--weights", "epoch=3-step=12.ckpt").out
    assert "missing: models/mine/epoch=3-step=12.ckpt" in out


def test_info_prints_words_and_no_objects(other: Project) -> None:
    out = other.doit("info", "onnx:other").out
    assert " - --opset_version=ARG" in out
    assert "{" not in out
    assert "<" not in out


@pytest.mark.parametrize("words", [["info", "publish:other"], ["list", "--all", "--deps", "publish:other"]])
def test_input_files_are_listed_in_order(other: Project, words: list[str]) -> None:
    out = other.doit(*words).out
    files = re.findall(r"^ - +(\S+/\S+)$", out.rpartition("file_dep   :")[2].partition("\n\n")[0], re.MULTILINE)
    assert len(files) > 3, out
    assert files == sorted(files)


def test_a_group_that_was_never_built_is_not_up_to_date(other: Project) -> None:
    lines = {line.split()[1]: line.split()[0] for line in other.built("list", "--status").out.splitlines()}
    assert (lines["other"], lines["onnx"]) == ("R", "R")
    assert next(iter(lines)) == "other", "the models stand first"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_commands(other: Project, shell: str, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(other.built("tabcompletion", "--shell", shell).out)
    text = script.read_text()
    assert all(command in text for command in COMMANDS)
    if shell == "bash":
        subprocess.run(["bash", "-n", script], check=True)


def test_without_a_checkout_doits_own_commands_work(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (tmp_path / "dodo.py").write_text("def task_hello():\n    return {'actions': ['echo hello']}\n")
    for words in (["list"], ["help"], ["info", "hello"]):
        run = subprocess.run([DOIT, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert "Traceback" not in run.stderr, run.stderr
        assert run.stdout
