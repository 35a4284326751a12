"""The output of a run, on a terminal, in a log, and as JSON."""

import fcntl
import html
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from build_tasks.doit_plugin import display, run_results, task_lines
from build_tasks.doit_plugin.task_state import TaskState
from tests.support import tiny_network
from tests.support.project import DOIT, OTHER, ROOT, Project, Run

TIME = re.compile(r"\d\d:\d\d:\d\d ")
ROW = re.compile(r"^ (\S+) +(torchscript|onnx|tensorrt|rtx) +(\S+ [kM]?B|-) +(.+?) +(\S+) s +(.+)$", re.MULTILINE)


def plain(text: str) -> str:
    """A terminal's text without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", text)


def table(run: Run) -> dict[str, tuple[str, ...]]:
    """Size, error and state of each model and format, from the table at the end of a run."""
    return {
        f"{name} {model_format}": (size, error, state)
        for name, model_format, size, error, _, state in ROW.findall(run.out)
    }


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Run]:
    """A model that is built, one that fails the gate, and an engine that is not for this machine."""
    project = Project(tmp_path_factory.mktemp("reporter") / "project")
    tiny_network.add(project, "good", formats='"torchscript", "onnx", "tensorrt", "rtx"')
    bad = tiny_network.add(project, "bad", formats='"torchscript", "onnx"') / "model.toml"
    bad.write_text(f'{bad.read_text()}\n[[accuracy.gate]]\nformat = "onnx"\nmax_absolute = 1e-30\n')
    return project, project.doit(CUDA_VISIBLE_DEVICES="")


def test_the_end_is_a_table_of_models_and_formats(mixed: tuple[Project, Run]) -> None:
    _, run = mixed
    rows = table(run)
    assert list(rows) == ["bad torchscript", "bad_onnx onnx", "good torchscript", "good_onnx onnx", "good_trt tensorrt",
                          "good rtx"]  # fmt: skip
    size, error, state = rows["good_onnx onnx"]
    assert re.fullmatch(r"\d\.\d kB", size)
    assert state == "built"
    assert re.fullmatch(r"\S+e-\d\d, limit 1\.0e-04", error)
    assert rows["bad torchscript"][2] == "built"
    assert rows["bad_onnx onnx"][1:] == ("-", rows["bad_onnx onnx"][2])
    assert rows["bad_onnx onnx"][2] == "failed: accuracy"
    assert rows["good_trt tensorrt"][2] == "not for this machine"
    lines = [TIME.sub("", line) for line in run.out.partition(" model ")[2].splitlines()]
    assert len([line for line in lines if line.startswith("failed: accuracy:bad_onnx: output OUTPUT__0: max")]) == 1
    assert len([line for line in lines if line.startswith("not for this machine: good_trt: lacks TensorRT 10 or")]) == 1
    assert float(re.findall(r"^ good +torchscript.* (\S+) s", run.out, re.MULTILINE)[0]) > 0


def test_a_reason_of_several_rows_is_written_once_below_the_table() -> None:
    lacks, crash = "lacks TensorRT 10 or newer and an NVIDIA GPU", "torchscript:net: the network refuses float32[2, 3]"
    other = f"{crash.replace('net:', 'two:')}\nmore"
    reasons = [("net", TaskState.FAILED, crash), ("net_onnx", TaskState.FAILED, crash),
               ("two", TaskState.FAILED, other), ("net_trt", TaskState.UNSUPPORTED, lacks),
               ("two_trt", TaskState.UNSUPPORTED, lacks), ("old", TaskState.IGNORED, "short")]  # fmt: skip
    rows = [
        run_results.ModelRow("net", "onnx", name, state, reason, None, None, 0.0) for name, state, reason in reasons
    ]
    table = run_results.format_table(rows, None)
    assert [line.partition(" s   ")[2] for line in table.splitlines()[2:]] == [
        "failed: torchscript", "failed: torchscript", "failed: torchscript",
        "not for this machine", "not for this machine", "ignored: short",
    ]  # fmt: skip
    assert run_results.reason_lines(rows) == [
        f"not for this machine: net_trt, two_trt: {lacks}",
        f"failed: torchscript:net, torchscript:two: {crash.partition(': ')[2]}",
    ]


def test_the_picture_in_the_docs_shows_the_lines_of_today() -> None:
    """`python -m tests.doit_plugin.terminal_picture` draws it."""
    picture = html.unescape((ROOT / "docs/images/terminal.svg").read_text()).replace("\xa0", " ")
    published = {"publish:net": run_results.TaskResult(TaskState.BUILT)}
    for words in (*run_results.COLUMNS, str(run_results.next_commands(published)), "tasks done"):
        assert words in picture


def test_many_tasks_that_one_failure_prevents_are_counted(project: Project) -> None:
    """They are not listed: a newcomer has to read what failed."""
    folder = tiny_network.add(project, "bad")
    (folder / "weights.safetensors").write_bytes(b"no weights")
    run = project.doit("bad")
    assert run.code == 1
    assert re.fullmatch(r"skipped: a dependency failed: \d+ tasks that need weights:bad", run.out.splitlines()[-1])


def test_a_run_with_nothing_to_do_has_no_table(built_tiny: Project, copy_of: Callable[[Project], Project]) -> None:
    run = copy_of(built_tiny).built()
    assert run.out.splitlines() == ["17 up to date"]


def test_the_line_of_a_task_has_no_python_lists(mixed: tuple[Project, Run]) -> None:
    _, run = mixed
    (line,) = [line for line in run.out.splitlines() if re.search(r"✓ torchscript +good ", line)]
    assert re.search(r"batches: 1, 2, 3(, \d+)*$", line)
    assert task_lines.format_notes({"outputs": [[3, 32, 32], [4], []]}) == "outputs: 3 x 32 x 32, 4, 1"


def test_without_a_terminal_every_line_has_the_time(mixed: tuple[Project, Run]) -> None:
    root, _ = mixed
    (root / "build/good/model.onnx").unlink()
    out, _ = root.start("good", CUDA_VISIBLE_DEVICES="").communicate(timeout=300)
    lines, _, end = out.partition(" model")
    assert [line for line in lines.splitlines() if not TIME.match(line)] == []
    assert TIME.match(end.splitlines()[-1])
    assert re.search(r"^\S+   onnx +good +\.\.\., \d+\.\d s last time; build/good/model.onnx: missing$", out, re.M)


def test_quiet_tells_what_fails_and_the_sums(mixed: tuple[Project, Run]) -> None:
    root, _ = mixed
    run = root.doit("-r", "quiet", "bad")
    assert run.code == 1
    failure, totals, skipped = run.out.splitlines()
    assert failure.startswith("✗ accuracy")
    assert totals.endswith("1 failed")
    assert skipped == "skipped: a dependency failed: publish:bad_onnx"


def test_json_is_one_object_with_all_models_and_tasks(mixed: tuple[Project, Run]) -> None:
    root, _ = mixed
    process = root.start("-r", "json", CUDA_VISIBLE_DEVICES="")
    out, _ = process.communicate(timeout=300)
    data = json.loads(out)
    assert process.returncode == 1
    models = {f"{row['name']} {row['format']}": row for row in data["models"]}
    assert models["good_onnx onnx"]["state"] in ("built", "up to date")
    assert models["good_onnx onnx"]["bytes"] == (root / "build/good/model.onnx").stat().st_size
    assert models["good_trt tensorrt"]["state"] == "not for this machine"
    assert models["bad_onnx onnx"]["state"] == "failed"
    assert data["tasks"]["accuracy:bad_onnx"]["reason"].startswith("output OUTPUT__0")
    assert data["tasks"]["publish:bad_onnx"]["state"] == "skipped: a dependency failed"
    assert data["aborted"] == []


def test_json_has_standard_output_for_itself(built_tiny: Project, copy_of: Callable[[Project], Project]) -> None:
    """The output of tasks, here of prune, goes to standard error."""
    project = copy_of(built_tiny)
    project.edit("models/tiny/model.toml", '"torchscript", "onnx"', '"torchscript"')
    run = subprocess.run([DOIT, "-r", "json"], cwd=project.root, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(run.stdout)["tasks"]["prune"]["state"] == "built"
    assert "removing model_repository/tiny_onnx: no spec describes it any more" in run.stderr


def test_a_terminal_shows_what_runs_and_for_how_long(tiny: Project) -> None:
    first = tiny.terminal("weights:tiny")
    assert first.endswith("1 built\r\n")
    (tiny / "build/tiny/weights.safetensors").unlink()
    again = tiny.terminal("weights:tiny")
    shown = plain(again)
    assert re.search(r"weights +tiny.* \d+\.\d s of \d+\.\d s", shown)
    assert "build/tiny/weights.safetensors: missing" in shown
    assert "0 of 1 tasks done" in shown
    assert re.search(r"✓ weights +tiny +\d+\.\d s  weights: weights\.safetensors", shown)
    assert again.rindex("\x1b[?25h") > again.rindex("\x1b[?25l"), "the cursor is back"


def test_two_stages_at_once_share_the_terminal(tiny: Project) -> None:
    """Each frame begins where the last one did. Two displays would count lines separately."""
    tiny.model("other", OTHER)
    shown = tiny.terminal("-n", "2", "weights")
    assert shown.count("\x1b[?25l") == 1, "one display"
    assert re.search(r"weights +tiny[^\n]*\n[^\n]*weights +other[^\n]*\n[^\n]*0 of 2 tasks done", plain(shown)) or (
        re.search(r"weights +other[^\n]*\n[^\n]*weights +tiny[^\n]*\n[^\n]*0 of 2 tasks done", plain(shown))
    )


def test_a_narrow_terminal_breaks_lines_between_words(mixed: tuple[Project, Run]) -> None:
    root, _ = mixed
    shown = plain(root.terminal("bad", "good", COLUMNS="80", CUDA_VISIBLE_DEVICES="")).replace("\n\n", "\n")
    lines = [line for line in shown.splitlines() if "tasks done" not in line and not re.search(r"\d+\.\d s of", line)]
    assert [line for line in lines if len(line) > 80] == []
    reason = next(index for index, line in enumerate(lines) if line.startswith("✗ accuracy"))
    assert lines[reason + 1].startswith("    ")
    words = re.sub(r"\s+", " ", shown)
    assert "if that is accurate enough for you, allow it by an [[accuracy.gate]]" in words
    assert re.search(r"lacks TensorRT 10 or newer .the package tensorrt. and an NVIDIA GPU", words)


def test_without_colors_an_empty_bar_is_empty(tmp_path: Path) -> None:
    """A bar without a length last time, and one at half of it."""
    program = (
        "import sys, time; from build_tasks.doit_plugin import display; d = display.create(sys.stdout, lambda: '')\n"
        "d.begin('a', 'no bar', None, ''); d.begin('b', 'half', 100.0, '')\n"
        "d.running['b'] = d.running['b']._replace(started=time.monotonic() - 50); time.sleep(0.4); d.close()"
    )
    command = shlex.join([sys.executable, "-c", program])
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "80"}
    run = subprocess.run(["script", "-qec", command, str(tmp_path / "typescript")], env=environment, cwd=ROOT,
                         stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    lines = plain(run.stdout).splitlines()
    assert {line.count("━") for line in lines if "no bar" in line} == {0}
    assert 6 in {line.count("━") for line in lines if "half" in line}


def test_a_log_hears_of_a_stage_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most stages report no progress while they trace or export."""
    monkeypatch.setattr(display, "LOG_INTERVAL", 0.2)
    out = io.StringIO()
    log = display.LogDisplay(out)
    log.begin("onnx:tiny", "onnx  tiny", 1.5, "")
    time.sleep(0.9)
    log.end("onnx:tiny")
    log.close()
    begin, *lines = out.getvalue().splitlines()
    assert begin.endswith("  onnx  tiny ..., 1.5 s last time")
    assert 1 <= len(lines) <= 3, "each pause is twice the one before"
    assert all(re.fullmatch(r"\S+   onnx  tiny +0\.\d s  runs", line) for line in lines)


