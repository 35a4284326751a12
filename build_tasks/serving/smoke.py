"""smoke: a running server is sent the reference samples, by both protocols, and its answers are judged by the gate

samples.json ─► every published model, HTTP and gRPC ─► reference.json, under the gate ─► exit code 1 where it fails
                                                     └► latency
"""

import time
from typing import TYPE_CHECKING, Any

from doit.exceptions import TaskFailed

from build_tasks.errors import UserError
from build_tasks.formats import artifacts
from build_tasks.json_files import read_json
from build_tasks.paths import REPOSITORY
from build_tasks.serving import triton_server
from build_tasks.serving.check import DECODERS_APART
from build_tasks.serving.triton_client import PROTOCOLS, Client
from build_tasks.spec.model import Model
from build_tasks.text_table import format_table
from build_tasks.triton.repository import published_models
from build_tasks.verification import accuracy_samples, gate, metrics, reference_outputs
from build_tasks.verification.tolerance import relative_error

if TYPE_CHECKING:
    import numpy as np

REQUESTS = 20  # of one sample, for the latency

NOT_ASKED = "not asked: the samples are tensors"

COLUMNS = ("model", "protocol", "version", "error", "limit", "top-1", "median", "slowest", "verdict")

PARAMS = [
    {
        "name": "url", "long": "url", "type": str, "default": f"localhost:{triton_server.Ports().http}",
        "help": "host and port of HTTP",
    },
    {"name": "grpc", "long": "grpc", "type": str, "default": "", "help": "of gRPC; the port after HTTP's by default"},
    {"name": "model", "long": "model", "type": str, "default": "", "help": "one model of Triton's, and not all"},
]  # fmt: skip


def task(models: list[Model]) -> dict[str, Any]:
    return {
        "actions": [(smoke, [models])],
        "params": PARAMS,
        "io": {"capture": False},
        "doc": "On demand: send the reference samples to a running server, and judge its answers",
    }


