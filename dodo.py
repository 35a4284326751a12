"""The tasks that build a Triton model repository from the specs in models/.

    weights ──► torchscript ──► onnx ──► precision ──► engine, rtx     build/<model>/
       │ │           │ └► cast   │           │           │
       │ └► aoti ────┤    │      │           │           │
       └► reference ─┴────┴──────┴► measure ─┴───────────┘
                                       ├─► summary
                                    accuracy
                                       │
                labels ─► config ─► publish           model_repository/<model>, <model>_onnx, <model>_trt, <model>_aoti
                             │         │                               <model>_preprocess, <model>_ensemble
                           client    check, smoke, serve

On demand: layers (the error after each node), repair (the nodes that must stay in fp32), compare (the accuracy of every
precision), bench (latency and throughput). One task per stage and model: `doit list` shows them, `doit NAME` builds one
model, `doit STAGE:NAME` one stage.
"""

import atexit
import gc
import os
from collections.abc import Iterator
from typing import Any

from doit.exceptions import InvalidDodoFile

from build_tasks.doit_plugin.noop_cache import noop_cache
from build_tasks.doit_plugin.reporter import Reporter
from build_tasks.doit_plugin.required_models import load_required
from build_tasks.doit_plugin.reserved_names import RESERVED
from build_tasks.doit_plugin.state import require_doit, require_installed_commands
from build_tasks.errors import UserError
from build_tasks.formats import artifacts
from build_tasks.formats.ensemble_steps import steps_of, take_sequences
from build_tasks.paths import BUILD, STATE_DB
from build_tasks.runtime import limits, memory_budget, repository_files, resources
from build_tasks.runtime.digests import ContentChecker, digest
from build_tasks.spec import overrides
from build_tasks.spec.ensemble_tables import python_folders
from build_tasks.spec.interface import label_files
from build_tasks.spec.loader import load
from build_tasks.spec.model import Model
from build_tasks.spec.tables import REDUCED_PRECISIONS
from build_tasks.stages import (
    accuracy,
    client,
    config,
    engine,
    labels,
    measure,
    onnx,
    precision,
    preprocess,
    prune,
    publish,
    reference,
    repair,
    summary,
    torchscript,
    weights,
)
from build_tasks.triton import model_config

# The modules of stages that few models have are imported by the functions that make their tasks.

# doit's own process is short and small. To collect garbage would take an eighth of a run with nothing to do.
gc.disable()
atexit.register(gc.freeze)
atexit.register(digest.save)

Tasks = Iterator[dict[str, Any]]

require_doit()
require_installed_commands()

try:
    MODELS = load(reserved=RESERVED, overrides=overrides.from_command_line(), unchanged=noop_cache.triton_models)
    MODELS += load_required(noop_cache, MODELS)
    memory_budget.from_environment()
    limits.check_variables()
    repository_files.umask_from_environment()
    if os.environ.get("BUILD_CACHE"):
        from build_tasks.runtime import build_cache

        build_cache.check_variables()
except UserError as error:
    raise InvalidDodoFile(str(error)) from error  # doit shows it without a traceback and exits with 3

SERVED = [(model, model_format) for model in MODELS for model_format in model.served_formats]
ENSEMBLES = [model for model in MODELS if model.spec.ensemble]
OWN_ENSEMBLES = [model for model in ENSEMBLES if model.steps]
ALL = [*SERVED, *((model, model_format) for model in ENSEMBLES for model_format in model.ensemble_parts)]

try:
    if digest.remembers:  # `doit plan` writes nothing
        os.makedirs(BUILD, exist_ok=True)
        # On a full disk doit would call its new database corrupted.
        if not os.path.exists(STATE_DB) and (message := resources.full_disk(BUILD)):
            raise InvalidDodoFile(message)
except OSError as error:
    raise InvalidDodoFile(f"{BUILD}/: {error.strerror}") from error

DOIT_CONFIG = {
    "default_tasks": [*(model.name for model in MODELS), "prune"],
    "dep_file": STATE_DB,
    "backend": "sqlite3",  # two runs at once merge; doit's other backends lose updates
    "check_file_uptodate": ContentChecker,
    "reporter": Reporter,
    "par_type": "thread",  # each stage runs in a process of its own
    "continue": True,  # after a failure, doit builds the other models
    "sort": "definition",
}


def task_model() -> Tasks:
    """All tasks of one model"""
    for name in noop_cache.requested:
        yield {"basename": name, "actions": None, "uptodate": [True], "doc": "up to date, by the no-op cache"}
    for model in MODELS:
        yield {
            "basename": model.name,
            "actions": None,
            "uptodate": [True],  # a group has no result that doit would have to record
            "task_dep": list(chain(model)),
            "doc": f"{', '.join(model.spec.formats)}{' (RANDOM weights)' if model.seed is not None else ''}",
        }


