"""A benchmark's points: beside the plain trace and the last run, kept, told, drawn.

    {"model": ..., "runs": [{"machine", "tools", "date", "measured", "points", "failed", "left out", "proposals"}]}

bench.json keeps the last run of every machine, hardware or server, that the model was measured on: only runs of the
same are compared. Where the tools of the last run were others, that is told beside the ratios.
"""

import contextlib
import json
import time
from typing import Any

from build_tasks import figures
from build_tasks.bench import recommendation, workload
from build_tasks.errors import UserError
from build_tasks.json_files import write_json
from build_tasks.runtime import atomic_files, hardware, resources, worker
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import log_of
from build_tasks.spec.model import Model
from build_tasks.text_table import format_table

ONNX_RUNTIME = ("onnxruntime", "onnxruntime-gpu")
TRACE, TRTEXEC = "trace", "trtexec"  # formats of their own here: the plain fp32 trace; a plan by NVIDIA's tool
TOOLS = ("torch", *ONNX_RUNTIME, *hardware.TENSORRT, *hardware.TENSORRT_RTX)
COLUMNS = ("format", "batch", "concurrency", "p50", "p99", "images/s", "vs trace", "vs last run")

Point = dict[str, Any]
Run = dict[str, Any]


def cores() -> int:
    """Whole ones that this process may use."""
    return max(1, int(resources.cores()))


def cpu() -> str:
    """The processor's name."""
    import platform

    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def new_run(server: str | None) -> Run:
    """A run without its points. `machine` is what two runs must have in common to be compared."""
    gpu = hardware.gpu()
    return {
        "machine": {
            "cpu": cpu(),
            "cores": cores(),
            "gpu": gpu.name if isinstance(gpu, hardware.Gpu) else None,
            "server": server,
        },
        "tools": versions(TOOLS),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "measured": {},
        "points": [],
        "failed": [],
        "left out": [],
    }


def say(model: Model, line: str) -> None:
    worker.audience(f"bench:{model.name}", line)


def foretell(model: Model, count: int, options: dict[str, Any], loading: float) -> None:
    """How long it will take, before it begins."""
    seconds = count * options["seconds"] * (1 + workload.WARM_UP_SHARE) + loading
    each = f"{options['seconds']:g} s each, and a warm-up"
    say(model, f"  {count} points, {each}: about {seconds:.0f} s, and longer where a batch takes long")


def runs(path: str) -> list[Run]:
    """The last run of each machine, as bench.json keeps them; none where there is no file, or one that is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(path, encoding="utf-8") as file:
        return [run for run in json.load(file)["runs"] if isinstance(run["machine"], dict)]
    return []


def place(point: Point) -> tuple[Any, ...]:
    """What two points must have in common to be compared."""
    return tuple(point.get(key) for key in ("batch", "concurrency", "threads"))


def compare(run: Run, last: Run | None) -> None:
    """Into each point its throughput as a multiple of the plain trace's, and of the last run's, where there is one."""
    traces = {place(point): point["images_per_s"] for point in run["points"] if point["format"] == TRACE}
    before = {(p["format"], *place(p)): p["images_per_s"] for p in (last["points"] if last else [])}
    for point in run["points"]:
        for key, known in (
            ("vs_trace", traces.get(place(point))),
            ("vs_last", before.get((point["format"], *place(point)))),
        ):
            if known:
                point[key] = round(point["images_per_s"] / known, 3)


def proposals(model: Model, run: Run, limit_ms: float | None) -> dict[str, Any]:
    """By format, for those that are served: lines for the spec, and reasons."""
    found = {}
    for model_format in model.served_formats:
        if points := [point for point in run["points"] if point["format"] == model_format]:
            proposal = recommendation.proposal(
                model_format,
                points,
                limit_ms=limit_ms,
                fixed=model.largest_batch(model_format) == 0,
                at_server=run["machine"]["server"] is not None,
                cores=run["machine"]["cores"],
            )
            found[model_format] = proposal._asdict()
    return found


def keep(model: Model, every: list[Run], run: Run) -> list[str]:
    """bench.json of all machines' runs, and a picture of this one where matplotlib is installed; its name."""
    drawn = ["bench.svg"] if versions(("matplotlib",)) else []
    with atomic_files.scratch_dir() as folder:
        write_json(f"{folder}/bench.json", {"model": model.name, "runs": every})
        if drawn:
            try:
                worker.call(draw, model.name, run, f"{folder}/bench.svg", log=log_of(model, f"bench:{model.name}"))
            except worker.CrashError as error:
                raise UserError(str(error)) from error
        for name in ("bench.json", *drawn):
            atomic_files.flush(f"{folder}/{name}")
            atomic_files.replace(f"{folder}/{name}", model.artifact(name))
    return drawn


