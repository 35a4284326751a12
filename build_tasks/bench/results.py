"""Compares the points of a benchmark with earlier ones, saves them, prints them, and draws them.

    Run ─► compare: with the plain trace, and with the last run of this machine ─► bench.json, bench.svg, a table
                    └► recommendation.py: lines for [triton] of the spec

bench.json keeps the last run of every machine that measured the model, this one or a server. Only runs of the same
machine are compared. If its tools have changed since, a line says so.
"""

import contextlib
import time

import msgspec

from build_tasks.bench import charts, recommendation
from build_tasks.bench.records import COMPILED, TRACE, Machine, Point, Proposal, Run, write_runs
from build_tasks.errors import UserError
from build_tasks.runtime import atomic_files, hardware, resources, worker
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import log_of
from build_tasks.spec.model import Model
from build_tasks.text_table import format_table, wrap

ONNX_RUNTIME = ("onnxruntime", "onnxruntime-gpu")
TOOLS = ("torch", *ONNX_RUNTIME, *hardware.TENSORRT, *hardware.TENSORRT_RTX)
COLUMNS = ("format", "batch", "concurrency", "p50", "p99", "images/s")
RATIOS = {"vs_trace": "vs trace", "vs_compile": "vs torch.compile", "vs_last": "vs last run"}  # fields of a point


def cores() -> int:
    """Whole cores that this process may use."""
    return max(1, int(resources.cores()))


def cpu() -> str:
    """The processor's name."""
    import platform

    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def this_machine(server: str | None = None) -> Machine:
    """This machine, and the server that is measured from it."""
    gpu = hardware.gpu()
    return Machine(cpu(), cores(), gpu.name if isinstance(gpu, hardware.Gpu) else None, server)


def now() -> str:
    """The time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def log_line(model: Model, line: str) -> None:
    """Print a line while the benchmark runs."""
    worker.listener(f"bench:{model.name}", line)


def compare(run: Run, last: Run | None) -> Run:
    """The run with the throughput of each point as a multiple of those of the trace, torch.compile, and the last run.

    Args:
        last: The last run of the same machine, None if there is none.
    """
    traces, compiled = (
        {point.load: point.images_per_s for point in run.points if point.model_format == other}
        for other in (TRACE, COMPILED)
    )
    last_points = {(point.model_format, *point.load): point.images_per_s for point in (last.points if last else [])}

    def ratio(point: Point, images_per_s: float | None) -> float | None:
        return round(point.images_per_s / images_per_s, 3) if images_per_s else None

    points = [
        msgspec.structs.replace(
            point,
            vs_trace=ratio(point, traces.get(point.load)),
            vs_compile=ratio(point, compiled.get(point.load)),
            vs_last=ratio(point, last_points.get((point.model_format, *point.load))),
        )
        for point in run.points
    ]
    return msgspec.structs.replace(run, points=points)


def proposals(model: Model, run: Run, limit_ms: float | None) -> dict[str, Proposal]:
    """Lines for the spec and their reasons, by format, for the formats that are served."""
    proposed = {}
    for model_format in model.served_formats:
        if points := [point for point in run.points if point.model_format == model_format]:
            proposed[model_format] = recommendation.propose(
                model_format,
                points,
                limit_ms=limit_ms,
                fixed_batch=model.largest_batch(model_format) == 0,
                at_server=run.machine.server is not None,
                cores=run.machine.cores,
            )
    return proposed


def write_results(model: Model, runs: list[Run], run: Run) -> list[str]:
    """Write bench.json with all runs, and bench.svg with `run` if matplotlib is installed. Returns the files' names."""
    names = ["bench.json", *(["bench.svg"] if versions(("matplotlib",)) else [])]
    with atomic_files.scratch_dir() as folder:
        write_runs(f"{folder}/bench.json", model.name, runs)
        if "bench.svg" in names:
            log = log_of(model, f"bench:{model.name}")
            try:
                worker.call(charts.plot_run, model.name, run, f"{folder}/bench.svg", log=log)
            except worker.CrashError as error:
                raise UserError(str(error)) from error
        for name in names:
            atomic_files.flush(f"{folder}/{name}")
            atomic_files.replace(f"{folder}/{name}", model.artifact(name))
    return names


def format_run(run: Run, last: Run | None, width: int | None = None) -> str:
    """The run as text: a table of its points, the machine, the tools, the points left out, and the proposals.

    Args:
        width: Characters of a line, None for any number.
    """
    hidden = [*([] if last else ["vs_last"]), *([] if COMPILED in run.measured else ["vs_compile"])]
    shown = [field for field in RATIOS if field not in hidden]
    rows = []
    for point in run.points:
        values = [getattr(point, field) for field in shown]
        ratios = ["-" if value is None else f"{value:.2f}" for value in values]
        latencies = [f"{value:.2f} ms" for value in (point.p50_ms, point.p99_ms)]
        throughput = f"{point.images_per_s:.1f}"
        rows.append([point.model_format, point.batch, point.concurrency, *latencies, throughput, *ratios])
    table = format_table((*COLUMNS, *(RATIOS[field] for field in shown)), rows, width=width, keys=3)
    lines = [table, wrap(format_machine(run), width)]
    if last:
        changed = [
            f"{tool} {last.tools.get(tool, 'none')} -> {run.tools.get(tool, 'none')}"
            for tool in sorted(run.tools.keys() | last.tools.keys())
            if last.tools.get(tool) != run.tools.get(tool)
        ]
        lines.append(f"the last run: {last.date}{', with ' + ', '.join(changed) if changed else ''}")
    lines += [wrap(f"– {reason}", width) for reason in run.left_out]
    for model_format, proposal in run.proposals.items():
        lines += ["", *(proposal.lines or [f"# {model_format}"]), *(f"# {reason}" for reason in proposal.reasons)]
    return "\n".join(lines)


def format_machine(run: Run) -> str:
    """The line on the machine or server, the versions of the tools, and how each format was timed."""
    tools = ", ".join(f"{tool} {version}" for tool, version in run.tools.items())
    if run.machine.server:
        return f"the server at {run.machine.server}; {tools}"
    formats_of: dict[str, list[str]] = {}
    for model_format, timing in run.measured.items():
        formats_of.setdefault(f"{timing.device}, by {timing.timed_by}", []).append(model_format)
    gpu = f", {run.machine.gpu}" if run.machine.gpu else ""
    timings = "; ".join(f"{', '.join(formats)} on {timing}" for timing, formats in formats_of.items())
    return f"{run.machine.cores} cores of {run.machine.cpu}{gpu}; {tools}; {timings}"
