"""bench: how fast the artifacts are -> bench.json for machines, bench.svg for people

    trace, model.pt, model.onnx, plans ─► load.py, a process each ─┐
    a running server (--url) ─► perf_analyzer ─────────────────────┴► points ─► beside the last run and the plain trace
                                                                         └► advice.py: lines for [triton] of the spec

On demand, and run whenever it is asked for, since what was measured says nothing of what would be measured now. See
bench_server.py for servers, and bench_report.py for what becomes of the points.
"""

import contextlib
import math
import os
import time
from typing import Any

from doit.exceptions import TaskFailed

from build_tasks.bench import nvidia_tools, results, server, workload
from build_tasks.bench.results import ONNX_RUNTIME, TRACE, TRTEXEC, Run
from build_tasks.errors import UserError, first_lines, with_suggestion
from build_tasks.formats import artifacts, pytorch_network
from build_tasks.runtime import atomic_files, hardware, worker
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import Paths, Settings, log_of
from build_tasks.spec.model import Model
from build_tasks.stages import engine

BATCHES = (1, 8, 32, 128)  # as far as the spec serves them, and what it serves at most
CONCURRENCY = (1, 2, 4)  # instances; on a CPU no more than cores
IN_FLIGHT = (1, 4, 16)  # requests at a time, of a server
LOADING = 3  # seconds, of a format

PARAMS = [
    {"name": "batches", "long": "batches", "type": str, "default": "", "help": "such as 1,8,32"},
    {
        "name": "concurrency", "long": "concurrency", "type": str, "default": "",
        "help": "instances, such as 1,2,4; at a server, requests at a time",
    },
    {"name": "seconds", "long": "seconds", "type": str, "default": "2", "help": "of each point"},
    {"name": "formats", "long": "formats", "type": str, "default": "", "help": f"such as onnx,{TRACE}; all without it"},
    {"name": "url", "long": "url", "type": str, "default": "", "help": "host and port (HTTP) of a running server"},
    {
        "name": "latency", "long": "latency", "type": str, "default": "",
        "help": "milliseconds that p99 may have in what is proposed",
    },
]  # fmt: skip


def task(model: Model) -> dict[str, Any]:
    needed = {path for model_format in here(model) for path in inputs(model, model_format).values()}
    return {
        "name": model.name,
        "actions": [(bench, [model])],
        "file_dep": sorted(needed),
        "uptodate": [False],
        "params": PARAMS,
        "io": {"capture": False},
        "doc": "Latency and throughput of every format, and what they propose for [triton] -> bench.json, bench.svg",
    }


def formats(model: Model) -> list[str]:
    """What can be measured of a model, on whichever machine; the plain trace first, which the others are held to."""
    of_network = [] if model.spec.from_onnx else [TRACE]
    return [*of_network, *model.spec.formats]


def missing_requirements(model: Model, model_format: str) -> str | None:
    """What this machine lacks to run a format; None if nothing."""
    packages = {TRACE: ("torch",), "torchscript": ("torch",), "onnx": ONNX_RUNTIME}.get(model_format)
    if packages and hardware.version(packages) is None:
        return f"the package {packages[0]} (pip install -r requirements.txt)"
    if model_format == "tensorrt":
        return hardware.missing_requirements(model.plans[plan(model)])
    if model_format == "rtx":
        gpu = hardware.gpu()
        return hardware.missing_requirements_rtx() or (gpu if isinstance(gpu, str) else None)
    return None


def here(model: Model) -> list[str]:
    return [model_format for model_format in formats(model) if not missing_requirements(model, model_format)]


def plan(model: Model) -> str:
    """The plan of this machine's GPU, of several."""
    ours = [file for file, capability in model.plans.items() if not hardware.missing_requirements(capability)]
    return (ours or artifacts.present_artifacts(model, "tensorrt"))[0]


def inputs(model: Model, model_format: str) -> Paths:
    samples = {"samples": model.artifact("samples.json")}
    if model_format == TRACE:
        return {**samples, "weights": model.weights}
    file = (
        "model.rtx"
        if model_format == "rtx"
        else plan(model)
        if model_format == "tensorrt"
        else model.files(model_format)[0]
    )
    return {**samples, "model": model.artifact(file), "signature": model.artifact(f"{file}.signature.json")}


def bench(
    model: Model, batches: str, concurrency: str, seconds: str, formats: str, url: str, latency: str
) -> dict[str, Any] | TaskFailed:
    """doit's action: measure, compare, propose; and leave both files."""
    started = time.perf_counter()
    try:
        options = asked(model, batches, concurrency, seconds, formats, url, latency)
        known = results.runs(model.artifact("bench.json"))
        os.makedirs(engine.GPU, exist_ok=True)
        with atomic_files.locked(engine.GPU):  # another benchmark, or an engine's build, would be measured as well
            run = server.measured(model, options) if url else on_machine(model, options)
        if not run["points"]:
            raise UserError("; ".join(run["failed"] or run["left out"]))
        last = next((each for each in known if each["machine"] == run["machine"]), None)
        results.compare(run, last)
        run["proposals"] = results.proposals(model, run, options["latency"])
        drawn = results.keep(model, [*(each for each in known if each is not last), run], run)
    except UserError as error:
        return TaskFailed(str(error))
    print(results.told(run, last), flush=True)
    if run["failed"]:
        return TaskFailed(f"not all could be measured: {'; '.join(run['failed'])}")
    best = max(run["points"], key=lambda point: float(point["images_per_s"]))
    return {
        "seconds": round(time.perf_counter() - started, 3),
        "notes": {
            "best": f"{best['format']} {best['images_per_s']:.1f} images/s (batch {best['batch']} x "
            f"{best['concurrency']})",
            "files": ", ".join(["bench.json", *drawn]),
        },
    }