def test_plan_and_the_line_of_a_terminal_count_the_same_tasks(mixed: tuple[Project, Run]) -> None:
    root, _ = mixed
    (root / "build/good/model.onnx").unlink()
    plan = root.built("plan", "good", CUDA_VISIBLE_DEVICES="").out.splitlines()[-1]
    count = sum(int(number) for number in re.findall(r"(?:^|, )(\d+) (?:to run|may run|not|up)", plan))
    shown = plain(root.terminal("good", CUDA_VISIBLE_DEVICES=""))
    assert {int(number) for number in re.findall(r"of (\d+) tasks done", shown)} == {count}


def test_the_end_says_where_the_models_are(mixed: tuple[Project, Run]) -> None:
    _, run = mixed
    line = "the models are in model_repository/; `doit serve` serves them, `doit report` shows all figures"
    assert run.out.count(line) == 1


def test_waiting_for_a_lock_is_not_silent(tiny: Project) -> None:
    folder = tiny / "build/.scratch"
    folder.mkdir(parents=True)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with tiny.start("weights:tiny") as process:
        seen = []
        for line in process.stdout or ():
            seen.append(line)
            if "waiting for another process, which has locked build/.scratch/" in line:
                os.close(descriptor)
    assert process.returncode == 0
    assert [line for line in seen if "waiting" in line][1:] == []
    assert seen[-1].endswith("1 built\n")


