"""config: the artifact's signature, and [triton] of the spec -> model.*.config.pbtxt

Names, dtypes, dims and the maximal batch are those of the file that is served. Everything else of Triton's
ModelConfig may be set in the spec (see modelconfig.py), and has defaults here that serve well.
"""

from typing import Any

import msgspec

from build_tasks.errors import UserError
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.model import Model
from build_tasks.triton import model_config as triton_config
from build_tasks.triton import releases
from build_tasks.triton.derived_config import (
    ConfigSettings,
    InputLayout,
    common_signature,
    derive,
    spec_fields,
    to_text,
)
from build_tasks.triton.platforms import FORMATS, TRITON_MODELS
from build_tasks.triton.repository import header_line

CONFIG_MODULES = (
    "build_tasks.tensors",
    "build_tasks.triton.derived_config",
    "build_tasks.triton.model_config",
    "build_tasks.triton.model_config_checks",
    "build_tasks.triton.optimization_checks",
    "build_tasks.triton.platforms",
    "build_tasks.triton.releases",
    "build_tasks.triton.repository",
    "build_tasks.triton.serving_facts",
)


def task(model: Model, model_format: str, files: list[str]) -> dict[str, Any]:
    """files: the artifacts that this model of Triton's is served from; several are plans of several GPUs."""
    labels = {"labels": model.artifact("labels.txt")} if model.spec.labels and model_format in FORMATS else {}
    stage = Stage(
        name=f"config:{model.triton_name(model_format)}",
        model=model,
        build=build,
        inputs={**{file: model.artifact(f"{file}.signature.json") for file in files}, **labels},
        outputs={"config": model.artifact(f"{TRITON_MODELS[model_format].file}.config.pbtxt")},
        settings=settings_of(
            model,
            model_format,
            files=files,
            capabilities=[model.plans.get(file) for file in files],
            input=InputLayout(model.spec.input.format, model.spec.input.shape),
            ranked=model.spec.output.top_k is not None,
        ),
        tools=("tritonclient",),
        modules=(__name__, *CONFIG_MODULES),
        in_process=True,
    )
    return stage.task(doc=f"config.pbtxt of {model.triton_name(model_format)}")


def settings_of(model: Model, model_format: str, **more: Any) -> Settings:
    """Return the settings of a config, as plain data. more: fields of ConfigSettings."""
    settings = ConfigSettings(
        name=model.triton_name(model_format),
        model_format=model_format,
        spec=model.file,
        triton=triton_config.fields_of_format(model.config_fields, model_format),
        release=model.release,
        device=model.triton("device"),
        keep_versions=model.triton("keep_versions"),
        max_batch_size=model.largest_batch(model_format),
        # On a GPU the first requests of every batch size are slow (docs/how-to/torchscript-on-gpu.md).
        warm_up=model.triton("warm_up") if (model_format, model.triton("device")) == ("torchscript", "gpu") else None,
        **more,
    )
    plain: Settings = msgspec.to_builtins(settings)
    return plain


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    options = msgspec.convert(settings, ConfigSettings)
    signature = common_signature([inputs[name] for name in options.files], options)
    classes = None
    if "labels" in inputs:
        with open(inputs["labels"], encoding="utf-8") as file:
            classes = len(file.readlines())
    config = derive(signature, classes, options)
    write(config, [inputs[name] for name in options.files], outputs["config"], options)
    notes = {"max_batch_size": config.max_batch_size}
    if warning := releases.load_warning(options.release, options.model_format, signature):
        notes["release"] = warning
    if (smallest := signature["smallest_batch"]) > 1:
        notes["smallest batch"] = f"{smallest}, below which a request fails (engine.min_batch_size)"
    return notes


def write(config: Any, sources: list[str], path: str, options: ConfigSettings) -> None:
    """config.pbtxt, whose first line tells what it was derived from."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{header_line(config.name, [digest(source) for source in sources])} from {options.spec}\n")
        file.write(to_text(config))


def ensemble_task(model: Model, files: list[str]) -> dict[str, Any]:
    """The config.pbtxt of the ensemble. files: the artifacts that its steps are."""
    of = model.spec.ensemble
    assert of is not None
    stage = Stage(
        name=f"config:{model.triton_name('ensemble')}",
        model=model,
        build=build_ensemble,
        inputs={
            **{file: model.artifact(f"{file}.signature.json") for file in files},
            "first": model.artifact(f"{TRITON_MODELS['preprocess'].file}.config.pbtxt"),
            "second": model.artifact(f"{TRITON_MODELS[of].file}.config.pbtxt"),
        },
        outputs={"config": model.artifact(f"{TRITON_MODELS['ensemble'].file}.config.pbtxt")},
        settings=settings_of(model, "ensemble", files=files),
        tools=("tritonclient",),
        modules=(__name__, *CONFIG_MODULES),
        in_process=True,
    )
    return stage.task(doc=f"config.pbtxt of {model.triton_name('ensemble')}")


def build_ensemble(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    from google.protobuf import text_format

    options = msgspec.convert(settings, ConfigSettings)
    first, second = triton_config.to_message({}), triton_config.to_message({})
    for path, parsed in ((inputs["first"], first), (inputs["second"], second)):
        with open(path, encoding="utf-8") as file:
            text_format.Parse(file.read(), parsed)
    whole = triton_config.to_message({"name": options.name, "platform": TRITON_MODELS["ensemble"].platform})
    for ours, theirs in zip(first.output, second.input, strict=True):
        open_or_same = all(a == b or b == -1 for a, b in zip(ours.dims, theirs.dims, strict=False))
        if ours.data_type != theirs.data_type or len(ours.dims) != len(theirs.dims) or not open_or_same:
            raise UserError(
                f"{options.spec}: ensemble: {second.name} takes {list(theirs.dims)} of another type or size than "
                f"pictures are prepared as, {list(ours.dims)}"
            )
    whole.max_batch_size = min(options.max_batch_size, first.max_batch_size, second.max_batch_size)
    whole.input.extend(first.input)
    whole.output.extend(second.output)
    for part in (first, second):
        # No version is named by -1 alone; 0, the protobuf's default, would be version 0.
        step = whole.ensemble_scheduling.step.add(model_name=part.name, model_version=-1)
        for tensors, names in ((part.input, step.input_map), (part.output, step.output_map)):
            for tensor in tensors:
                names[tensor.name] = tensor.name
    whole.MergeFrom(triton_config.to_message(spec_fields(options)))
    write(whole, [inputs[name] for name in options.files], outputs["config"], options)
    return {"max_batch_size": whole.max_batch_size, "steps": f"{first.name}, {second.name}"}
