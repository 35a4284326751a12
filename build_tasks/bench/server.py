"""A benchmark of a running Triton server: the formats of a model that it has loaded.

    server at --url ─► perf_analyzer, if it is on the PATH; else Triton's client for Python ─► Points ─► a Run

Concurrency is the number of requests at a time. The number of instances that share them, and the
batches that they form, depend on the server's configuration.
"""

import contextlib
import functools
from typing import NamedTuple

from build_tasks.bench import duration, nvidia_tools, workload
from build_tasks.bench.records import Options, Run, Timing
from build_tasks.bench.results import log_line, now, this_machine
from build_tasks.bench.workload import Measurement, Sweep
from build_tasks.errors import UserError, first_lines
from build_tasks.formats import artifacts
from build_tasks.runtime import atomic_files, worker
from build_tasks.runtime.stage import log_of
from build_tasks.spec.model import Model
from build_tasks.tensors import Signature, resize


class ServerSweep(NamedTuple):
    """The points of one model of the server. max_batch_size: 0 if its batch is the first of its dims."""

    sweep: Sweep
    max_batch_size: int


def measure(model: Model, options: Options) -> Run:
    """Measure the published formats of a model that the server has loaded.

    Raises:
        UserError: If no server answers.
    """
    from build_tasks.serving.sample_requests import takes_ragged, takes_sequences
    from build_tasks.serving.triton_client import Client, require_server

    require_server("HTTP", options.url)
    client = Client("HTTP", options.url)
    version = nvidia_tools.perf_analyzer_version(model.release)
    if version is None:
        log_line(
            model,
            "  perf_analyzer is not on the PATH: Triton's client for Python measures instead, and its own time counts. "
            f"To get perf_analyzer: {nvidia_tools.INSTALL_HINT.format(model.release)}",
        )
    run = Run(
        machine=this_machine(options.url),
        tools={"Triton": client.server_version(), "perf_analyzer": version or "none"},
        date=now(),
    )
    sweeps = []
    for model_format in options.formats:
        name = model.triton_name(model_format)
        if not client.ready(name):
            run.left_out.append(f"{model_format}: {name} is not loaded at {options.url}")
            continue
        config = client.config(name)
        max_batch_size = int(config.get("max_batch_size", 0))
        if takes_sequences(client, config) or takes_ragged(config):
            max_batch_size = min(max_batch_size, 1)  # a request has one sample there
        batch_of_dims = 0 if max_batch_size else signature_of(model, model_format)["inputs"][0]["shape"][0]
        fits = [b <= max_batch_size if max_batch_size else batch_of_dims in (b, -1) for b in options.batches]
        if batches := [batch for batch, taken in zip(options.batches, fits, strict=True) if taken]:
            sweep = Sweep(model_format, batches, options.concurrency, options.seconds)
            sweeps.append(ServerSweep(sweep, max_batch_size))
        else:
            limit = f"at most {max_batch_size}" if max_batch_size else f"{batch_of_dims}"
            run.left_out.append(f"{model_format}: {name} takes {limit} images, and none of {options.batches}")
    if sweeps:
        pace_of = functools.partial(measure_pace, model, options.url)
        log_line(model, duration.format_estimate([each.sweep for each in sweeps], options, pace_of))
    for sweep, max_batch_size in sweeps:
        try:
            if version:
                measurement = measure_with_perf_analyzer(model, sweep, options.url, max_batch_size)
            else:
                measurement = measure_with_client(model, sweep, options.url)
        except (UserError, worker.CrashError) as error:
            run.failed.append(f"{sweep.model_format}: {first_lines(error)}")
            continue
        run.points.extend(measurement.points)
        run.failed.extend(f"{sweep.model_format}: {reason}" for reason in measurement.failed)
        run.measured[sweep.model_format] = Timing(measurement.timed_by)
    return run


def measure_pace(model: Model, url: str, sweep: Sweep) -> duration.Pace | None:
    """The pace of a model of the server; None if it does not answer, which its own measurement will report."""
    samples, name = {"samples": model.artifact("samples.json")}, model.triton_name(sweep.model_format)
    task = f"bench:{model.name}"
    log = log_of(model, f"{task}.{sweep.model_format}")
    try:
        pace: duration.Pace = worker.call(duration.pace_of_server, samples, sweep, url, name, log=log, task=task)
    except (UserError, worker.CrashError):
        return None
    return pace


def measure_with_client(model: Model, sweep: Sweep, url: str) -> Measurement:
    """Measure a model of the server with Triton's client for Python, in a process of its own."""
    task = f"bench:{model.name}"
    measurement: Measurement = worker.call(
        workload.measure_server,
        {"samples": model.artifact("samples.json")},
        sweep,
        url,
        model.triton_name(sweep.model_format),
        log=log_of(model, f"{task}.{sweep.model_format}"),
        task=task,
    )
    return measurement


def measure_with_perf_analyzer(model: Model, sweep: Sweep, url: str, max_batch_size: int) -> Measurement:
    """Measure a model of the server with perf_analyzer. Of one concurrency, batches after a failure are not tried."""
    from build_tasks.serving.triton_client import Client, cast_to_input_types

    name, points, failed = model.triton_name(sweep.model_format), [], []
    # Random pixels are as good as others. Other inputs may have values that the network does not take.
    samples = workload.read_samples({"samples": model.artifact("samples.json")})
    with contextlib.closing(Client("HTTP", url)) as client:
        arrays = cast_to_input_types(samples, client.tensors(name))
    inputs = signature_of(model, sweep.model_format)["inputs"]
    has_open_dims = any(-1 in each["shape"][1 if max_batch_size else 0 :] for each in inputs)
    with atomic_files.scratch_dir() as folder:
        for concurrency in sweep.concurrency:
            for batch in sweep.batches:
                shapes, data = {}, None
                if model.spec.inputs:
                    data = f"{folder}/data.json"
                    nvidia_tools.write_requests(arrays, batch, data, batched=max_batch_size > 0)
                elif has_open_dims:
                    shapes = nvidia_tools.batch_shapes(resize(arrays, batch))
                if max_batch_size:
                    shapes = {input_name: shape[1:] for input_name, shape in shapes.items()}
                try:
                    point = nvidia_tools.perf_analyzer_point(
                        sweep.model_format,
                        name,
                        url,
                        batch,
                        concurrency,
                        sweep.seconds,
                        folder,
                        shapes,
                        data,
                        batched=max_batch_size > 0,
                    )
                except UserError as error:
                    failed.append(f"batch {batch} x {concurrency}: {error}")
                    break
                points.append(point)
                log_line(model, workload.format_point(point))
    return Measurement(points, failed, "perf_analyzer")


def signature_of(model: Model, model_format: str) -> Signature:
    """Signature of the model's first artifact. All plans of one model have identical tensors."""
    file = model.files(model_format)[0]
    return artifacts.read_signature({"signature": model.artifact(f"{file}.signature.json")})
