"""Which artifacts a Triton model is served from, and their signatures."""

import os

from build_tasks.formats import artifacts
from build_tasks.json_files import read_json
from build_tasks.runtime import hardware
from build_tasks.runtime.stage import Paths
from build_tasks.spec.model import Model
from build_tasks.tensors import Signature
from build_tasks.triton.platforms import ENSEMBLE_MODELS

PREPROCESS_FOLDER = "preprocess"  # the folder that the version of <model>_preprocess holds


def artifacts_of(model: Model, model_format: str) -> list[str]:
    """What a model of Triton's is made of, as far as it can be here; of the ensemble, what its steps are."""
    of = model.spec.ensemble
    if model_format in ENSEMBLE_MODELS:
        return [
            PREPROCESS_FOLDER,
            *(artifacts.present_artifacts(model, of) if model_format == "ensemble" and of else []),
        ]
    return artifacts.present_artifacts(model, model_format)


def present_artifacts(model: Model, model_format: str) -> list[str]:
    """The artifacts that a model of Triton's is served from now.

    Of several plans those that exist, or that this machine can build: a second GPU adds its plan and keeps the first.
    """
    artifacts = model.files(model_format)
    if len(artifacts) == 1:
        return artifacts
    capability = model.plans
    here = [
        file
        for file in artifacts
        if os.path.exists(model.artifact(file)) or not hardware.missing_requirements(capability[file])
    ]
    return here or artifacts


def read_signature(inputs: Paths) -> Signature:
    """The signature of an artifact, from the input `signature` of a stage."""
    signature: Signature = read_json(inputs["signature"])
    return signature
