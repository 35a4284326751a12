"""config: the artifact's signature, and [triton] of the spec -> model.*.config.pbtxt

    signature, labels.txt, [triton] ─► ModelConfig ─► model.onnx.config.pbtxt, for example
    config.pbtxt of all steps ───────► ModelConfig ─► model.ensemble.config.pbtxt

Names, dtypes, dims and the largest batch are those of the file that Triton serves. The spec may set every other field
of Triton's ModelConfig (see triton/model_config.py); triton/derived_config.py has the defaults.
"""

from typing import Any

import msgspec

from build_tasks.errors import UserError
from build_tasks.formats.ensemble_steps import Step, last_network, wanted_outputs, wiring_of
from build_tasks.json_files import read_json, write_json
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.engine_profiles import profiles_of
from build_tasks.spec.interface import client_dims, dimensions_of, inputs_of, label_files, open_inputs, ragged_inputs
from build_tasks.spec.model import Model, Spec
from build_tasks.spec.warm_up import warm_up_folder, warm_up_values
from build_tasks.tensors import dims_at, signature_dims, tuned_lengths
from build_tasks.triton import cpu_cores, ensemble_graph, releases
from build_tasks.triton import model_config as triton_config
from build_tasks.triton.derived_config import (
    CONFIG_MODULES,
    ConfigSettings,
    InputLayout,
    TunedPoint,
    common_signature,
    derive,
    spec_fields,
    to_text,
)
from build_tasks.triton.derived_tensors import ClientView, signature_of
from build_tasks.triton.inflight_requests import inflight_limit
from build_tasks.triton.platforms import FORMATS, TRITON_MODELS
from build_tasks.triton.repository import header_line, release_mark
from build_tasks.triton.warm_up_data import write_files

OWN_MODULES = ("build_tasks.triton.inflight_requests",)  # which python_model does not use


def task(model: Model, model_format: str, files: list[str]) -> dict[str, Any]:
    """The doit task of a Triton model that is no ensemble.

    Args:
        files: The artifacts that the Triton model is served from. Several files are plans for several GPUs.
    """
    return stage(model, model_format, files).task(doc=f"config.pbtxt of {model.triton_name(model_format)}")


def stage(model: Model, model_format: str, files: list[str]) -> Stage:
    """The stage of a Triton model that is no ensemble. `doit adopt` reads its settings."""
    labels = {output: file for output, (file, _) in label_files(model.spec).items()} if model_format in FORMATS else {}
    views = client_dims(model.spec) if model_format in FORMATS else {}
    ragged = ragged_inputs(model.spec)
    config = model.artifact(f"{TRITON_MODELS[model_format].file}.config.pbtxt")
    values = warm_up_values(model, model_format)
    return Stage(
        name=f"config:{model.triton_name(model_format)}",
        model=model,
        build=build,
        inputs={
            **{file: model.artifact(f"{file}.signature.json") for file in files},
            **{file: model.artifact(file) for file in labels.values()},
        },
        outputs={"config": config, **({"warm_up": warm_up_folder(config)} if values else {})},
        settings=settings_of(
            model,
            model_format,
            files=files,
            capabilities=[(model.plans | model.packages).get(file) for file in files],
            inputs=input_layouts(model.spec),
            warm_up_values=values,
            profiles=tuned_points(model.spec) if model_format == "tensorrt" else [],
            ranked=model.spec.output.top_k is not None,
            views={name: ClientView(signature_dims(dims), name in ragged) for name, dims in views.items()},
            labels=labels,
        ),
        tools=("tritonclient",),
        modules=(__name__, *OWN_MODULES, *CONFIG_MODULES),
        in_process=True,
    )


def input_layouts(spec: Spec) -> dict[str, InputLayout]:
    """Return the layout and the lengths to tune for of each input."""
    lengths, shapes, seen = tuned_lengths(dimensions_of(spec)), open_inputs(spec), client_dims(spec)
    tuned = {name: dims_at(seen.get(name, shape), lengths) for name, shape in shapes.items()}
    return {each["name"]: InputLayout(each["layout"], tuned.get(each["name"])) for each in inputs_of(spec)}


def tuned_points(spec: Spec) -> list[TunedPoint]:
    """Return what each optimization profile is tuned for, if the spec has several."""
    if not spec.engine.profiles:
        return []
    shapes, seen = open_inputs(spec), client_dims(spec)
    points = []
    for profile in profiles_of(spec):
        lengths = tuned_lengths(profile["dimensions"])
        dims = {name: dims_at(seen.get(name, shape), lengths) for name, shape in shapes.items()}
        points.append(TunedPoint(profile["batch"]["opt"], dims))
    return points


