"""The steps of an ensemble: which Triton models they are, and which files these are served from.

`ensemble = "onnx"` ─┐
[[ensemble.steps]] ──┴► Step ─► config.pbtxt of each step ─► triton/ensemble_graph.py
        ▲                │
        └── an ensemble ◄┘
"""

from collections.abc import Iterable, Sequence

from msgspec import Struct

from build_tasks.formats.artifacts import PREPROCESS_FOLDER, present_artifacts
from build_tasks.spec.ensemble_tables import Ensemble, EnsembleStep, short_form
from build_tasks.spec.model import Model
from build_tasks.triton.ensemble_graph import Wiring
from build_tasks.triton.model_config import takes_sequences
from build_tasks.triton.platforms import FORMATS, TRITON_MODELS

PYTHON = "python"  # the kind of a step that is a Python model of the user


class Step(Struct, frozen=True):
    """One step of an ensemble.

    Attributes:
        name: The name of the Triton model.
        kind: A key of TRITON_MODELS, or PYTHON.
        model: The model whose spec describes it.
        folder: The folder of a Python model of the user; otherwise empty.
        table: What the spec says of the step.
        artifacts: The paths of what it is served from. The keys are file names, after the name of another model. Of an
            ensemble, those of all its steps.
        config: The path of its config.pbtxt in build/.
        steps: The steps of an ensemble; empty for other models.
    """

    name: str
    kind: str
    model: Model
    folder: str
    table: EnsembleStep
    artifacts: dict[str, str]
    config: str
    steps: "tuple[Step, ...]" = ()


def python_artifact(folder: str) -> str:
    """Return the name of the artifact of a Python model of the user."""
    return f"python/{folder}"


def steps_of(model: Model, models: Iterable[Model], user: Model | None = None) -> list[Step]:
    """Return the steps of the ensemble of a model.

    Args:
        models: The models whose Triton models the steps name; loader.py has checked that they exist.
        user: The model for whose ensemble the artifacts are named, if the ensemble is a step of another one.
    """
    user = user or model
    if network := short_form(model.spec.ensemble):
        return [_step(model, part, user, EnsembleStep(), models) for part in ("preprocess", network)]
    parts = {
        each.triton_name(model_format): (each, model_format)
        for each in models
        for model_format in (*each.served_formats, *each.ensemble_parts)
    }
    pythons = {
        each.python_name(step.python): (each, step.python) for each in models for step in each.steps if step.python
    }
    steps = []
    for table in model.steps:
        if table.python or table.model in pythons:
            owner, folder = (model, table.python) if table.python else pythons[table.model or ""]
            assert folder is not None
            file = python_artifact(folder)
            key = file if owner.name == user.name else f"{owner.name}/{file}"
            steps.append(
                Step(
                    owner.python_name(folder), PYTHON, owner, folder, table, {key: owner.artifact(file)},
                    owner.artifact(f"{file}.config.pbtxt"),
                )
            )  # fmt: skip
        else:
            owner, model_format = parts[table.model or ""]
            steps.append(_step(owner, model_format, user, table, models))
    return steps


def _step(owner: Model, model_format: str, user: Model, table: EnsembleStep, models: Iterable[Model]) -> Step:
    name, config = owner.triton_name(model_format), f"{TRITON_MODELS[model_format].file}.config.pbtxt"
    if model_format == "ensemble":
        steps = tuple(steps_of(owner, models, user))
        artifacts = {key: path for step in steps for key, path in step.artifacts.items()}
        return Step(name, model_format, owner, "", table, artifacts, owner.artifact(config), steps)
    files = [PREPROCESS_FOLDER] if model_format == "preprocess" else present_artifacts(owner, model_format)
    prefix = "" if owner.name == user.name else f"{owner.name}/"
    artifacts = {prefix + file: owner.artifact(file) for file in files}
    return Step(name, model_format, owner, "", table, artifacts, owner.artifact(config))


def inner_steps(steps: Iterable[Step]) -> list[Step]:
    """Return the steps that are no ensembles, with those of ensembles among the steps in their place, each once."""
    inner = {each.name: each for step in steps for each in (inner_steps(step.steps) if step.steps else [step])}
    return [*inner.values()]


def models_of_steps(model: Model) -> set[str]:
    """Return the names of Triton models that the steps of a model name and that its own spec does not describe."""
    named = {step.model for step in model.steps if step.model}
    return named - model.triton_models.keys() if named else named


def last_network(steps: Sequence[Step]) -> Step | None:
    """Return the last network among the steps."""
    return next((step for step in reversed(inner_steps(steps)) if step.kind in FORMATS), None)


def wiring_of(steps: Iterable[Step]) -> list[Wiring]:
    """Return what the ensemble's config.pbtxt depends on in the spec."""
    return [Wiring(step.name, dict(step.table.inputs), dict(step.table.outputs)) for step in steps]


def wanted_outputs(model: Model) -> list[str]:
    """Return the tensors that clients of the ensemble get; empty: all that no step takes."""
    return list(model.spec.ensemble.outputs) if isinstance(model.spec.ensemble, Ensemble) else []


def take_sequences(steps: Iterable[Step]) -> bool:
    """Return whether a step has a sequence batcher. An ensemble passes sequences on to its steps."""
    return any(
        takes_sequences(step.model.config_fields, [step.kind]) for step in inner_steps(steps) if step.kind != PYTHON
    )
