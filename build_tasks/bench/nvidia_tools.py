"""NVIDIA's own tools for a benchmark, if they are on the PATH.

    perf_analyzer    sends requests to a running Triton server ─► a CSV file                 ─► a Point
    trtexec          runs a plan                               ─► lines on standard output   ─► a Point

Sources: perf_analyzer's docs/cli.md and docs/measurements_metrics.md; the README of TensorRT's samples/trtexec.
"""

import base64
import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from build_tasks.bench.records import TRTEXEC, Point
from build_tasks.errors import UserError
from build_tasks.json_files import write_json
from build_tasks.tensors import Feed, batch_of, resize, take

if TYPE_CHECKING:
    import numpy as np

# Without a lower bound, pip installs an empty placeholder, 0.1.0, on a system whose C library is older.
INSTALL_HINT = (
    "pip install 'perf-analyzer>=2.60' (a glibc of 2.38 or newer: Debian 13, Ubuntu 24.04), or NVIDIA's image "
    "nvcr.io/nvidia/tritonserver:{}-py3-sdk"
)
MAX_REQUESTS = 8  # samples that perf_analyzer sends in turns
WINDOWS = 3  # number of windows that perf_analyzer measures; with fewer, it reports an unstable result
MIN_REQUESTS_PER_WINDOW = 2  # perf_analyzer may find no request in a shorter window
RETRY_FACTORS = (1, 4, 16)  # factors of the window's length, for retries if perf_analyzer finds no request in it
NO_REQUEST_MESSAGES = (
    "larger time window",
    "failed to find the requested model version",
)  # perf_analyzer has two messages for this case
TOOL_TIMEOUT = 200  # seconds beyond the measuring time. perf_analyzer 2.51 once sent nothing any more and did not end.


class ToolTimeoutError(UserError):
    """A tool that did not end."""


def batch_shapes(batch: Feed) -> dict[str, list[int]]:
    """The shape of a batch of each input, by name."""
    return {name: [*array.shape] for name, array in batch.items()}


def write_requests(arrays: Feed, batch: int, path: str, *, batched: bool) -> None:
    """Write what perf_analyzer sends in the place of random values, which token ids and masks must not be.

    Source: perf_analyzer's docs/input_data.md, "Input Data Format".

    Args:
        arrays: Samples of each input, as clients send them, by name.
        batch: Samples in a request.
        path: Of the file.
        batched: Whether perf_analyzer forms the batch of several entries of the file. If not, each entry is a batch.
    """
    samples = [take(arrays, [index]) for index in range(min(batch_of(arrays), MAX_REQUESTS))]
    entries = [
        {
            name: {"content": _content(array), "shape": list(array.shape[1:] if batched else array.shape)}
            for name, array in (feed if batched else resize(arrays, batch)).items()
        }
        for feed in (samples if batched else samples[:1])
    ]
    write_json(path, {"data": entries})


def _content(array: "np.ndarray") -> Any:
    if array.dtype == object:
        return [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in array.ravel()]
    return {"b64": base64.b64encode(array.tobytes()).decode("ascii")}