def chain(model: Model) -> Iterator[str]:
    """Return the tasks of a model, in the order of `doit list`. Their dependencies follow from their files."""
    yield from (f"{stage}:{model.name}" for stage in ("weights", "reference"))
    if "torchscript" in model.spec.formats:
        yield f"torchscript:{model.name}"
    if model.is_cast:
        yield f"cast:{model.name}"
    if needs_onnx(model):
        yield f"onnx:{model.name}"
    graph = model.graph_name(model.spec.engine.precision)
    if model.converted and model.spec.engine.repair:
        yield f"repair:{model.name}"
    yield from (f"precision:{model.graph_name(p)}" for p in model.reduced_precisions)
    if model.graph_gated_separately:
        yield from (f"{stage}:{graph}" for stage in ("measure", "accuracy"))
    if "rtx" in model.spec.formats:
        yield f"rtx:{model.name}"
    yield from (labels.task_name(model, output) for output in label_files(model.spec))
    for model_format in model.served_formats:
        if model_format == "tensorrt":
            yield from (f"engine:{model.name}{model.capability_suffix(plan)}" for plan in model.plans)
        if model_format == "aoti":
            yield from (f"aoti:{model.name}{model.capability_suffix(file)}" for file in model.packages)
        for file in model.files(model_format):
            yield from (f"{stage}:{model.artifact_task_name(model_format, file)}" for stage in ("measure", "accuracy"))
        yield from publishing_tasks(model, model_format)
    yield from [f"preprocess:{model.name}"] if "preprocess" in model.ensemble_parts else []
    for name in map(model.python_name, python_folders(model.steps)):
        yield from (f"python_model:{name}", f"publish:{name}")
    yield from [f"ensemble:{model.name}"] if model.steps else []
    for model_format in model.ensemble_parts:
        yield from publishing_tasks(model, model_format)
    yield f"summary:{model.name}"


def publishing_tasks(model: Model, model_format: str) -> list[str]:
    """Return the tasks that follow the artifact of a Triton model."""
    stages = ("config", "publish") if model_format == "preprocess" else ("config", "client", "publish")
    return [f"{stage}:{model.triton_name(model_format)}" for stage in stages]


def needs_onnx(model: Model) -> bool:
    return "onnx" in model.spec.formats or model.spec.has_engine


def task_weights() -> Tasks:
    """Fetch, verify and convert weights -> weights.safetensors"""
    yield from (weights.task(model) for model in MODELS)


def task_labels() -> Tasks:
    """Write the names of the classes -> labels.txt"""
    yield from (task for model in MODELS for task in labels.tasks(model))


def task_reference() -> Tasks:
    """Compute the outputs of the fp32 network for the accuracy samples -> reference.json"""
    yield from (reference.task(model) for model in MODELS)


def task_torchscript() -> Tasks:
    """Trace and freeze -> model.pt"""
    yield from (torchscript.task(model) for model in MODELS if "torchscript" in model.spec.formats)


def task_cast() -> Tasks:
    """Cast model.pt to the precision that PyTorch serves -> model.<precision>.pt"""
    if models := [model for model in MODELS if model.is_cast]:
        from build_tasks.stages import cast

        yield from map(cast.task, models)


def task_onnx() -> Tasks:
    """Export, slim and check -> model.onnx"""
    yield from (onnx.task(model) for model in filter(needs_onnx, MODELS))


def task_repair() -> Tasks:
    """Find the fewest nodes to exclude from a precision so that the gate holds -> keep_fp32.lock beside the spec"""
    yield from (repair.task(model) for model in MODELS if model.converted)


def task_precision() -> Tasks:
    """Cast or quantize -> model.<precision>.onnx"""
    for model in MODELS:
        yield from (
            precision.task(model, p)
            for p in (REDUCED_PRECISIONS if model.spec.has_engine else model.reduced_precisions)
        )


def task_engine() -> Tasks:
    """Compile with TensorRT, for this machine's GPU -> model.plan"""
    yield from (engine.task(model, p) for model in MODELS if "tensorrt" in model.spec.formats for p in model.plans)


def task_rtx() -> Tasks:
    """Compile with TensorRT-RTX -> model.rtx, which Triton does not serve"""
    yield from (engine.task(model, "model.rtx") for model in MODELS if "rtx" in model.spec.formats)


def task_aoti() -> Tasks:
    """Compile with AOTInductor, for this machine's GPU or CPU -> model.pt2"""
    if models := [model for model in MODELS if "aoti" in model.spec.formats]:
        from build_tasks.stages import aoti

        yield from (aoti.task(model, file) for model in models for file in model.packages)


