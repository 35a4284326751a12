"""The artifacts that a Triton model is served from, and their signatures."""

import os

from build_tasks.json_files import read_json
from build_tasks.runtime import machine_bound
from build_tasks.runtime.stage import Paths
from build_tasks.spec.model import Model
from build_tasks.tensors import Signature

PREPROCESS_FOLDER = "preprocess"  # the folder in a version of <model>_preprocess


def artifacts_of(model: Model, model_format: str) -> list[str]:
    """Return the artifacts of a Triton model that exist, or that this machine can build; see also ensemble_steps.py."""
    return [PREPROCESS_FOLDER] if model_format == "preprocess" else present_artifacts(model, model_format)


def present_artifacts(model: Model, model_format: str) -> list[str]:
    """Return the artifacts of a format that exist, or that this machine can build; all of them if there is none.

    A format has several artifacts if it has a plan or a package for each type of GPU. A machine with a second type adds
    its artifact and keeps the first one.
    """
    files = model.files(model_format)
    if len(files) == 1:
        return files
    present = [
        file
        for file in files
        if os.path.exists(model.artifact(file)) or not machine_bound.missing_requirements(model, file)
    ]
    return present or files


def read_signature(inputs: Paths) -> Signature:
    """Read the signature of an artifact from the input `signature` of a stage."""
    signature: Signature = read_json(inputs["signature"])
    return signature
