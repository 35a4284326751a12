"""Mistakes in the key `ensemble` and in the table [ensemble], as far as specs show them.

Names, types and dims of tensors, and cycles, show only with the configurations of the steps: see formats/ensembles.py.
"""

import os
from collections.abc import Iterable, Iterator, Mapping

from build_tasks.errors import listed, with_suggestion
from build_tasks.paths import MODELS
from build_tasks.spec import pictures
from build_tasks.spec.ensemble_tables import Ensemble
from build_tasks.spec.model import Model
from build_tasks.spec.overrides import Overrides
from build_tasks.spec.value_checks import Mistake

PYTHON_FILES = ("config.pbtxt", "model.py")  # that the folder of a Python model must hold


def mistakes(model: Model, overrides: Overrides) -> Iterator[Mistake]:
    """Yield the mistakes that the spec of a model alone shows."""
    spec, key = model.spec, "ensemble"
    if isinstance(spec.ensemble, Ensemble):
        yield from _step_mistakes(model, spec.ensemble)
    elif spec.ensemble is None:
        return
    elif spec.ensemble not in spec.formats:
        formats = ", ".join(model.served_formats)
        expected = f"one of the served formats, {formats}" if formats else "nothing, since no format is served"
        yield key, expected, repr(spec.ensemble)
    elif model.largest_batch(spec.ensemble) == 0 and not overrides:
        yield key, "a format with an open batch (onnx.dynamic_axes = true)", repr(spec.ensemble)
    elif spec.ensemble == "tensorrt" and not spec.engine.keep_io_types and not overrides:
        yield key, "engine.keep_io_types = true, since the ensemble prepares pictures in fp32", "false"
    elif spec.input.shape and not pictures.colors_of(spec.input.color, spec.input.files, spec.input.shape[0]):
        expected = "nothing, since pictures have 1, 3 or 4 channels (or set input.files)"
        yield key, expected, f"input.shape = {spec.input.shape}"


def _step_mistakes(model: Model, ensemble: Ensemble) -> Iterator[Mistake]:
    made: dict[str, str] = {}
    for index, step in enumerate(ensemble.steps):
        key = f"ensemble.steps[{index}]"
        if (step.model is None) == (step.python is None):
            yield key, "either `model` or `python`", "neither" if step.model is None else "both"
        elif step.model == model.triton_name("ensemble"):
            yield f"{key}.model", "another model than the ensemble itself", repr(step.model)
        elif step.model == model.triton_name("preprocess") and model.spec.inputs:
            expected = "no preprocessing, which is for the picture of [input], since this spec has [[inputs]]"
            yield f"{key}.model", expected, repr(step.model)
        if step.python is not None:
            for name in PYTHON_FILES:
                if not os.path.isfile(f"{MODELS}/{model.name}/{step.python}/{name}"):
                    yield f"{key}.python", f"a folder with {' and '.join(PYTHON_FILES)}", f"no {step.python}/{name}"
                    break
        for output, tensor in step.outputs.items():
            if tensor in made:
                yield f"{key}.outputs.{output}", f"another name than that of {made[tensor]}", repr(tensor)
            made[tensor] = f"steps[{index}].outputs.{output}"
    if ensemble.samples and not ensemble.samples.endswith(".npz"):
        yield "ensemble.samples", "an .npz file", repr(ensemble.samples)
    if len(set(ensemble.outputs)) < len(ensemble.outputs):
        yield "ensemble.outputs", "each tensor once", listed(ensemble.outputs)


def unknown_steps(models: list[Model], triton_models: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Yield a line for each step that names no model of Triton's.

    Args:
        triton_models: Model.triton_models, by model, of all specs.
    """
    known = [name for each in triton_models.values() for name in each]
    for model in models:
        for index, step in enumerate(model.steps):
            if step.model is not None and step.model not in known:
                key = f"{model.file}: ensemble.steps[{index}].model"
                found = with_suggestion(step.model, known)
                yield f"{key}: expected a model of Triton's that a spec describes, found {found}"


def endless_steps(models: Iterable[Model]) -> Iterator[str]:
    """Yield a line for each ensemble that contains itself, by way of other ensembles."""
    ensembles = {model.triton_name("ensemble"): model for model in models if model.steps}
    inner = {name: {step.model for step in model.steps if step.model} for name, model in ensembles.items()}
    for name, model in ensembles.items():
        cycle = [each for each in ensembles if each in _reached(name, inner) and name in _reached(each, inner)]
        if cycle:
            yield f"{model.file}: ensemble.steps: expected steps without a cycle, found one among {', '.join(cycle)}"


def _reached(name: str, inner: Mapping[str, set[str]]) -> set[str]:
    """Return the names of all steps of an ensemble, and of their steps."""
    reached: set[str] = set()
    waiting = {name}
    while waiting := {each for step in waiting for each in inner.get(step, ())} - reached:
        reached |= waiting
    return reached