def task_measure() -> Tasks:
    """Compare the outputs of each artifact with the reference -> model.*.measured.json"""
    for model in MODELS:
        separate = {model.spec.engine.precision} if model.graph_gated_separately else set()
        precisions = separate | set(REDUCED_PRECISIONS if model.spec.has_engine else ()) - {model.precision("onnx")}
        yield from (measure.task_of_graph(model, p) for p in sorted(precisions))
    yield from (
        measure.task(model, model_format, file) for model, model_format in SERVED for file in model.files(model_format)
    )


def task_accuracy() -> Tasks:
    """Apply the accuracy gate; an artifact that fails is not compiled, and not published"""
    yield from (accuracy.task_of_graph(model) for model in MODELS if model.graph_gated_separately)
    yield from (
        accuracy.task(model, model_format, file) for model, model_format in SERVED for file in model.files(model_format)
    )


def task_summary() -> Tasks:
    """Collect the figures and gate results of all artifacts -> accuracy.json, accuracy.svg"""
    yield from (summary.task(model) for model in MODELS)


def task_preprocess() -> Tasks:
    """Write the Python model that preprocesses encoded images, for an ensemble"""
    yield from (preprocess.task(model) for model in ENSEMBLES if "preprocess" in model.ensemble_parts)


def task_python_model() -> Tasks:
    """Check and copy the Python models of the user, for an ensemble"""
    if OWN_ENSEMBLES:
        from build_tasks.stages import python_model

        yield from (task for model in OWN_ENSEMBLES for task in python_model.tasks(model))


def task_ensemble() -> Tasks:
    """Run the steps of an ensemble of one's own, end to end -> model.ensemble.measured.json"""
    if OWN_ENSEMBLES:
        from build_tasks.stages import ensemble

        yield from (ensemble.task(model, steps_of(model, MODELS)) for model in OWN_ENSEMBLES)


def task_config() -> Tasks:
    """Derive config.pbtxt from the artifact and [triton] of the spec"""
    for model, model_format in ALL:
        if model_format == "ensemble":
            yield config.ensemble_task(model, steps_of(model, MODELS))
        else:
            yield config.task(model, model_format, artifacts.artifacts_of(model, model_format))


def task_client() -> Tasks:
    """Write example clients, over HTTP and gRPC"""
    for model, model_format in ALL:
        if model_format == "ensemble":
            sequences = take_sequences(steps_of(model, MODELS))
            yield client.task(model, model_format, ["model.ensemble"], sequences=sequences)
        elif model_format != "preprocess":
            sequences = model_config.takes_sequences(model.config_fields, [model_format])
            yield client.task(model, model_format, artifacts.artifacts_of(model, model_format), sequences=sequences)


def task_publish() -> Tasks:
    """Put artifact, config.pbtxt and labels into model_repository/"""
    for model, model_format in ALL:
        if model_format == "ensemble":
            yield publish.ensemble_task(model, steps_of(model, MODELS))
        else:
            yield publish.task(model, model_format, artifacts.artifacts_of(model, model_format))
    yield from (task for model in ENSEMBLES for task in publish.python_tasks(model))


def task_prune() -> dict[str, Any]:
    others = (name for triton_models in noop_cache.triton_models.values() for name in triton_models)
    return prune.task({*others, *(name for model in MODELS for name in model.triton_models)})


if not noop_cache.only_models:  # `doit NAME ...` needs none of these tasks, and does not import their modules
    from build_tasks.bench import task as bench
    from build_tasks.serving import check, container, serve, smoke, triton_core, upgrade
    from build_tasks.stages import layers

    def task_compare() -> Tasks:
        """On demand: the accuracy of every precision -> precisions.json, precisions.svg"""
        yield from (summary.task_of_precisions(model) for model in MODELS if model.spec.has_engine)

    def task_layers() -> Tasks:
        """On demand: the error after each node of the graph that engines are compiled from"""
        yield from (layers.task(model) for model in MODELS if model.converted)

    def task_bench() -> Tasks:
        """On demand: latency and throughput of every format -> bench.json, bench.svg"""
        yield from (bench.task(model) for model in MODELS)

    def task_sweep() -> dict[str, Any]:
        return prune.sweep_task()

    def task_container() -> dict[str, Any]:
        return container.task(MODELS)

    def task_check() -> dict[str, Any]:
        return check.task(MODELS)

    def task_upgrade() -> dict[str, Any]:
        return upgrade.task(MODELS)

    def task_smoke() -> dict[str, Any]:
        return smoke.task(MODELS)

    def task_serve() -> dict[str, Any]:
        return serve.task(MODELS)

    def task_tritonserver() -> dict[str, Any]:
        return triton_core.task()
