"""reference: the fp32 PyTorch network on the accuracy samples -> samples.json, reference.json

    samples ─► timm's transform ─► samples.json ─► eager network ─► reference.json
                    └─► preprocessing.json              └ and a second run, with every input value perturbed by one ulp

samples.json and reference.json are in Polygraphy's formats, so that every machine can compare every artifact with them,
without torch. The second run measures the sensitivity of the network: the change of its outputs for the smallest
change of its inputs. The gate does not require an artifact to be closer than that.
"""

import contextlib
import functools
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError
from build_tasks.formats import picture_transform, pytorch_network
from build_tasks.formats.example_inputs import example_inputs
from build_tasks.formats.label_file import read_labels
from build_tasks.formats.perturbation import exact_inputs, perturbed
from build_tasks.formats.serving_interface import (
    INTERFACE_MODULES,
    forward,
    output_names,
    resolve_interface,
    wrap_for_serving,
)
from build_tasks.json_files import write_json
from build_tasks.paths import MODELS
from build_tasks.runtime import threads
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.interface import client_dims, interface_of, label_files, tuned_interface
from build_tasks.spec.model import Model
from build_tasks.spec.source_checks import IMAGENET
from build_tasks.tensors import Interface
from build_tasks.verification import accuracy_samples

if TYPE_CHECKING:
    import numpy as np
    import torch

RUNNERS = {"PyTorch": "pytorch-fp32", "ONNX Runtime": "onnxruntime-fp32"}  # names in reference.json
BATCH = 8  # samples in one run of the network
RANDOM_SAMPLES = 16
IMAGENET_CLASSES = 1000


def task(model: Model) -> dict[str, Any]:
    source = samples_source(model)
    stage = Stage(
        name=f"reference:{model.name}",
        model=model,
        build=build,
        inputs={
            "weights": model.weights,
            **{path: path for path in (accuracy_samples.sample_files(source) if source else ())},
        },
        outputs={
            "samples": model.artifact("samples.json"),
            "names": model.artifact("samples.txt"),
            "reference": model.artifact("reference.json"),
            "preprocessing": model.artifact("preprocessing.json"),
        },
        peak_batch=BATCH * threads.AT_ONCE,
        settings={
            **pytorch_network.settings_of(model),
            "input": pytorch_network.input_settings_of(model),
            "interface": tuned_interface(interface_of(model.spec)),
            "samples": source,
            "picture": not model.spec.inputs,
            "labels": label_counts(model),
            "reference": model.reference,
        },
        tools=(
            "torch",
            "timm",
            "torchvision",
            "pillow",
            "polygraphy",
            *(("onnxruntime",) if model.spec.from_onnx else ()),
        ),
        modules=(
            __name__,
            "build_tasks.formats.label_file",
            "build_tasks.formats.perturbation",
            "build_tasks.runtime.threads",
            "build_tasks.triton.preprocess_model.preprocessing",
            "build_tasks.verification.accuracy_samples",
            "build_tasks.verification.tolerance",
            *INTERFACE_MODULES,
            *pytorch_network.source_modules(model),
        ),
        source_files=pytorch_network.user_source_files(model),
    )
    return stage.task(doc=f"reference.json: the outputs of {model.reference} for the accuracy samples")


def label_counts(model: Model) -> dict[str, int]:
    """Return the number of labels of each output, "" for the first one, to find a wrong number before long stages.

    An output that clients see in another shape, or of which they see the best classes only, is checked with its config.
    """
    if model.spec.output.top_k:
        return {}
    counts = {}
    first = next((each["name"] for each in interface_of(model.spec)["outputs"]), "")
    for output, (_, labels) in label_files(model.spec).items():
        with contextlib.suppress(UserError, OSError):  # the stage `labels` reports it
            if (output or first) not in client_dims(model.spec):
                counts[output] = IMAGENET_CLASSES if labels == IMAGENET else len(read_labels(model.source(labels)))
    return counts


def check_labels(answers: "dict[str, np.ndarray]", settings: Settings) -> None:
    """Raise UserError if an output has another number of classes than labels."""
    for output, count in settings["labels"].items():
        name = output or next(iter(answers))
        if name in answers and answers[name].shape[-1:] != (count,):
            classes = answers[name].shape[-1]
            raise UserError(
                f"{MODELS}/{settings['model']}/model.toml: labels: expected one label for each of the {classes} "
                f"classes of {name}, found {count} labels"
            )


def samples_source(model: Model) -> str | None:
    """Return the folder or file of the accuracy samples; None for random ones, if the input is not one picture."""
    if samples := model.spec.accuracy.samples:
        return model.source(samples)
    return None if model.spec.inputs else accuracy_samples.SHIPPED_PHOTOGRAPHS


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import numpy as np
    import torch
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    network = pytorch_network.create_network(settings, inputs["weights"])
    interface = resolve_interface(network, settings["interface"])
    module = wrap_for_serving(network, interface)
    names, batch, preprocessing = load_samples(module, interface, inputs, settings)
    arrays = [np.asarray(array) for array in batch]
    arrays = [array.astype(str) if array.dtype == object else array for array in arrays]  # without pickles
    feed = {each["name"]: array for each, array in zip(interface["inputs"], arrays, strict=True)}
    save_json([feed], outputs["samples"])
    results = RunResults()
    runner = RUNNERS[settings["reference"]]
    perturbed_runner = f"{runner}, inputs perturbed by one ulp"
    for name, (runs, samples) in (
        (runner, (module, batch)),
        (perturbed_runner, perturbed(module, exact_inputs(module, batch, interface))),
    ):
        batches = [[each[start : start + BATCH] for each in samples] for start in range(0, len(samples[0]), BATCH)]
        parts = threads.each(functools.partial(forward, runs), batches)
        answers = [torch.cat(answer).numpy() for answer in zip(*parts, strict=True)]
        named = dict(zip(output_names(module), answers, strict=True))
        check_labels(named, settings)
        results.add([named], runner_name=name)
    results.save(outputs["reference"])
    with open(outputs["names"], "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)
    write_json(outputs["preprocessing"], preprocessing)
    return {"samples": len(names), "outputs": [list(answer.shape[1:]) for answer in answers]}


def load_samples(
    module: "torch.nn.Module", interface: Interface, inputs: Paths, settings: Settings
) -> tuple[list[str], list[Any], dict[str, Any]]:
    """Return the names of the samples, the samples of each input, and the content of preprocessing.json.

    Args:
        module: The network.
        interface: Its interface, resolved.
        inputs: The inputs of the stage.
        settings: Its settings.
    """
    import torch

    source = settings["samples"]
    if source is None:
        print(f"no accuracy.samples: {RANDOM_SAMPLES} random samples, by the ranges of [[inputs]]")
        return [f"random {index}" for index in range(RANDOM_SAMPLES)], example_inputs(interface, RANDOM_SAMPLES), {}
    if not settings["picture"]:
        feed = accuracy_samples.load_feed(source, interface["inputs"])
        batch = [feed[each["name"]] for each in interface["inputs"]]
        tensors = [each if each.dtype == object else torch.from_numpy(each) for each in batch]
        return [str(index) for index in range(len(batch[0]))], tensors, {}
    input_format = settings["input"]["format"]
    config = picture_transform.data_config(module, settings["input"])
    paths = [path for name, path in inputs.items() if name == path]  # the files of the samples
    names, pictures = accuracy_samples.load_samples(
        source, paths, lambda: picture_transform.transform(config, input_format), config, input_format
    )
    steps = picture_transform.format_steps(config, input_format)
    return names, [torch.from_numpy(pictures)], {"format": input_format, **config, "steps": steps}