def settings_of(model: Model, model_format: str, **more: Any) -> Settings:
    """The settings of a config, as plain data.

    Args:
        more: Further fields of ConfigSettings.
    """
    keys = model.triton_keys
    settings = ConfigSettings(
        name=model.triton_name(model_format),
        model_format=model_format,
        spec=model.file,
        triton=triton_config.fields_of_format(model.config_fields, model_format),
        release=model.release,
        device=keys.device,
        cores=keys.cores,
        keep_versions=keys.keep_versions,
        max_batch_size=model.largest_batch(model_format),
        # On a GPU the first requests of every batch size are slow (docs/how-to/torchscript-on-gpu.md).
        warm_up=keys.warm_up if (model_format, keys.device) == ("torchscript", "gpu") else None,
        **more,
    )
    plain: Settings = msgspec.to_builtins(settings)
    return plain


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    options = msgspec.convert(settings, ConfigSettings)
    signature = common_signature([inputs[name] for name in options.files], options)
    device_errors = [read_json(inputs[name]).get("device_error") for name in options.files]
    if options.device != "cpu" and any(device_errors):
        raise UserError(
            f"model.pt would fail on a GPU: {device_errors[0]} In forward, create tensors with device=x.device or as "
            f'buffers; or serve it on CPUs only: triton.device = "cpu" in {options.spec}'
        )
    if device := signature.get("device"):  # that the package was compiled for
        options = msgspec.structs.replace(options, device=device)
    classes = {}
    for name in options.labels.values():
        with open(inputs[name], encoding="utf-8") as file:
            classes[name] = len(file.readlines())
    config = derive(signature, classes, options)
    write_config(config, [inputs[name] for name in options.files], outputs["config"], options)
    if "warm_up" in outputs:
        write_files(config, options.warm_up_values, outputs["warm_up"])
    notes = {"max_batch_size": config.max_batch_size}
    if warning := releases.load_warning(options.release, options.model_format, signature):
        notes["release"] = warning
    if reason := cpu_cores.without_threads(options.cores, options.model_format, options.release):
        notes["cores"] = reason
    if (smallest := signature["smallest_batch"]) > 1:
        notes["smallest batch"] = f"{smallest}, below which a request fails (engine.min_batch_size)"
    return notes


def write_config(config: Any, sources: list[str], path: str, options: ConfigSettings) -> None:
    """Write config.pbtxt. Its first line names the model, the digests of `sources`, the spec, and the release."""
    with open(path, "w", encoding="utf-8") as file:
        header = header_line(config.name, [digest(source) for source in sources])
        file.write(f"{header} from {options.spec}{release_mark(options.release)}\n")
        file.write(to_text(config))


def ensemble_task(model: Model, steps: list[Step]) -> dict[str, Any]:
    """The doit task of the ensemble."""
    files = {key: path for step in steps for key, path in step.artifacts.items()}
    stage = Stage(
        name=f"config:{model.triton_name('ensemble')}",
        model=model,
        build=build_ensemble,
        inputs={
            **{key: f"{path}.signature.json" for key, path in files.items()},
            **{f"{step.name}/config.pbtxt": step.config for step in steps},
        },
        outputs={
            "config": model.artifact(f"{TRITON_MODELS['ensemble'].file}.config.pbtxt"),
            "signature": model.artifact(f"{TRITON_MODELS['ensemble'].file}.signature.json"),
        },
        settings={
            **settings_of(model, "ensemble", files=list(files)),
            "steps": msgspec.to_builtins(wiring_of(steps)),
            "outputs": wanted_outputs(model),
            "own": [step.name for step in steps if step.model.name == model.name],
            "network": network.name if (network := last_network(steps)) else None,
        },
        tools=("tritonclient",),
        modules=(__name__, "build_tasks.triton.ensemble_graph", *OWN_MODULES, *CONFIG_MODULES),
        in_process=True,
    )
    return stage.task(doc=f"config.pbtxt of {model.triton_name('ensemble')}")


def build_ensemble(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    from google.protobuf import text_format

    options = msgspec.convert(settings, ConfigSettings)
    steps = msgspec.convert(settings["steps"], list[ensemble_graph.Wiring])
    configs = []
    for step in steps:
        with open(inputs[f"{step.name}/config.pbtxt"], encoding="utf-8") as file:
            configs.append(text_format.Parse(file.read(), triton_config.to_message({})))
    graph = ensemble_graph.connect(steps, configs, settings["outputs"], options.max_batch_size, options.spec)
    ensemble_graph.check_steps(steps, graph, options.spec)
    ensemble = triton_config.to_message({"name": options.name, "platform": TRITON_MODELS["ensemble"].platform})
    ensemble.max_batch_size = graph.max_batch_size
    ensemble.input.extend(graph.inputs.values())
    ensemble.output.extend(graph.outputs.values())
    makers = {name: steps[index].name for index in graph.order for name in graph.maps[index][1].values()}
    for output in ensemble.output:
        if makers[output.name] not in settings["own"]:  # the labels of another model are not in this folder
            output.ClearField("label_filename")
    for index in graph.order:
        # -1 is the newest version. The protobuf's default, 0, would be version 0.
        part = ensemble.ensemble_scheduling.step.add(model_name=steps[index].name, model_version=-1)
        for names, field in zip(graph.maps[index], (part.input_map, part.output_map), strict=True):
            field.update(names)
    network = next((config for config in configs if config.name == settings["network"]), configs[-1])
    if limit := inflight_limit(ensemble, network, options.release):
        ensemble.ensemble_scheduling.max_inflight_requests = limit
    ensemble.MergeFrom(triton_config.to_message(spec_fields(options)))
    # A 0 of the spec, no limit, is the default of the protobuf, which MergeFrom does not take over.
    if options.triton.get("ensemble_scheduling", {}).get(triton_config.IN_FLIGHT) == 0:
        ensemble.ensemble_scheduling.max_inflight_requests = 0
    write_config(ensemble, [inputs[name] for name in options.files], outputs["config"], options)
    write_json(outputs["signature"], signature_of(ensemble))
    order = ", ".join(steps[index].name for index in graph.order)
    return {"max_batch_size": ensemble.max_batch_size, "steps": order}