def test_a_terminal_with_nothing_to_do_gets_a_line(built_tiny: Project, copy_of: Callable[[Project], Project]) -> None:
    assert copy_of(built_tiny).terminal() == "17 up to date\r\n"


def test_what_is_no_stage_has_the_terminal_to_itself(
    built_tiny: Project, copy_of: Callable[[Project], Project]
) -> None:
    """Docker, pip and the server write to the terminal themselves."""
    project = copy_of(built_tiny)
    project.edit("models/tiny/model.toml", '"torchscript", "onnx"', '"torchscript"')
    shown = project.terminal("prune")
    assert "\x1b[?25l" not in shown
    assert plain(shown).startswith("  prune ...\nremoving model_repository/tiny_onnx: no spec describes it any more; ")


def test_a_dumb_terminal_gets_lines(tiny: Project) -> None:
    shown = tiny.terminal("weights:tiny", TERM="dumb")
    assert "\x1b" not in shown
    assert TIME.match(shown)


def test_an_engine_tells_its_phases(mixed: tuple[Project, Run]) -> None:
    """They are in its log here, because these builds take no time. They are shown like a download."""
    root, _ = mixed
    log = (root / "build/good/logs/rtx.good.log").read_text()
    assert re.search(r"^.+: [1-9]\d* steps$", log, re.MULTILINE)


def test_a_crash_shows_the_end_of_its_log_and_where_that_is(tiny: Project) -> None:
    tiny.edit("models/tiny/model.toml", "[accuracy]", 'converter = "convert.py:convert"\n\n[accuracy]')
    tiny.edit("models/tiny/model.toml", "\n\nconverter", "\nconverter")
    (tiny / "models/tiny/convert.py").write_text(
        "import os\ndef convert(state):\n    print('on the way', flush=True)\n    os.abort()\n"
    )
    run = tiny.doit("weights:tiny")
    assert run.code == 2
    assert "  | on the way\n" in run.out
    assert "(the whole log: build/tiny/logs/weights.tiny.log)" in run.out


def test_a_table_is_shown_to_whoever_asks_for_it(built_tiny: Project, copy_of: Callable[[Project], Project]) -> None:
    project = copy_of(built_tiny)
    shown = project.built("summary:tiny")
    assert shown.ran == []
    assert "relative L2" in shown.out
    assert "relative L2" not in project.built("tiny").out
