"""[ensemble] of a spec, as types: an ensemble of the user's own steps. See tables.py for the other tables."""

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta, field

from build_tasks.spec.tables import END, Table, Text
from build_tasks.spec.tensor_tables import TensorName

Folder = Annotated[str, Meta(pattern=f"^[A-Za-z0-9][A-Za-z0-9_-]*{END}", max_length=60)]
Names = dict[Text, TensorName]


class EnsembleStep(Table):
    """One step of an ensemble. Its tensors are connected with those of other steps by the names in the ensemble."""

    model: Annotated[
        Text | None,
        Meta(description='A model of Triton\'s that a spec of this project describes, by its name there: "b3_onnx".'),
    ] = None
    python: Annotated[
        Folder | None,
        Meta(description="A folder of the model with a Python model: config.pbtxt, model.py and what they need."),
    ] = None
    inputs: Annotated[
        Names,
        Meta(description="By input of the step: the tensor of the ensemble that it takes. Default: that of its name."),
    ] = field(default_factory=dict)
    outputs: Annotated[
        Names,
        Meta(description="By output of the step: its name in the ensemble. Default: its own name."),
    ] = field(default_factory=dict)


class Ensemble(Table):
    """An ensemble of one's own steps. What no step makes, clients send; what no step takes, they get."""

    steps: Annotated[list[EnsembleStep], Meta(min_length=1, max_length=100, description="The steps, in any order.")]
    outputs: Annotated[
        list[TensorName], Meta(description="The tensors that clients get. Default: those that no step takes.")
    ] = field(default_factory=list)
    samples: Annotated[
        Text | None,
        Meta(
            description="An .npz with an array for each input of the ensemble. Default: the samples of the step that "
            "takes it."
        ),
    ] = None


def python_folders(steps: list[EnsembleStep]) -> list[str]:
    """Return the folders of the Python models that are steps, each once."""
    return list(dict.fromkeys(step.python for step in steps if step.python))


def short_form(ensemble: str | Ensemble | None) -> str | None:
    """Return the format that is served after the preprocessing by the short form of `ensemble`; None without it."""
    return ensemble if isinstance(ensemble, str) else None


def own_steps(ensemble: str | Ensemble | None) -> list[EnsembleStep]:
    """Return the steps of an ensemble of one's own; none for the short form."""
    return ensemble.steps if isinstance(ensemble, Ensemble) else []


def ensemble_parts(ensemble: str | Ensemble | None, names: Mapping[str, str]) -> list[str]:
    """Return which parts of an ensemble exist: of one's own steps, the preprocessing only if one of them names it.

    Args:
        names: The names of the Triton models by part.
    """
    named = [step.model for step in own_steps(ensemble)]
    own = isinstance(ensemble, Ensemble)
    return [part for part in names if ensemble and (not own or part == "ensemble" or names[part] in named)]