def asked(
    model: Model, batches: str, concurrency: str, seconds: str, names: str, url: str, latency: str
) -> dict[str, Any]:
    """The options of the command line, checked, with what holds without them. UserError for what they cannot be."""
    known = [model_format for model_format in formats(model) if not url or model_format in model.served_formats]
    if not known:
        raise UserError(f"no format of {model.name} is a model of Triton's")
    wanted = names.split(",") if names else known
    for name in wanted:
        if name not in known:
            raise UserError(f"--formats: expected some of {', '.join(known)}, found {with_suggestion(name, known)}")
    host, _, port = url.removeprefix("http://").rpartition(":")
    if url and not (host and port.isdecimal()):
        raise UserError(f"--url: expected host:port, found {url!r}")
    usual = IN_FLIGHT if url else CONCURRENCY
    most = math.inf if url or isinstance(hardware.gpu(), hardware.Gpu) else results.cores()
    return {
        "batches": whole("--batches", batches) or usual_batches(model),
        "concurrency": whole("--concurrency", concurrency) or [count for count in usual if count <= most],
        "seconds": positive("--seconds", seconds),
        "formats": wanted,
        "url": f"{host}:{port}" if url else "",
        "latency": positive("--latency", latency) if latency else None,
    }


def usual_batches(model: Model) -> list[int]:
    """Some up to the largest of every format, and that; of an artifact with a fixed batch it alone."""
    found: set[int] = set()
    for model_format in model.spec.formats:
        largest = model.spec.profile[2] if model_format == "rtx" else model.largest_batch(model_format)
        found |= {*(batch for batch in BATCHES if batch < largest), largest or model.spec.onnx.batch_size}
    return sorted(found)


def whole(option: str, given: str) -> list[int]:
    """Numbers of a list such as 1,8,32, ascending; none where nothing is given."""
    if not given:
        return []
    if not all(part.strip().isdecimal() and int(part) for part in given.split(",")):
        raise UserError(f"{option}: expected whole numbers from 1 on, such as 1,8,32, found {given!r}")
    return sorted({int(part) for part in given.split(",")})


def positive(option: str, given: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(given)) < math.inf:
            return value
    raise UserError(f"{option}: expected a number above 0, found {given!r}")


def on_machine(model: Model, options: dict[str, Any]) -> Run:
    """Every format in a process of its own: none has another's memory and threads, and a crash is one format's."""
    run = results.new_run(None)
    plans: dict[str, list[int]] = {}
    for model_format in options["formats"]:
        if lacks := missing_requirements(model, model_format):
            run["left out"].append(f"{model_format}: this machine lacks {lacks}")
        elif fitting := [batch for batch in options["batches"] if fits(model, model_format, batch)]:
            plans[model_format] = fitting
        else:
            run["left out"].append(
                f"{model_format}: it takes none of the batches {', '.join(map(str, options['batches']))}"
            )
    count = sum(map(len, plans.values())) * len(options["concurrency"])
    results.foretell(model, count, options, LOADING * len(plans))
    for model_format, batches in plans.items():
        settings = {
            **{key: options[key] for key in ("concurrency", "seconds")},
            "format": model_format,
            "batches": batches,
            "device": model.triton("device"),
            "cores": results.cores(),
            **(network(model) if model_format == TRACE else {}),
        }
        paths = inputs(model, model_format)
        name = f"bench:{model.name}"
        log = log_of(model, f"{name}.{model_format}")
        try:
            found = worker.call(workload.measured, paths, settings, log=log, task=name)
        except (UserError, worker.CrashError) as error:
            run["failed"].append(f"{model_format}: {first_lines(error)} (log: {log})")
            continue
        run["points"] += found.pop("points")
        run["failed"] += [f"{model_format}: {reason}" for reason in found.pop("failed")]
        run["measured"][model_format] = {**found, "sha256": digest(paths.get("model", model.weights))}
        if model_format == "tensorrt" and nvidia_tools.has_trtexec():
            by_trtexec(model, paths, batches, options, run)
    return run


def network(model: Model) -> Settings:
    """What decides the plain trace."""
    return {
        "network": pytorch_network.settings_of(model),
        "interface": pytorch_network.interface_of(model),
        "shape": model.spec.input.shape,
    }


def fits(model: Model, model_format: str, batch: int) -> bool:
    """Whether an artifact takes a batch; open ones take also what the spec does not serve."""
    if model_format == TRACE:
        return True
    known = artifacts.read_signature(inputs(model, model_format))
    tensor = known["inputs"][0]
    if profile := known.get("profile"):
        return bool(profile[tensor["name"]]["min"][0] <= batch <= profile[tensor["name"]]["max"][0])
    return tensor["shape"][0] in (-1, batch)


def by_trtexec(model: Model, paths: Paths, batches: list[int], options: dict[str, Any], run: Run) -> None:
    """The plan once more, by NVIDIA's own tool."""
    is_open = bool(artifacts.read_signature(paths).get("profile"))
    for concurrency in options["concurrency"]:
        for batch in batches:
            shape = [batch, *nvidia_tools.one_input(model)] if is_open else None
            try:
                found = nvidia_tools.trtexec_point(paths["model"], shape, batch, concurrency, options["seconds"])
            except UserError as error:
                run["failed"].append(str(error))
                return
            run["points"].append({"format": TRTEXEC, "batch": batch, "concurrency": concurrency, **found})
            results.say(model, workload.told(run["points"][-1]))
    run["measured"][TRTEXEC] = {"device": "cuda", "timed_by": TRTEXEC}
