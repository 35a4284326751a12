"""NVIDIA's own tools for a benchmark, where they are on the PATH.

    perf_analyzer    loads a running Triton server; a CSV file
    trtexec          runs a plan; lines on its standard output

Sources: perf_analyzer's docs/cli.md and docs/measurements_metrics.md; trtexec's, in TensorRT's samples/trtexec.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from build_tasks.errors import UserError
from build_tasks.json_files import read_json
from build_tasks.spec.model import Model
from build_tasks.tensors import INPUT, layout_dims

Point = dict[str, Any]

# An unbounded requirement would get an empty placeholder, 0.1.0, where the C library is older.
GET_IT = (
    "pip install 'perf-analyzer>=2.60' (a glibc of 2.38 or newer: Debian 13, Ubuntu 24.04), or NVIDIA's image "
    "nvcr.io/nvidia/tritonserver:{}-py3-sdk"
)
WINDOWS = 3  # that perf_analyzer measures; it calls a result of fewer unstable
ROOM = 2  # requests that a window has room for, or perf_analyzer finds none in it
LONGER = (1, 4, 16)  # times as long, where it finds none all the same; which it says in two ways
NONE_FOUND = ("larger time window", "failed to find the requested model version")
PATIENCE = 600  # seconds for a tool to end


def one_input(model: Model) -> list[int]:
    """The shape of one input, without the batch."""
    return layout_dims(read_json(model.artifact("preprocessing.json"))["input_size"], model.spec.input.format)


def output(command: list[str]) -> str:
    """What a tool says, both streams; it and its children end with this process. UserError where it takes for ever."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            return process.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{command[0]} did not end within {PATIENCE} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")


def perf_analyzer(release: str) -> str | None:
    """Its version, None where it is not on the PATH. UserError where it is, and does not start."""
    if shutil.which("perf_analyzer") is None:
        return None
    said = output(["perf_analyzer", "--version"])  # the wheel's entry point has the exit code 0 in any case
    if found := re.search(r"Perf Analyzer Version (\S+(?: \(commit \w+\))?)", said):
        return found[1]
    raise UserError(f"the perf_analyzer on the PATH does not start: {last_line(said)}; {GET_IT.format(release)}")


def server_point(
    model: str, url: str, batch: int, concurrency: int, seconds: float, folder: str, shape: Sequence[int] | None
) -> Point:
    """A model of a running server, under that many requests at a time. UserError for what perf_analyzer refuses.

    batch: images of a request; 0 of a model whose batch stands in its dims.
    folder: for drafts.
    shape: of one input as its config has it, where that has open dimensions.
    """
    line = ["perf_analyzer", "-m", model, "-u", url, "-i", "http", "-b", str(batch or 1)]
    line += ["--concurrency-range", str(concurrency)]
    line += ["--shape", f"{INPUT}:{','.join(map(str, shape))}"] if shape else []
    # The first requests of a batch size are the warm-up. They tell how long a window must be, too.
    first = longer_report([*line, "--request-count"], 3 * concurrency, f"{folder}/first.csv")
    window = max(seconds / WINDOWS, ROOM * float(first["p99 latency"]) / 1e6)
    # Windows as unlike as they may be: how much a figure wavers is told by the comparison with the last run.
    line += ["--max-trials", str(WINDOWS), "--stability-percentage", "1000000", "--percentile", "99"]
    found = longer_report([*line, "--measurement-interval"], window * 1e3, f"{folder}/perf.csv")
    return {
        "p50_ms": float(found["p50 latency"]) / 1e3,
        "p99_ms": float(found["p99 latency"]) / 1e3,
        "images_per_s": round(float(found["Inferences/Second"]), 2),
        "queue_ms": float(found["Server Queue"]) / 1e3,
        "compute_ms": float(found["Server Compute Infer"]) / 1e3,
    }


def longer_report(line: list[str], size: float, path: str) -> dict[str, str]:
    """As `report`, of a measurement that is longer where perf_analyzer finds no request in it.

    size: of the measurement, in the unit of the option that the line ends with.
    """
    for longer in LONGER[:-1]:
        try:
            return report([*line, str(round(longer * size))], path)
        except UserError as error:
            if not any(said in str(error) for said in NONE_FOUND):
                raise
    return report([*line, str(round(LONGER[-1] * size))], path)


def report(line: list[str], path: str) -> dict[str, str]:
    """The one row of perf_analyzer's CSV, times in microseconds."""
    import csv

    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    said = output([*line, "-f", path])
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return next(csv.DictReader(file))
    except (OSError, StopIteration):
        raise UserError(f"perf_analyzer: {last_line(said)}") from None


def has_trtexec() -> bool:
    return shutil.which("trtexec") is not None


def trtexec_point(path: str, shape: Sequence[int] | None, batch: int, streams: int, seconds: float) -> Point:
    """A plan, on that many streams. UserError for what trtexec refuses.

    shape: of the whole input, where the plan's has open dimensions.
    """
    line = ["trtexec", f"--loadEngine={path}", f"--infStreams={streams}", "--noDataTransfers", "--percentile=99"]
    line += [f"--warmUp={round(seconds * 250)}", f"--duration={max(1, round(seconds))}"]
    line += [f"--shapes={INPUT}:{'x'.join(map(str, shape))}"] if shape else []
    return trtexec_figures(output(line), batch)


def trtexec_figures(said: str, batch: int) -> Point:
    """What trtexec prints at its end, as a point's figures."""
    rate = re.search(r"Throughput: ([\d.]+) qps", said)
    times = re.search(r"GPU Compute Time: .*median = ([\d.]+) ms.*percentile\(99%\) = ([\d.]+) ms", said)
    if rate is None or times is None:
        errors = re.findall(r"\[E\] (.*)", said)
        raise UserError(f"trtexec: {errors[0].strip() if errors else last_line(said)}")
    return {
        "p50_ms": float(times[1]),
        "p99_ms": float(times[2]),
        "images_per_s": round(float(rate[1]) * batch, 2),
    }