def told(run: Run, last: Run | None) -> str:
    """The points as a table, where they were measured, what was not, and what follows."""
    rows = []
    for point in run["points"]:
        ratios = [f"{point[key]:.2f}" if key in point else "-" for key in ("vs_trace", "vs_last")]
        times = [f"{point[key]:.2f} ms" for key in ("p50_ms", "p99_ms")]
        rows.append(
            [point["format"], point["batch"], point["concurrency"], *times, f"{point['images_per_s']:.1f}", *ratios]
        )
    lines = [format_table(COLUMNS, rows), where(run)]
    if last:
        changed = [
            f"{tool} {last['tools'].get(tool)} -> {run['tools'].get(tool)}"
            for tool in sorted(run["tools"].keys() | last["tools"].keys())
            if last["tools"].get(tool) != run["tools"].get(tool)
        ]
        lines.append(f"the last run: {last['date']}{', with ' + ', '.join(changed) if changed else ''}")
    lines += [f"– {reason}" for reason in run["left out"]]
    for model_format, proposal in run["proposals"].items():
        lines += ["", *(proposal["lines"] or [f"# {model_format}"]), *(f"# {reason}" for reason in proposal["reasons"])]
    return "\n".join(lines)


def where(run: Run) -> str:
    known = run["machine"]
    tools = ", ".join(f"{tool} {version}" for tool, version in run["tools"].items())
    if known["server"]:
        return f"the server at {known['server']}; {tools}"
    timed: dict[str, list[str]] = {}
    for model_format, how in run["measured"].items():
        timed.setdefault(f"{how['device']}, by {how['timed_by']}", []).append(model_format)
    gpu = f", {known['gpu']}" if known["gpu"] else ""
    how = "; ".join(f"{', '.join(formats)} on {way}" for way, formats in timed.items())
    return f"{known['cores']} cores of {known['cpu']}{gpu}; {tools}; {how}"


def draw(model: str, run: Run, path: str) -> None:
    """Throughput and latency over the batch, as a picture of the same bytes for the same figures."""
    from matplotlib import ticker

    pyplot = figures.pyplot(model)
    colours = {
        TRACE: "#666666", "torchscript": "#b3261e", "onnx": "#1f5fa8", "tensorrt": "#2a7f62", TRTEXEC: "#8ac2ab",
        "rtx": "#b8860b",
    }  # fmt: skip
    styles = ["solid", "dashed", "dotted", "dashdot"]
    figure, (rate, latency) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    counts = sorted({point["concurrency"] for point in run["points"]})
    for model_format, colour in colours.items():
        for index, count in enumerate(counts):
            line = [p for p in run["points"] if (p["format"], p["concurrency"]) == (model_format, count)]
            if not line:
                continue
            line.sort(key=lambda point: int(point["batch"]))
            batches = [point["batch"] for point in line]
            look = {"color": colour, "linestyle": styles[index % len(styles)], "marker": "o", "markersize": 3}
            rate.plot(batches, [point["images_per_s"] for point in line], label=f"{model_format} x {count}", **look)
            p50, p99 = ([point[key] for point in line] for key in ("p50_ms", "p99_ms"))
            latency.plot(batches, p50, **look)
            latency.vlines(batches, p50, p99, color=colour, linewidth=1)
    for axes, title in ((rate, "images a second"), (latency, "milliseconds of a batch: p50, and up to p99")):
        axes.set_xscale("log", base=2)
        every = sorted({point["batch"] for point in run["points"]})
        axes.set_xticks(every, [str(batch) for batch in every])
        axes.minorticks_off()
        axes.set_xlabel("batch")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    rate.set_ylim(bottom=0)
    latency.set_yscale("log")
    latency.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    latency.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    latency.minorticks_off()
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    known = run["machine"]
    hardware = f"the server at {known['server']}" if known["server"] else known["gpu"] or known["cpu"]
    figure.suptitle(
        f"{model} on {hardware} (x: {'requests at a time' if known['server'] else 'instances'})", fontsize=9
    )
    figures.save_svg(figure, path)
