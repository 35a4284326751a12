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
from build_tasks.formats import declarations
from build_tasks.formats.declarations import INTERFACE_MODULES
from build_tasks.formats.label_file import read_labels
from build_tasks.json_files import write_json
from build_tasks.paths import MODELS
from build_tasks.runtime import threads
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.engine_profiles import lengths_of_profiles
from build_tasks.spec.interface import client_dims, interface_of, label_files, tuned_interface
from build_tasks.spec.model import Model
from build_tasks.spec.pictures import picture_tables
from build_tasks.spec.source_checks import IMAGENET
from build_tasks.tensors import Feed, Interface
from build_tasks.verification import accuracy_samples

if TYPE_CHECKING:
    import numpy as np
    import torch

RUNNERS = {"PyTorch": "pytorch-fp32", "ONNX Runtime": "onnxruntime-fp32"}  # names in reference.json
BATCH = 8  # samples in one run of the network
IMAGENET_CLASSES = 1000


def task(model: Model) -> dict[str, Any]:
    source = accuracy_samples.samples_source(model)
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
            **declarations.settings_of(model),
            "input": declarations.input_settings_of(model),
            "interface": interface_of(model.spec) if model.spec.inputs else tuned_interface(interface_of(model.spec)),
            "samples": source,
            "picture": not model.spec.inputs,
            "labels": label_counts(model),
            "pictures": picture_tables(model.spec),
            "reference": model.reference,
            "lengths": lengths_of_profiles(model.spec) if source is None else [],
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
            "build_tasks.formats.input_samples",
            "build_tasks.formats.label_file",
            "build_tasks.formats.perturbation",
            "build_tasks.runtime.threads",
            "build_tasks.triton.preprocess_model.preprocessing",
            "build_tasks.verification.accuracy_samples",
            "build_tasks.verification.tensor_samples",
            "build_tasks.verification.tolerance",
            *INTERFACE_MODULES,
            *declarations.source_modules(model),
        ),
        source_files=declarations.user_source_files(model),
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


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import torch
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    from build_tasks.formats import pytorch_network
    from build_tasks.formats.perturbation import exact_inputs, perturbed
    from build_tasks.formats.serving_interface import (
        explain_errors,
        forward,
        output_names,
        resolve_interface,
        wrap_for_serving,
    )

    network = pytorch_network.create_network(settings, inputs["weights"])
    interface = resolve_interface(network, settings["interface"])
    module = wrap_for_serving(network, interface)
    names, groups, preprocessing = load_samples(module, interface, inputs, settings)
    saved = [  # strings without pickles
        {name: array.astype(str) if array.dtype == object else array for name, array in feed.items()} for feed in groups
    ]
    save_json(saved, outputs["samples"])
    results = RunResults()
    runner = RUNNERS[settings["reference"]]
    for name in (runner, f"{runner}, inputs perturbed by one ulp"):
        iterations = []
        for feed in groups:
            runs, samples = module, [a if a.dtype == object else torch.from_numpy(a) for a in feed.values()]
            if name != runner:
                runs, samples = perturbed(module, exact_inputs(module, samples, interface))
            batches = [[each[start : start + BATCH] for each in samples] for start in range(0, len(samples[0]), BATCH)]
            with explain_errors(batches[0]):
                parts = threads.each(functools.partial(forward, runs), batches)
            answers = [torch.cat(answer).numpy() for answer in zip(*parts, strict=True)]
            named = dict(zip(output_names(module), answers, strict=True))
            check_labels(named, settings)
            iterations.append(named)
        results.add(iterations, runner_name=name)
    results.save(outputs["reference"])
    with open(outputs["names"], "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)
    write_json(outputs["preprocessing"], preprocessing)
    notes: Notes = {"samples": len(names), "outputs": [list(answer.shape[1:]) for answer in answers]}
    if settings["samples"] is None:
        notes["random"] = "by the ranges of [[inputs]], since there are no accuracy.samples"
    return notes


def load_samples(
    module: "torch.nn.Module", interface: Interface, inputs: Paths, settings: Settings
) -> tuple[list[str], list[Feed], dict[str, Any]]:
    """Return the names of the samples, the samples in groups of one shape, and the content of preprocessing.json.

    Args:
        module: The network.
        interface: Its interface, resolved.
        inputs: The inputs of the stage.
        settings: Its settings.
    """
    from build_tasks.formats import input_samples, picture_transform

    source = settings["samples"]
    paths = [path for name, path in inputs.items() if name == path]  # the files of the samples
    if not settings["picture"]:
        preparing = input_samples.picture_settings(module, interface, settings["pictures"])
        if source is None:
            return *input_samples.random_samples(interface, settings["lengths"]), preparing
        return *input_samples.load_samples(module, source, paths, interface, settings["pictures"]), preparing
    input_format = settings["input"]["format"]
    config = picture_transform.data_config(module, settings["input"])
    steps = picture_transform.format_steps(config, input_format)
    preprocessing = {"format": input_format, **config, "steps": steps}
    if source not in paths and any(path.endswith(".npz") for path in paths):
        return *input_samples.load_samples(module, source, paths, interface, settings["pictures"]), preprocessing
    names, pictures = accuracy_samples.load_samples(
        source, paths, lambda: picture_transform.transform(config, input_format), config, input_format
    )
    return names, [{interface["inputs"][0]["name"]: pictures}], preprocessing
