"""ensemble: an ensemble of one's own steps, end to end -> model.ensemble.measured.json

    samples ─┬► artifacts and Python models, step by step ──────────────► outputs ─┐
             ├► PyTorch networks and the same Python models ────────────► outputs ─┼► figures ─► gate
             └► the same, each network's inputs perturbed by one ulp ───► outputs ─┘

Python models run as they are, without a server. Ensembles among the steps are replaced by their own steps. samples and
reference are kept for `doit smoke`, which sends them to the ensemble of a running server. The default gate is that of
the lowest precision among the steps.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from build_tasks.errors import UserError
from build_tasks.formats import declarations
from build_tasks.formats.declarations import INTERFACE_MODULES, ONNX_MODULES
from build_tasks.formats.ensemble_steps import PYTHON, Step, inner_steps, wanted_outputs, wiring_of
from build_tasks.json_files import read_json, write_json
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.ensemble_tables import Ensemble
from build_tasks.spec.interface import interface_of
from build_tasks.spec.model import Model
from build_tasks.tensors import IMAGE, Feed, Signature, batch_of, resize, take
from build_tasks.triton import ensemble_graph
from build_tasks.triton import model_config as triton_config
from build_tasks.triton.platforms import FORMATS, TRITON_MODELS
from build_tasks.verification import accuracy_samples, gate, metrics, tensor_samples

if TYPE_CHECKING:
    import numpy as np

    from build_tasks.formats.step_runs import Run

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")  # from the most to the least exact
SAMPLES = 16  # at most so many are sent through the steps


def task(model: Model, steps: list[Step]) -> dict[str, Any]:
    """The doit task of an ensemble of one's own."""
    name = TRITON_MODELS["ensemble"].file
    inner = inner_steps(steps)
    networks = [step for step in inner if step.kind in FORMATS]
    precision = max((step.model.precision(step.kind) for step in networks), key=PRECISIONS.index, default="fp32")
    own_samples = model.spec.ensemble.samples if isinstance(model.spec.ensemble, Ensemble) else None
    pictures = {path for step in inner if step.kind == "preprocess" for path in _pictures(step.model)}
    stage = Stage(
        name=f"ensemble:{model.name}",
        model=model,
        build=build,
        inputs={
            **{f"{step.name}/config.pbtxt": step.config for step in (*_with_ensembles(steps), *inner)},
            **{f"{step.name}/artifact": next(iter(step.artifacts.values())) for step in inner},
            **{f"{step.name}/signature": f"{next(iter(step.artifacts.values()))}.signature.json" for step in networks},
            **{f"{step.name}/weights": step.model.weights for step in networks},
            **{f"{step.name}/samples": step.model.artifact("samples.json") for step in networks},
            **({"samples": model.source(own_samples)} if own_samples else {}),
            **{path: path for path in sorted(pictures)},
        },
        outputs={
            "measured": model.artifact(f"{name}.measured.json"),
            "samples": model.artifact(f"{name}.samples.json"),
            "names": model.artifact(f"{name}.samples.txt"),
            "reference": model.artifact(f"{name}.reference.json"),
        },
        settings={
            "spec": model.file,
            "steps": msgspec.to_builtins(wiring_of(steps)),
            "kinds": {step.name: step.kind for step in inner},
            "networks": {step.name: _network_settings(step.model) for step in networks},
            "models": {step.name: step.model.name for step in inner},
            "outputs": wanted_outputs(model),
            "max_batch_size": model.largest_batch("ensemble"),
            "gate": gate.settings_of(model, "ensemble", precision),
        },
        tools=("torch", "timm", "onnxruntime", "polygraphy", "numpy", "pillow"),
        modules=(
            __name__,
            "build_tasks.formats.python_backend",
            "build_tasks.formats.step_runs",
            "build_tasks.triton.platforms",
            "build_tasks.triton.ensemble_graph",
            "build_tasks.triton.model_config",
            "build_tasks.verification.accuracy_samples",
            "build_tasks.verification.ensemble_samples",
            "build_tasks.verification.tensor_samples",
            "build_tasks.verification.tolerance",
            *gate.GATE_MODULES,
            *dict.fromkeys(ONNX_MODULES),
            *INTERFACE_MODULES,
            *{module: None for step in networks for module in declarations.source_modules(step.model)},
        ),
        source_files=tuple(path for step in networks for path in declarations.user_source_files(step.model)),
    )
    return stage.task(doc=f"{model.triton_name('ensemble')} end to end, against its steps in PyTorch")