def smoke(models: list[Model], url: str, grpc: str, model: str) -> TaskFailed | None:
    """doit's action: a row for each model and protocol."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    if not host or not port.isdecimal():
        return TaskFailed(f"--url: expected host:port, found {url!r}")
    urls = {"HTTP": f"{host}:{port}", "gRPC": grpc or f"{host}:{int(port) + 1}"}
    here = published_models()
    asked = [
        (m, model_format)
        for m in models
        for model_format in (*m.served_formats, *m.ensemble_parts)
        if m.triton_name(model_format) in here and model in ("", m.triton_name(model_format))
    ]
    if not asked:
        what = f"no model {model!r} of the specs" if model else "no model of the specs"
        return TaskFailed(f"{REPOSITORY}/ has {what}; `doit` builds them")
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = {"": G_LOGGER.CRITICAL}
    rows: list[list[str]] = []
    failed = []
    for protocol in PROTOCOLS:
        try:
            client = Client(protocol, urls[protocol])
            client.ready(asked[0][0].triton_name(asked[0][1]))
        except UserError as error:
            return TaskFailed(str(error))
        for m, model_format in asked:
            name = m.triton_name(model_format)
            try:
                row = asked_of(client, m, model_format)
            except UserError as error:
                row = {"verdict": f"refused: {error}"}
            if row["verdict"] not in ("ok", NOT_ASKED):
                failed.append(f"{name} ({protocol}): {row['verdict'].removeprefix('refused: ')}")
                row["verdict"] = "refused"
            rows.append([name, protocol, *(row.get(column, "-") for column in COLUMNS[2:])])
    print(format_table(COLUMNS, sorted(rows, key=lambda row: str(row[0]))), flush=True)
    return TaskFailed("; ".join(failed)) if failed else None


def asked_of(client: Client, model: Model, model_format: str) -> dict[str, str]:
    """The row of a model. UserError for what the server refuses, for another build, and beyond the gate."""
    name = model.triton_name(model_format)
    if not client.ready(name):
        raise UserError("it is not loaded")
    encoded = accuracy_samples.read_encoded(model) if model_format in model.ensemble_parts else None
    if model_format in model.ensemble_parts and encoded is None:
        return {"verdict": NOT_ASKED}
    tensors, config = client.tensors(name), client.config(name)
    files = {key: model.artifact(f"{key}.json") for key in ("samples", "reference")}
    known = reference_outputs.Reference({**files, "names": model.artifact("samples.txt")})
    prepared = known.samples
    if encoded is not None:
        known.samples = encoded
    versions = set()

    def run(batch: "np.ndarray") -> "list[np.ndarray]":
        version, answers = client.infer(name, tensors, typed(batch, tensors.type))
        versions.add(version)
        return answers

    import statistics

    sizes = batches(model, model_format, int(config.get("max_batch_size", 0)))
    if model_format == "preprocess":
        (answer,) = reference_outputs.run_in_batches(run, known.samples, *sizes)
        row = as_timm(answer, prepared)
    else:
        row = judged(model, model_format, known.measure(run, *sizes, model.spec.output.top_k))
    same_build(model, model_format, config, versions)
    seconds = latencies(run, known.samples, sizes[0])
    median, slowest = (f"{value * 1e3:.1f} ms" for value in (statistics.median(seconds), max(seconds)))
    return {"version": ", ".join(sorted(versions)), **row, "median": median, "slowest": slowest, "verdict": "ok"}


def typed(batch: "np.ndarray", triton_type: str) -> "np.ndarray":
    """A batch as the model takes it; fp16, say."""
    from tritonclient.utils import triton_to_np_dtype

    return batch if triton_type == "BYTES" else batch.astype(triton_to_np_dtype(triton_type))


def batches(model: Model, model_format: str, most: int) -> tuple[int, int]:
    """The smallest and the largest batch of the samples that are sent at once."""
    if model_format in model.ensemble_parts:
        return 1, min(reference_outputs.BATCH, most)
    sizes = []
    for artifact in artifacts.artifacts_of(model, model_format):
        sizes.append(reference_outputs.batch_sizes(read_json(model.artifact(f"{artifact}.signature.json"))))
    smallest, largest = max(size for size, _ in sizes), min(size for _, size in sizes)
    return smallest, min(largest, most) if most else largest


def as_timm(found: "np.ndarray", expected: "np.ndarray") -> dict[str, str]:
    """Pictures as a Python model prepares them, beside those that timm prepared. UserError where they differ."""
    error = relative_error(found.astype("float32"), expected.astype("float32"))
    figure, limit = (gate.format_metric("relative_l2", value) for value in (error, DECODERS_APART))
    if not error <= DECODERS_APART:
        raise UserError(f"the pictures differ from timm's by {figure}, limit {limit}")
    return {"error": figure, "limit": limit}


def judged(model: Model, model_format: str, measured: dict[str, Any]) -> dict[str, str]:
    """The figures of a model. UserError where the gate refuses them."""
    of = model.spec.ensemble if model_format == "ensemble" else model_format
    assert of is not None
    settings = gate.settings_of(model, of, model.precision(of))
    # What the samples show is not asked for here: agreement is judged.
    rules = [{key: value for key, value in rule.items() if not key.endswith("_drop")} for rule in settings["gate"]]
    settings |= {"gate": rules, "allow_untestable": True}
    if reason := gate.gate_error(measured, settings, ""):
        raise UserError(reason)
    row = {key: str(value) for key, value in metrics.key_figures(measured).items() if key == "top-1"}
    error, limit = gate.nearest_limit(measured, settings)
    return {**row, "error": error, "limit": limit}


def same_build(model: Model, model_format: str, config: dict[str, Any], versions: set[str]) -> None:
    """UserError where the server tells that what answers is another build than the one that was published last."""
    verdicts = []
    for file in artifacts.artifacts_of(model, model_format):
        verdicts.append(read_json(model.artifact(f"{file}.verdict.json"))["model"])
    for version in versions:
        told = config.get("parameters", {}).get(f"provenance.{version}.build", {}).get("string_value")
        if told not in (None, " ".join(verdicts)):
            raise UserError(f"version {version} is build {told[:12]}, and the newest is {' '.join(verdicts)[:12]}")


def latencies(run: reference_outputs.RunBatch, samples: "np.ndarray", size: int) -> list[float]:
    """Seconds of single requests of the smallest batch."""
    import numpy as np

    seconds = []
    for index in range(REQUESTS):
        batch = np.resize(samples[index % len(samples)][None], (size, *samples.shape[1:]))
        started = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - started)
    return seconds
