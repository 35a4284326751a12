"""What can be built: from the specs in models/ to a Triton model repository.

    weights ──► torchscript ──► onnx ──► (engine)     build/<model>/
       │             │           │
       └► reference ─┴► accuracy ┘
                           │
    labels ─► config ─► publish                       model_repository/<model>, <model>_onnx, (<model>_trt)

One task per stage and model. `doit list` shows them, `doit NAME` builds one model, `doit STAGE:NAME` one stage.
"""

import os
from collections.abc import Iterator
from typing import Any

from doit.doit_cmd import DoitMain
from doit.exceptions import InvalidDodoFile

from build_tasks import accuracy, config, labels, onnx, publish, reference, torchscript, weights
from build_tasks.digests import ContentChecker
from build_tasks.errors import UserError
from build_tasks.reporter import Reporter
from build_tasks.spec import BUILD, Model, load

Tasks = Iterator[dict[str, Any]]

STAGES = ("weights", "labels", "reference", "torchscript", "onnx", "engine", "accuracy", "config", "publish", "prune")
COMMANDS = tuple(command.get_name() for command in DoitMain.DOIT_CMDS)

try:
    MODELS = load(reserved=(*STAGES, *COMMANDS))
except UserError as error:
    raise InvalidDodoFile(str(error)) from error  # doit shows it without a traceback and exits with 3

SERVED = [(model, format) for model in MODELS for format in model.spec.formats]

try:
    os.makedirs(BUILD, exist_ok=True)
except OSError as error:
    raise InvalidDodoFile(f"{BUILD}/: {error.strerror}") from error

DOIT_CONFIG = {
    "default_tasks": [*(model.name for model in MODELS), "prune"],
    "dep_file": f"{BUILD}/.doit.sqlite3",
    "backend": "sqlite3",  # two runs at once merge; doit's other backends lose updates
    "check_file_uptodate": ContentChecker,
    "reporter": Reporter,
    "par_type": "thread",  # a stage is a process of its own already
    "continue": True,  # a model that fails does not keep the others from being built
    "sort": "definition",
}


def task_model() -> Tasks:
    """Everything of one model"""
    for model in MODELS:
        yield {
            "basename": model.name,
            "actions": None,
            "uptodate": [True],  # it holds nothing itself: doit need not note it again in every run
            "task_dep": list(chain(model)),
            "doc": f"{', '.join(model.spec.formats)}{' (RANDOM weights)' if model.seed is not None else ''}",
        }


def chain(model: Model) -> Iterator[str]:
    """The tasks of a model in the order in which they are told; what needs what follows from their files."""
    yield from (f"{stage}:{model.name}" for stage in ("weights", "reference", "torchscript"))
    if "onnx" in model.spec.formats:
        yield f"onnx:{model.name}"
    if model.spec.labels:
        yield f"labels:{model.name}"
    for format in model.spec.formats:
        yield from (f"{stage}:{model.triton_name(format)}" for stage in ("accuracy", "config", "publish"))


def task_weights() -> Tasks:
    """Fetch, verify and convert weights -> weights.safetensors"""
    yield from map(weights.task, MODELS)


def task_labels() -> Tasks:
    """Names of the classes -> labels.txt"""
    yield from (labels.task(model) for model in MODELS if model.spec.labels)


def task_reference() -> Tasks:
    """What the fp32 PyTorch network answers to the accuracy samples -> reference.json"""
    yield from map(reference.task, MODELS)


def task_torchscript() -> Tasks:
    """Trace and freeze -> model.pt"""
    yield from map(torchscript.task, MODELS)


def task_onnx() -> Tasks:
    """Export, slim and check -> model.onnx"""
    yield from (onnx.task(model) for model in MODELS if "onnx" in model.spec.formats)


# The engine stage (model.onnx -> model.<precision>.onnx -> model.plan) will stand here.


def task_accuracy() -> Tasks:
    """Compare each artifact with the reference; what fails is not published"""
    yield from (accuracy.task(model, format) for model, format in SERVED)


def task_config() -> Tasks:
    """Derive config.pbtxt from the artifact and [triton] of the spec"""
    yield from (config.task(model, format) for model, format in SERVED)


def task_publish() -> Tasks:
    """Put artifact, config.pbtxt and labels into model_repository/"""
    yield from (publish.task(model, format) for model, format in SERVED)


def task_prune() -> dict[str, Any]:
    return publish.prune_task(MODELS)