def _with_ensembles(steps: Iterable[Step]) -> Iterator[Step]:
    """Yield steps, and those of ensembles among them."""
    for step in steps:
        yield step
        yield from _with_ensembles(step.steps)


def _pictures(model: Model) -> list[str]:
    samples = model.spec.accuracy.samples
    source = model.source(samples) if samples else accuracy_samples.SHIPPED_PHOTOGRAPHS
    return [] if source.endswith(accuracy_samples.TENSOR_SUFFIXES) else accuracy_samples.sample_files(source)


def _network_settings(model: Model) -> Settings:
    return {**declarations.settings_of(model), "interface": interface_of(model.spec)}


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import numpy as np
    from polygraphy.comparator import IterationResult, RunResults

    from build_tasks.formats.step_runs import artifact_run, perturb_inputs, reference_run
    from build_tasks.verification.ensemble_samples import save_samples

    configs = _read_configs(inputs)
    for name, config in configs.items():
        if config.sequence_batching.control_input or config.sequence_batching.state:
            raise UserError(
                f"{settings['spec']}: ensemble: expected steps whose inputs clients or other steps send, since the "
                f"steps are compared without a server; Triton itself fills inputs of {name}"
            )
    outer = msgspec.convert(settings["steps"], list[ensemble_graph.Wiring])
    connected = _connect(outer, configs, settings["outputs"], settings["max_batch_size"], settings["spec"])
    smallest, largest = connected.batches
    if not largest:
        raise UserError(
            f"{settings['spec']}: ensemble: expected steps whose dims begin with the batch if their max_batch_size is "
            "0, found others"
        )
    steps = ensemble_graph.flatten(outer, configs)
    graph = _connect(steps, configs, list(connected.outputs), largest, settings["spec"])
    feed = read_samples(inputs, settings, steps, graph, configs)
    distinct = min(SAMPLES, *map(len, feed.values()))
    count = max(distinct - distinct % smallest, smallest)
    feed = resize(take(feed, slice(distinct)), count)
    pythons = {
        step.name: _python_model(inputs, settings, step.name, configs[step.name])
        for step in steps
        if settings["kinds"][step.name] not in FORMATS
    }
    run = functools.partial(run_steps, graph, steps, feed, largest)
    artifacts: dict[str, Run] = {}
    networks: dict[str, Run] = {}
    for name in {step.name: None for step in steps if step.name not in pythons}:
        signature: Signature = read_json(inputs[f"{name}/signature"])
        kind, network = settings["kinds"][name], settings["networks"][name]
        artifacts[name] = artifact_run(inputs[f"{name}/artifact"], kind, signature, configs[name])
        networks[name] = reference_run(network, inputs[f"{name}/weights"], signature, configs[name])
    found = run(pythons | artifacts)
    expected = run(pythons | networks)
    moved = run(pythons | {name: perturb_inputs(network) for name, network in networks.items()})
    names = [f"sample {index + 1}" for index in range(count)]
    numbers = [name for name, array in expected.items() if array.dtype.kind in "fiub"]
    artifact, reference, perturbed = (
        IterationResult({name: each[name] for name in numbers}) for each in (found, expected, moved)
    )
    figures = metrics.compare_outputs(artifact, reference, perturbed, names)
    measured: metrics.Measurements = {"samples": count, "distinct": min(count, distinct), "outputs": figures}
    write_json(outputs["measured"], {**measured, "gate": settings["gate"], "batches": connected.batches})
    save_samples(feed, outputs["samples"])
    results = RunResults()
    for runner, answers in (("pytorch-fp32", expected), ("pytorch-fp32, inputs perturbed by one ulp", moved)):
        results.add([{name: answers[name] for name in numbers}], runner_name=runner)  # it cannot hold texts
    results.save(outputs["reference"])
    with open(outputs["names"], "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)
    if reason := gate.gate_error(measured, settings["gate"], "; see docs/how-to/ensembles.md"):
        raise UserError(f"the ensemble differs from its steps in PyTorch: {reason}")
    texts = {
        f"equal {name}": f"{int(np.all(found[name] == array, axis=tuple(range(1, array.ndim))).sum())} of {count}"
        for name, array in expected.items()
        if name not in numbers
    }
    if not numbers and (wrong := [f"{key}: {equal}" for key, equal in texts.items() if equal != f"{count} of {count}"]):
        raise UserError(f"the ensemble differs from its steps in PyTorch: {', '.join(wrong)}")
    error = metrics.key_figures(measured) if numbers else {}
    return {**error, **texts, "Python models": ", ".join(pythons) or "none"}


def _read_configs(inputs: Paths) -> dict[str, Any]:
    """Return the ModelConfigs of all steps, by name."""
    from google.protobuf import text_format

    configs = {}
    for key, path in inputs.items():
        name, separator, _ = key.partition("/config.pbtxt")
        if separator:
            with open(path, encoding="utf-8") as file:
                configs[name] = text_format.Parse(file.read(), triton_config.to_message({}))
    return configs


def _connect(
    steps: list[ensemble_graph.Wiring], configs: dict[str, Any], outputs: list[str], largest: int, spec: str
) -> ensemble_graph.Graph:
    return ensemble_graph.connect(steps, [configs[step.name] for step in steps], outputs, largest, spec)


def read_samples(
    inputs: Paths,
    settings: Settings,
    steps: list[ensemble_graph.Wiring],
    graph: ensemble_graph.Graph,
    configs: dict[str, Any],
) -> Feed:
    """Return the samples for each input of the ensemble, arrays (samples, …) as clients send them.

    Raises:
        UserError: If there are none for an input, or if they have another type or other dims.
    """
    from polygraphy.json import load_json

    from build_tasks.formats.step_runs import as_clients_send, encode_texts

    own: Feed = {}
    if "samples" in inputs:
        own = {name: encode_texts(array) for name, array in tensor_samples.read_file(inputs["samples"])[0].items()}
    feed: Feed = {}
    for tensor, config in graph.inputs.items():
        if tensor in own:
            _check_samples(tensor, own[tensor], config, graph, settings["spec"])
            feed[tensor] = own[tensor]
            continue
        for step, (input_map, _) in zip(steps, graph.maps, strict=True):
            for name in [name for name, taken in input_map.items() if taken == tensor]:
                kind = settings["kinds"][step.name]
                if kind in FORMATS:
                    array = load_json(inputs[f"{step.name}/samples"])[0][name]
                    taker = next(each for each in configs[step.name].input if each.name == name)
                    feed[tensor] = as_clients_send(array, taker)
                elif kind == "preprocess" and name == IMAGE:
                    from build_tasks.spec.loader import read_model

                    encoded = accuracy_samples.read_encoded(read_model(settings["models"][step.name]))
                    if encoded is not None:
                        feed[tensor] = encoded
        if tensor not in feed:
            expected = f"an .npz with the array {tensor!r}, since no step that takes it has samples"
            raise UserError(f"{settings['spec']}: ensemble.samples: expected {expected}, found nothing")
    return feed


def _check_samples(name: str, array: "np.ndarray", tensor: Any, graph: ensemble_graph.Graph, spec: str) -> None:
    """Raise UserError if an array of ensemble.samples is no batch of an input of the ensemble."""
    from build_tasks.formats.python_backend import NUMPY_TYPES

    dtype = NUMPY_TYPES.get(triton_config.protobuf().DataType.Name(tensor.data_type), "")
    dims = list(tensor.dims if graph.max_batch_size else tensor.dims[1:])
    fits = len(dims) == array.ndim - 1 and all(a in (-1, b) for a, b in zip(dims, array.shape[1:], strict=True))
    if array.dtype != dtype or not fits:
        found = f"{'texts' if array.dtype == object else array.dtype} of the shape {list(array.shape)}"
        expected = f"{'texts' if dtype == 'object' else dtype} of the shape {['samples', *dims]}".replace("'", "")
        raise UserError(f"{spec}: ensemble.samples: expected for {name} {expected} (-1: any length), found {found}")


def run_steps(
    graph: ensemble_graph.Graph, steps: list[ensemble_graph.Wiring], feed: Feed, largest: int, runs: "dict[str, Run]"
) -> Feed:
    """Return the outputs of an ensemble for all samples. The steps run in batches of at most `largest` samples."""
    import numpy as np

    parts = []
    for start in range(0, batch_of(feed), largest):
        tensors = {name: array[start : start + largest] for name, array in feed.items()}
        for index in graph.order:
            input_map, output_map = graph.maps[index]
            answer = runs[steps[index].name]({name: tensors[tensor] for name, tensor in input_map.items()})
            tensors |= {tensor: answer[name] for name, tensor in output_map.items()}
        parts.append(tensors)
    return {name: np.concatenate([part[name] for part in parts]) for name in graph.outputs}


def _python_model(inputs: Paths, settings: Settings, name: str, config: Any) -> "Run":
    from build_tasks.formats.python_backend import PythonModel

    folder = name.removeprefix(f"{settings['models'][name]}_")
    path = f"models/{settings['models'][name]}/{folder}/model.py" if settings["kinds"][name] == PYTHON else name
    return PythonModel(inputs[f"{name}/artifact"], config, path)