def run_tool(command: list[str], measuring_s: float = 0) -> str:
    """The output of a tool, both streams. The tool and its children end with this process.

    Args:
        measuring_s: Seconds for which the tool is to measure. It may take four times as long.
    Raises:
        ToolTimeoutError: If the tool does not end within TOOL_TIMEOUT seconds more.
    """
    limit = TOOL_TIMEOUT + 4 * measuring_s
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            return process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired as error:
            raise ToolTimeoutError(f"{command[0]} did not end within {limit:g} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def last_line(output: str) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "it printed nothing")


def perf_analyzer_version(release: str) -> str | None:
    """The version of perf_analyzer, None if it is not on the PATH.

    Raises:
        UserError: If it is on the PATH and does not start.
    """
    if shutil.which("perf_analyzer") is None:
        return None
    output = run_tool(["perf_analyzer", "--version"])  # the wheel's entry point has the exit code 0 in any case
    if match := re.search(r"Perf Analyzer Version (\S+(?: \(commit \w+\))?)", output):
        return match[1]
    hint = INSTALL_HINT.format(release)
    raise UserError(f"the perf_analyzer on the PATH does not start: {last_line(output)}; {hint}")


def perf_analyzer_point(
    model_format: str,
    model: str,
    url: str,
    batch: int,
    concurrency: int,
    seconds: float,
    folder: str,
    shapes: Mapping[str, Sequence[int]],
    data: str | None = None,
    *,
    batched: bool,
) -> Point:
    """Measure a model of a running server with `concurrency` requests at a time.

    Args:
        model: Its name at the server.
        url: host:port of HTTP.
        batch: Images in a request.
        folder: For temporary files.
        shapes: Of the inputs as the config has them, if it has open dimensions and there is no `data`.
        data: A file of `write_requests`. Without it, perf_analyzer sends random values.
        batched: Whether the server batches the model. If not, the batch is the first of its dims.
    Raises:
        UserError: If perf_analyzer fails.
    """
    command = ["perf_analyzer", "-m", model, "-u", url, "-i", "http", "-b", str(batch if batched else 1)]
    command += ["--concurrency-range", str(concurrency)]
    for name, shape in shapes.items():
        command += ["--shape", f"{name}:{','.join(map(str, shape))}"]
    command += ["--input-data", data] if data else []
    # The first requests at a batch size are the warm-up. Their latency gives the length of a window.
    warm_up = measure_longer([*command, "--request-count"], 3 * concurrency, f"{folder}/first.csv")
    window_s = max(seconds / WINDOWS, MIN_REQUESTS_PER_WINDOW * float(warm_up["p99 latency"]) / 1e6)
    # The windows may differ by any amount: the comparison with the last run shows how stable a figure is.
    command += ["--max-trials", str(WINDOWS), "--stability-percentage", "1000000", "--percentile", "99"]
    measuring_s = WINDOWS * window_s
    report = measure_longer([*command, "--measurement-interval"], window_s * 1e3, f"{folder}/perf.csv", measuring_s)
    images_per_s = round(float(report["Inferences/Second"]), 2)
    return Point(
        model_format=model_format,
        batch=batch,
        concurrency=concurrency,
        p50_ms=float(report["p50 latency"]) / 1e3,
        p99_ms=float(report["p99 latency"]) / 1e3,
        images_per_s=images_per_s if batched else images_per_s * batch,  # perf_analyzer counts requests then
        queue_ms=float(report["Server Queue"]) / 1e3,
        compute_ms=float(report["Server Compute Infer"]) / 1e3,
    )


def measure_longer(command: list[str], length: float, path: str, measuring_s: float = 0) -> dict[str, str]:
    """The row of `run_perf_analyzer`. The measurement is repeated and longer if there was no request in it.

    A perf_analyzer that does not end is started again as well.

    Args:
        command: It ends with the option that takes the length.
        length: Of the measurement, in the unit of that option.
        path: Of the CSV file.
        measuring_s: The length in seconds, where it is known.
    """
    for factor in RETRY_FACTORS:
        try:
            return run_perf_analyzer([*command, str(round(factor * length))], path, factor * measuring_s)
        except UserError as error:
            failure = error
            found_none = any(message in str(error) for message in NO_REQUEST_MESSAGES)
            if not (found_none or isinstance(error, ToolTimeoutError)):
                break
    raise failure


def run_perf_analyzer(command: list[str], path: str, measuring_s: float) -> dict[str, str]:
    """The only row of perf_analyzer's CSV file, by column. Times are in microseconds."""
    import csv

    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    output = run_tool([*command, "-f", path], measuring_s)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return next(csv.DictReader(file))
    except (OSError, StopIteration):
        raise UserError(f"perf_analyzer: {last_line(output)}") from None


def has_trtexec() -> bool:
    """Whether trtexec is on the PATH."""
    return shutil.which("trtexec") is not None


def trtexec_point(
    path: str,
    shapes: Mapping[str, Sequence[int]],
    batch: int,
    streams: int,
    seconds: float,
    profile: int = 0,
    files: Mapping[str, str] | None = None,
) -> Point:
    """Measure a plan on `streams` streams.

    Args:
        shapes: Of the inputs with their batch, if the plan has open dimensions.
        profile: Index of the optimization profile.
        files: A file with the values of a batch of each input. Without it, trtexec makes random values.
    Raises:
        UserError: If trtexec fails.
    """
    command = ["trtexec", f"--loadEngine={path}", f"--infStreams={streams}", "--noDataTransfers", "--percentile=99"]
    command += [f"--warmUp={round(seconds * 250)}", f"--duration={max(1, round(seconds))}"]
    texts = [f"{_quoted(name)}:{'x'.join(map(str, shape))}" for name, shape in shapes.items()]
    command += [f"--shapes={','.join(texts)}"] if texts else []
    command += [f"--useProfile={profile}"] if profile else []
    values = [f"{_quoted(name)}:{file}" for name, file in (files or {}).items()]
    command += [f"--loadInputs={','.join(values)}"] if values else []
    return parse_trtexec(run_tool(command, seconds), batch, streams)


def _quoted(name: str) -> str:
    """The name of a tensor as trtexec takes it: a colon would end it."""
    return f"'{name}'" if ":" in name else name


def parse_trtexec(output: str, batch: int, streams: int) -> Point:
    """The point that trtexec's output describes.

    Raises:
        UserError: If the output has no figures.
    """
    queries_per_s = re.search(r"Throughput: ([\d.]+) qps", output)
    times = re.search(r"GPU Compute Time: .*median = ([\d.]+) ms.*percentile\(99%\) = ([\d.]+) ms", output)
    if queries_per_s is None or times is None:
        errors = re.findall(r"\[E\] (.*)", output)
        raise UserError(f"trtexec: {errors[0].strip() if errors else last_line(output)}")
    return Point(
        model_format=TRTEXEC,
        batch=batch,
        concurrency=streams,
        p50_ms=float(times[1]),
        p99_ms=float(times[2]),
        images_per_s=round(float(queries_per_s[1]) * batch, 2),
    )
