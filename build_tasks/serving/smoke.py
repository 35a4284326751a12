"""smoke: send the reference samples to a running server, over both protocols, and apply the gate to its outputs

    samples.json ─► every published model, over HTTP and gRPC ─► answers ─► the gate, beside reference.json ─► a row
                                                              ├► the version that answered: is it the newest build?
                                                              ├► other batch sizes, orders, many requests at once
                                                              └► latency of single requests

The exit code is 1 if a model is not loaded, is of another build, or does not pass the gate.
"""

import contextlib
import functools
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from doit.exceptions import TaskFailed

from build_tasks.errors import UserError
from build_tasks.formats import artifacts
from build_tasks.formats.ensemble_steps import steps_of
from build_tasks.json_files import read_json
from build_tasks.paths import REPOSITORY
from build_tasks.serving import sample_requests, triton_server
from build_tasks.serving.check import DECODER_TOLERANCE, ServedModel, served_models
from build_tasks.serving.triton_client import PROTOCOLS, Client, cast_to_input_types, require_server
from build_tasks.spec.ensemble_tables import short_form
from build_tasks.spec.model import Model
from build_tasks.tensors import IMAGE, Feed, batch_of
from build_tasks.text_table import format_table, terminal_width
from build_tasks.triton.repository import published_models
from build_tasks.verification import accuracy_samples, batch_check, gate, judged_artifacts, metrics, reference_outputs
from build_tasks.verification.class_outputs import class_outputs
from build_tasks.verification.ensemble_samples import load_samples
from build_tasks.verification.tolerance import relative_error

if TYPE_CHECKING:
    import numpy as np


PARAMS = [
    {
        "name": "url", "long": "url", "type": str, "default": f"localhost:{triton_server.Ports().http}",
        "help": "host:port of HTTP",
    },
    {"name": "grpc", "long": "grpc", "type": str, "default": "", "help": "host:port of gRPC; default: HTTP's port + 1"},
    {"name": "model", "long": "model", "type": str, "default": "", "help": "only this model of Triton's"},
]  # fmt: skip

COLUMNS = ("model", "protocol", "version", "error", "limit", "top-1", "median", "slowest", "result")


class SmokeRow(NamedTuple):
    """The row of one model and one protocol in the printed table, as text. The fields are those of COLUMNS."""

    model: str
    protocol: str
    version: str = "-"
    error: str = "-"
    limit: str = "-"
    top_1: str = "-"
    median: str = "-"
    slowest: str = "-"
    result: str = "ok"


class Accuracy(NamedTuple):
    """The relative L2 error that comes nearest to its limit, and how many samples keep their class, as text."""

    error: str
    limit: str
    top_1: str = "-"


def task(models: list[Model]) -> dict[str, Any]:
    """doit's task `smoke`."""
    return {
        "actions": [(smoke, [models])],
        "params": PARAMS,
        "io": {"capture": False},
        "doc": "On demand: send the reference samples to a running server, and judge its answers",
    }


