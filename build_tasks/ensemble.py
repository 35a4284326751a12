"""ensemble: encoded pictures in, scores out -> <model>_preprocess, in Triton's Python backend, and <model>_ensemble

    IMAGE (JPEG, PNG) ──► <model>_preprocess ──► INPUT__0 ──► <model>_onnx, say ──► OUTPUT__0
                              as timm does it

The Python model is proven before it is published: to the bit what timm's transform makes of the accuracy samples (of
the shipped photographs, where those are tensors).
"""

import json
import os
import shutil
from typing import Any

from build_tasks import architecture, config, engine, modelconfig, pictures
from build_tasks.compare import INPUT
from build_tasks.digests import digest
from build_tasks.errors import UserError
from build_tasks.spec import AROUND, TRITON_MODELS, Model
from build_tasks.stage import Notes, Paths, Settings, Stage, code_of, versions

IMAGE = "IMAGE"
PREPROCESS = "preprocess"  # the folder that the version of <model>_preprocess holds
TOOLS = ("timm", "torchvision", "pillow", "numpy")


def artifacts(model: Model, format: str) -> list[str]:
    """What a model of Triton's is made of, as far as it can be here; of the ensemble, what its steps are."""
    of = model.spec.ensemble
    if format in AROUND:
        return [PREPROCESS, *(engine.present(model, of) if format == "ensemble" and of else [])]
    return engine.present(model, format)


def task(model: Model) -> dict[str, Any]:
    """Of the Python model."""
    samples = model.spec.accuracy.samples
    source = model.source(samples) if samples and not samples.endswith(pictures.TENSORS) else pictures.SHIPPED
    stage = Stage(
        name=f"preprocess:{model.name}",
        model=model,
        build=build,
        inputs={
            "preprocessing": model.artifact("preprocessing.json"),
            **{path: path for path in pictures.files(source)},
        },
        outputs={
            "model": model.artifact(PREPROCESS),
            "signature": model.artifact(f"{PREPROCESS}.signature.json"),
            "verdict": model.artifact(f"{PREPROCESS}.verdict.json"),
            "tools": model.artifact(f"{PREPROCESS}.tools.json"),
        },
        settings={"spec": model.file},
        tools=TOOLS,
        code=code_of(
            *("ensemble", "architecture", "pictures", "digests"), "python_model/model", "python_model/preprocessing"
        ),
    )
    return stage.task(doc=f"The Python model {model.triton_name('preprocess')}, to the bit as timm's transform")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import numpy as np
    from PIL.Image import open as open_image

    from build_tasks.python_model.preprocessing import preprocess

    with open(inputs["preprocessing"], encoding="utf-8") as file:
        preprocessing = json.load(file)
    channels, *_ = preprocessing["input_size"]
    if channels != 3:
        raise UserError(f"{settings['spec']}: ensemble: pictures have 3 channels, and the network takes {channels}")
    known = {key: value for key, value in preprocessing.items() if key not in ("format", "steps")}
    transform = architecture.transform(known, preprocessing["format"])
    paths = [path for name, path in inputs.items() if name == path]
    for path in paths:
        with open(path, "rb") as file, open_image(path) as image:
            expected, found = transform(image.convert("RGB")).numpy(), preprocess(file.read(), preprocessing)
        if (found.shape, found.dtype) != (expected.shape, expected.dtype) or not np.array_equal(found, expected):
            raise UserError(
                f"{path}: the Python model does not do what timm's transform does: {preprocessing['steps']}"
            )
    os.makedirs(outputs["model"])
    for name in ("model.py", "preprocessing.py"):
        shutil.copyfile(f"build_tasks/python_model/{name}", f"{outputs['model']}/{name}")
    shutil.copyfile(inputs["preprocessing"], f"{outputs['model']}/preprocessing.json")
    signature = {
        "inputs": [{"name": IMAGE, "dtype": "bytes", "shape": [-1, 1]}],
        "outputs": [{"name": INPUT, "dtype": str(expected.dtype), "shape": [-1, *expected.shape]}],
    }
    for name, record in (("signature", signature), ("tools", versions(TOOLS))):
        with open(outputs[name], "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    verdict = {
        "model": digest(outputs["model"], remember=False),
        "signature": digest(outputs["signature"], remember=False),
        "status": "ok",
    }
    with open(outputs["verdict"], "w", encoding="utf-8") as file:
        json.dump(verdict, file, indent=1)
    return {"pictures": len(paths), "difference from timm": 0}


def config_task(model: Model, files: list[str]) -> dict[str, Any]:
    """The config.pbtxt of the ensemble. files: the artifacts that its steps are."""
    of = model.spec.ensemble
    assert of is not None
    stage = Stage(
        name=f"config:{model.triton_name('ensemble')}",
        model=model,
        build=build_config,
        inputs={
            **{file: model.artifact(f"{file}.signature.json") for file in files},
            "first": model.artifact(f"{TRITON_MODELS['preprocess'].file}.config.pbtxt"),
            "second": model.artifact(f"{TRITON_MODELS[of].file}.config.pbtxt"),
        },
        outputs={"config": model.artifact(f"{TRITON_MODELS['ensemble'].file}.config.pbtxt")},
        settings={**config.settings_of(model, "ensemble"), "files": files},
        tools=("tritonclient",),
        code=code_of("ensemble", "config", "modelconfig", "digests"),
        light=True,
    )
    return stage.task(doc=f"config.pbtxt of {model.triton_name('ensemble')}")


def build_config(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    from google.protobuf import text_format

    first, second = modelconfig.message({}), modelconfig.message({})
    for path, parsed in ((inputs["first"], first), (inputs["second"], second)):
        with open(path, encoding="utf-8") as file:
            text_format.Parse(file.read(), parsed)
    whole = modelconfig.message({"name": settings["name"], "platform": TRITON_MODELS["ensemble"].platform})
    for ours, theirs in zip(first.output, second.input, strict=True):
        open_or_same = all(a == b or b == -1 for a, b in zip(ours.dims, theirs.dims, strict=False))
        if ours.data_type != theirs.data_type or len(ours.dims) != len(theirs.dims) or not open_or_same:
            raise UserError(
                f"{settings['spec']}: ensemble: {second.name} takes {list(theirs.dims)} of another type or size than "
                f"pictures are prepared as, {list(ours.dims)}"
            )
    whole.max_batch_size = min(settings["max_batch_size"], first.max_batch_size, second.max_batch_size)
    whole.input.extend(first.input)
    whole.output.extend(second.output)
    for part in (first, second):
        # No version is named by -1 alone; 0, the protobuf's default, would be version 0.
        step = whole.ensemble_scheduling.step.add(model_name=part.name, model_version=-1)
        for tensors, names in ((part.input, step.input_map), (part.output, step.output_map)):
            for tensor in tensors:
                names[tensor.name] = tensor.name
    whole.MergeFrom(modelconfig.message(config.asked({**settings, "format": "ensemble"})))
    config.write(whole, [inputs[name] for name in settings["files"]], outputs["config"], settings)
    return {"max_batch_size": whole.max_batch_size, "steps": f"{first.name}, {second.name}"}
