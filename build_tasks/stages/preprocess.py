"""preprocess: preprocessing.json -> the Python model <model>_preprocess, the first step of an ensemble

    IMAGE (JPEG, PNG) ──► <model>_preprocess ──► INPUT__0 ──► <model>_onnx, for example ──► OUTPUT__0
                          Triton's Python backend

The stage compares the Python model with timm's transform on the accuracy samples, or on the shipped photographs if the
samples are tensors. Every bit must be equal. The ensemble itself needs only a config.pbtxt (see config.py).
"""

import os
import shutil
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError
from build_tasks.formats.artifacts import PREPROCESS_FOLDER
from build_tasks.formats.declarations import TRANSFORM_MODULES
from build_tasks.json_files import read_json, write_json
from build_tasks.runtime.digests import digest
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.model import Model
from build_tasks.tensors import IMAGE, INPUT
from build_tasks.verification import accuracy_samples

if TYPE_CHECKING:
    from build_tasks.verification.gate import GateResult

TOOLS = ("timm", "torchvision", "pillow", "numpy")


def task(model: Model) -> dict[str, Any]:
    """The doit task of the Python model."""
    source = accuracy_samples.samples_source(model)
    if source is None or not (pictures := accuracy_samples.picture_files(source)):
        source = accuracy_samples.SHIPPED_PHOTOGRAPHS
        pictures = accuracy_samples.picture_files(source)
    stage = Stage(
        name=f"preprocess:{model.name}",
        model=model,
        build=build,
        inputs={
            "preprocessing": model.artifact("preprocessing.json"),
            **{path: path for path in pictures},
        },
        outputs={
            "model": model.artifact(PREPROCESS_FOLDER),
            "signature": model.artifact(f"{PREPROCESS_FOLDER}.signature.json"),
            "verdict": model.artifact(f"{PREPROCESS_FOLDER}.verdict.json"),
            "tools": model.artifact(f"{PREPROCESS_FOLDER}.tools.json"),
        },
        settings={"spec": model.file, "samples": source},
        tools=TOOLS,
        modules=(
            __name__,
            "build_tasks.triton.preprocess_model.model",
            "build_tasks.triton.preprocess_model.preprocessing",
            "build_tasks.verification.accuracy_samples",
            *TRANSFORM_MODULES,
            "build_tasks.tensors",
        ),
    )
    return stage.task(doc=f"The Python model {model.triton_name('preprocess')}, equal to timm's transform in every bit")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import numpy as np

    from build_tasks.formats import picture_transform
    from build_tasks.triton.preprocess_model.preprocessing import PictureError, colors_of, decode_all, preprocess

    preprocessing = read_json(inputs["preprocessing"])
    if not (colors := colors_of(preprocessing)):
        channels, *_ = preprocessing["input_size"]
        raise UserError(
            f"{settings['spec']}: ensemble: expected a network that takes 1, 3 or 4 channels, as images have, or "
            f"input.files, found {channels}"
        )
    config = {key: value for key, value in preprocessing.items() if key not in ("format", "steps")}
    transform = picture_transform.transform(config, preprocessing["format"])
    paths = [path for name, path in inputs.items() if name == path]
    samples = accuracy_samples.group_files(settings["samples"], paths, preprocessing.get("files"))
    for files in samples.values():
        path = ", ".join(files)
        try:
            actual = preprocess(files, preprocessing)
            expected = transform(decode_all(files, preprocessing)).numpy()
        except PictureError as error:
            raise UserError(f"{path}: an ensemble cannot take this picture: {error}") from error
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype) or not np.array_equal(actual, expected):
            raise UserError(
                f"{path}: the Python model's result differs from the one of timm's transform: {preprocessing['steps']}"
            )
    os.makedirs(outputs["model"])
    for name in ("model.py", "preprocessing.py"):
        shutil.copyfile(f"build_tasks/triton/preprocess_model/{name}", f"{outputs['model']}/{name}")
    shutil.copyfile(inputs["preprocessing"], f"{outputs['model']}/preprocessing.json")
    signature = {
        "inputs": [{"name": IMAGE, "dtype": "bytes", "shape": [-1, len(colors)]}],
        "outputs": [{"name": INPUT, "dtype": str(expected.dtype), "shape": [-1, *expected.shape]}],
    }
    for name, record in (("signature", signature), ("tools", versions(TOOLS))):
        write_json(outputs[name], record)
    result: GateResult = {
        "model": digest(outputs["model"], remember=False),
        "signature": digest(outputs["signature"], remember=False),
        "status": "ok",
    }
    write_json(outputs["verdict"], result)
    return {"pictures": len(samples), "difference from timm": 0}