def smoke(models: list[Model], url: str, grpc: str, model: str) -> TaskFailed | None:
    """doit's action: print a row for each model and protocol."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    if not host or not port.isdecimal():
        return TaskFailed(f"--url: expected host:port, found {url!r}")
    urls = {"HTTP": f"{host}:{port}", "gRPC": grpc or f"{host}:{int(port) + 1}"}
    published = published_models()
    selected = [served for served in served_models(models) if served.name in published and model in ("", served.name)]
    if not selected:
        expected = f"no model {model!r} of the specs" if model else "no model of the specs"
        return TaskFailed(f"{REPOSITORY}/ has {expected}; `doit` builds them")
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = {"": G_LOGGER.CRITICAL}
    rows: list[SmokeRow] = []
    failures = []
    count = f"{len(selected)} model{'s' if len(selected) > 1 else ''}"
    for protocol in PROTOCOLS:
        print(f"  sending the samples to {count} over {protocol}, at {urls[protocol]}", flush=True)
        try:
            require_server(protocol, urls[protocol])  # one message is enough
            client = Client(protocol, urls[protocol])
        except UserError as error:
            return TaskFailed(str(error))
        with contextlib.closing(client):
            for served in selected:
                print(f"  {served.name} ...", flush=True)
                try:
                    rows.append(smoke_model(client, served, models))
                except (UserError, FileNotFoundError) as error:
                    missing = error.filename if isinstance(error, FileNotFoundError) else ""  # it was not built here
                    reason = f"{missing} does not exist; `doit {served.model.name}` builds it" if missing else error
                    rows.append(SmokeRow(served.name, protocol, result="failed"))
                    failures.append(f"{served.name} ({protocol}): {reason}")
    rows.sort(key=lambda row: row.model)
    print(format_table(COLUMNS, rows, left=("result",), width=terminal_width(sys.stdout), keys=2), flush=True)
    return TaskFailed("; ".join(failures)) if failures else None


def smoke_model(client: Client, served: ServedModel, models: list[Model]) -> SmokeRow:
    """Send the samples to one model. `models` are all of them: steps of an ensemble may be those of other specs.

    Raises:
        UserError: If the server refuses a request, serves another build, or its answers do not pass the gate.
    """
    name, model, model_format = served
    if not client.ready(name):
        raise UserError("the server has not loaded it")
    if model_format == "ensemble" and model.steps:
        return smoke_own_ensemble(client, name, model, models)
    takes_images = model_format in model.ensemble_parts
    encoded = accuracy_samples.read_encoded(model) if takes_images else None
    if takes_images and encoded is None:
        return SmokeRow(name, client.protocol, result="skipped: the samples are tensors, not images")
    tensors, config = client.tensors(name), client.config(name)
    if sample_requests.fills_inputs(config):
        return SmokeRow(name, client.protocol, result="skipped: Triton itself fills inputs of the network")
    files = {key: model.artifact(f"{key}.json") for key in ("samples", "reference")}
    reference = reference_outputs.Reference({**files, "names": model.artifact("samples.txt")})
    preprocessed = reference.groups[0]
    if encoded is not None:
        reference.groups = [{IMAGE: encoded}]
    versions: set[str] = set()
    sequences = sample_requests.takes_sequences(client, config)
    send = functools.partial(sample_requests.send_batch, name, tensors, reference, versions, sequences=sequences)
    run = functools.partial(send, client)

    import statistics

    max_batch_size = int(config.get("max_batch_size", 0))
    single = sequences or sample_requests.takes_ragged(config)
    sizes = (1, 1) if single else batch_limits(model, model_format, max_batch_size)
    if model_format == "preprocess":
        ((images,),) = reference_outputs.run_in_batches(run, reference.groups, *sizes)
        accuracy = compare_with_timm(images, next(iter(preprocessed.values())))
    else:
        most = max_batch_size or sizes[1]  # of an open batch that only clients form
        largest = sample_requests.largest_request(reference.groups, most) if sizes[1] > sizes[0] else sizes[1]
        batches = batch_check.batches_between(sizes[0], batch_check.TUNED, largest)
        orders = batch_check.arrangements(len(reference.names), batches, repeated=batches)
        others = [reference_outputs.Batch(run, batch) for batch in orders]
        measured = reference.measure(
            run, *sizes, model.spec.output.top_k, batches=others, class_names=class_outputs(model)
        )
        accuracy = apply_gate(model, model_format, measured)
        differences = sample_requests.send_concurrently(
            lambda: functools.partial(send, Client(client.protocol, client.url)), reference, sizes
        )
        for index, worst in enumerate(differences):
            measured["outputs"][[*reference.outputs][index]]["worst_batch"] = worst
        try:
            apply_gate(model, model_format, measured)
        except UserError as error:
            raise UserError(f"{sample_requests.CONCURRENCY} requests at a time: {error}") from error
    if model_format == "ensemble":
        paths = artifacts_of_steps(model, models)
    else:
        paths = [model.artifact(file) for file in artifacts.artifacts_of(model, model_format)]
    check_build(paths, config, versions)
    seconds = sample_requests.request_latencies(run, reference.groups, sizes[0])
    median, slowest = (f"{value * 1e3:.1f} ms" for value in (statistics.median(seconds), max(seconds)))
    return SmokeRow(
        name,
        client.protocol,
        version=", ".join(sorted(versions)),
        error=accuracy.error,
        limit=accuracy.limit,
        top_1=accuracy.top_1,
        median=median,
        slowest=slowest,
    )


def smoke_own_ensemble(client: Client, name: str, model: Model, models: list[Model]) -> SmokeRow:
    """Send the samples of the stage `ensemble` to an ensemble of one's own steps, in batches and one at a time.

    Raises:
        UserError: As of smoke_model.
    """
    from polygraphy.comparator import IterationResult, RunResults

    files = {key: model.artifact(f"model.ensemble.{key}.json") for key in ("samples", "reference", "measured")}
    if not os.path.exists(files["reference"]):
        raise UserError(f"{files['reference']} does not exist; `doit ensemble:{model.name}` writes it")
    samples, results = load_samples(files["samples"]), RunResults.load(files["reference"])
    expected, perturbed = (results[index][1][0] for index in range(2))
    tensors, config = client.tensors(name), client.config(name)
    versions: set[str] = set()

    def send(batch: Feed) -> "list[np.ndarray]":
        version, outputs = client.infer(name, tensors, cast_to_input_types(batch, tensors))
        versions.add(version)
        return outputs

    record = read_json(files["measured"])
    smallest, largest = record["batches"]
    settings = record["gate"] | {"allow_untestable": True}
    names = [f"sample {index + 1}" for index in range(batch_of(samples))]
    accuracy = Accuracy("-", "-")
    for size in sorted({smallest, largest}, reverse=True):
        (outputs,) = reference_outputs.run_in_batches(send, [samples], smallest, size)
        answers = dict(zip(tensors.output_names, outputs, strict=True))
        numbers = [output for output, array in expected.items() if array.dtype.kind in "fiub"]
        found, reference, moved = (
            IterationResult({output: each[output] for output in numbers}) for each in (answers, expected, perturbed)
        )
        figures = metrics.compare_outputs(found, reference, moved, names)
        measured: metrics.Measurements = {"samples": len(names), "distinct": len(names), "outputs": figures}
        if reason := gate.gate_error(measured, settings, ""):
            raise UserError(reason)
        accuracy = Accuracy(*gate.nearest_limit(measured, settings)) if numbers else accuracy
    check_build(artifacts_of_steps(model, models), config, versions)
    version, result = ", ".join(sorted(versions)), "ok" if expected else "answers with texts, which are not compared"
    return SmokeRow(name, client.protocol, version, accuracy.error, accuracy.limit, result=result)


def batch_limits(model: Model, model_format: str, max_batch_size: int) -> tuple[int, int]:
    """The smallest and the largest batch in which the samples are sent.

    Args:
        max_batch_size: Of the server's ModelConfig; 0 if the model does not batch.
    """
    if model_format in model.ensemble_parts:
        return 1, min(reference_outputs.BATCH, max_batch_size)
    files = artifacts.artifacts_of(model, model_format)
    sizes = [reference_outputs.batch_sizes(read_json(model.artifact(f"{file}.signature.json"))) for file in files]
    smallest, largest = max(size for size, _ in sizes), min(size for _, size in sizes)
    return smallest, min(largest, max_batch_size) if max_batch_size else largest


def compare_with_timm(images: "np.ndarray", expected: "np.ndarray") -> Accuracy:
    """How far the images that a Python model preprocessed are from timm's.

    Raises:
        UserError: If they differ by more than DECODER_TOLERANCE.
    """
    difference = relative_error(images.astype("float32"), expected.astype("float32"))
    error, limit = (gate.format_metric("relative_l2", value) for value in (difference, DECODER_TOLERANCE))
    if not difference <= DECODER_TOLERANCE:  # NaN, too, is no success
        raise UserError(f"the preprocessed images differ from timm's: relative L2 error {error}, limit {limit}")
    return Accuracy(error, limit)


def apply_gate(model: Model, model_format: str, measured: metrics.Measurements) -> Accuracy:
    """The accuracy of a model's outputs.

    Raises:
        UserError: If they do not pass the gate.
    """
    gate_format = short_form(model.spec.ensemble) if model_format == "ensemble" else model_format
    assert gate_format is not None
    settings = gate.settings_of(model, gate_format, model.precision(gate_format))
    # accuracy.truth is not read here, so that the limits of a drop in true classes do not apply.
    rules = [{key: value for key, value in rule.items() if not key.endswith("_drop")} for rule in settings["gate"]]
    settings |= {"gate": rules, "allow_untestable": True}
    for output in measured["outputs"].values():
        if arithmetic := _arithmetic(model, gate_format):
            output["arithmetic"] = arithmetic
    if reason := gate.gate_error(measured, settings, ""):
        raise UserError(reason)
    error, limit = gate.nearest_limit(measured, settings)
    return Accuracy(error, limit, top_1=judged_artifacts.format_top1(measured, settings) or "-")


def _arithmetic(model: Model, model_format: str) -> str | None:
    """The rounding of fp32 at the server: that of a GPU if triton.device asks for one or if the build measured so."""
    if model_format == "tensorrt":
        return None
    if model.triton_keys.device == "gpu":
        return "tf32"
    file = artifacts.artifacts_of(model, model_format)[0]
    outputs = read_json(model.artifact(f"{file}.measured.json"))["outputs"]
    return next((output["arithmetic"] for output in outputs.values() if "arithmetic" in output), None)


def artifacts_of_steps(model: Model, models: list[Model]) -> list[str]:
    """Return the paths of what the steps of an ensemble are served from, in the order of its provenance."""
    files = {key: path for step in steps_of(model, models) for key, path in step.artifacts.items()}
    return [*files.values()]


def check_build(paths: list[str], config: dict[str, Any], versions: set[str]) -> None:
    """Compare the provenance in the server's ModelConfig with the newest build.

    Args:
        paths: The artifacts, in the order of the provenance.
        config: The server's ModelConfig.
        versions: The versions that answered.
    Raises:
        UserError: If a version that answered is of another build. A version without provenance is accepted.
    """
    newest = " ".join(read_json(f"{path}.verdict.json")["model"] for path in paths)
    for version in versions:
        build = config.get("parameters", {}).get(f"provenance.{version}.build", {}).get("string_value")
        if build not in (None, newest):
            raise UserError(f"version {version} is build {build[:12]}, and the newest build is {newest[:12]}")
