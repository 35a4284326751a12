"""reference: the fp32 PyTorch network on the accuracy samples -> samples.json, reference.json

    samples ─► timm's transform ─► samples.json ─► eager network ─► reference.json
                    └─► preprocessing.json              └ and a second run, with every input value perturbed by one ulp

samples.json and reference.json are in Polygraphy's formats, so that every machine can compare every artifact with them,
without torch. The second run measures the sensitivity of the network: the change of its outputs for the smallest
change of its inputs. The gate does not require an artifact to be closer than that.
"""

import functools
from typing import Any

from build_tasks.formats import picture_transform, pytorch_network
from build_tasks.json_files import write_json
from build_tasks.runtime import threads
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.model import Model
from build_tasks.tensors import INPUT, OUTPUT
from build_tasks.verification import accuracy_samples
from build_tasks.verification.tolerance import perturb_one_ulp

RUNNERS = {"PyTorch": "pytorch-fp32", "ONNX Runtime": "onnxruntime-fp32"}  # names in reference.json
BATCH = 8  # samples in one run of the network


def task(model: Model) -> dict[str, Any]:
    source = (
        model.source(model.spec.accuracy.samples)
        if model.spec.accuracy.samples
        else accuracy_samples.SHIPPED_PHOTOGRAPHS
    )
    stage = Stage(
        name=f"reference:{model.name}",
        model=model,
        build=build,
        inputs={
            "weights": model.weights,
            **{path: path for path in accuracy_samples.sample_files(source)},
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
            "interface": pytorch_network.interface_of(model),
            "samples": source,
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
            "build_tasks.runtime.threads",
            "build_tasks.triton.preprocess_model.preprocessing",
            "build_tasks.verification.accuracy_samples",
            "build_tasks.verification.tolerance",
            *pytorch_network.source_modules(model),
        ),
        source_files=pytorch_network.user_source_files(model),
    )
    return stage.task(doc=f"reference.json: the outputs of {model.reference} for the accuracy samples")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import torch
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    interface = settings["interface"]
    module = pytorch_network.wrap_for_serving(pytorch_network.create_network(settings, inputs["weights"]), interface)
    preprocessing = picture_transform.data_config(module, settings["input"])
    paths = [path for name, path in inputs.items() if name == path]  # the files of the samples
    names, batch = accuracy_samples.load_samples(
        settings["samples"],
        paths,
        lambda: picture_transform.transform(preprocessing, interface["format"]),
        preprocessing,
        interface["format"],
    )
    save_json([{INPUT: batch}], outputs["samples"])
    results = RunResults()
    exact = batch
    if interface["format"] == "uint8_nhwc":  # a byte has no ulp, so that the normalized floats are perturbed
        exact = pytorch_network.normalize_input(module, torch.from_numpy(batch), interface).numpy()
    runner = RUNNERS[settings["reference"]]
    for name, samples in ((runner, batch), (f"{runner}, inputs perturbed by one ulp", perturb_one_ulp(exact))):
        batches = torch.from_numpy(samples).split(BATCH)
        parts = threads.each(functools.partial(pytorch_network.forward, module), batches)
        answers = [torch.cat(answer).numpy() for answer in zip(*parts, strict=True)]
        results.add([{OUTPUT.format(index): answer for index, answer in enumerate(answers)}], runner_name=name)
    results.save(outputs["reference"])
    with open(outputs["names"], "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)
    steps = picture_transform.format_steps(preprocessing, interface["format"])
    write_json(outputs["preprocessing"], {"format": interface["format"], **preprocessing, "steps": steps})
    return {"samples": len(names), "outputs": [list(answer.shape[1:]) for answer in answers]}
