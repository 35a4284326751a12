"""cast: model.pt -> model.<precision>.pt, which PyTorch serves, and its signature

    fp32 NCHW ─► cast, channels last ─► the frozen trace in fp16 ─► cast ─► fp32      clients see no difference

For `triton.device = "gpu"` the cast graph is rewritten as well (see formats/torchscript_gpu.py). The file then needs a
GPU, which its signature says.

The ONNX export always starts from model.pt, and so does the serving of models that need no cast. This stage compares
only dtypes and shapes with model.pt. The gate checks the values later, on the accuracy samples, with the rounding of a
GPU (see formats/torchscript_graph.py).
"""

import functools
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, first_lines
from build_tasks.formats.declarations import INTERFACE_MODULES, TRANSFORM_MODULES
from build_tasks.json_files import read_json, write_json
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.interface import dimensions_of, inputs_of
from build_tasks.spec.model import Model, table_settings
from build_tasks.tensors import Signature, dims_at

if TYPE_CHECKING:
    import torch

TOOLS = ("torch",)
GRAPH_MODULES = ("build_tasks.formats.torchscript_graph", "build_tasks.formats.torchscript_gpu")
BATCHES = (1, 3)  # run here; the torchscript stage has checked model.pt at more of them


def task(model: Model) -> dict[str, Any]:
    (file,) = model.files("torchscript")
    stage = Stage(
        name=f"cast:{model.name}",
        model=model,
        build=build,
        inputs={
            "trace": model.artifact("model.pt"),
            "trace's signature": model.artifact("model.pt.signature.json"),
            "trace's tools": model.artifact("model.pt.tools.json"),
        },
        outputs={
            "model": model.artifact(file),
            "signature": model.artifact(f"{file}.signature.json"),
            "tools": model.artifact(f"{file}.tools.json"),
        },
        peak_batch=max(BATCHES),
        settings={
            "torchscript": table_settings(model.torchscript),
            "inputs": inputs_of(model.spec),
            "dimensions": dimensions_of(model.spec),
            "for_gpu": model.triton_keys.device == "gpu",
        },
        tools=TOOLS,
        modules=(__name__, *GRAPH_MODULES, *INTERFACE_MODULES, *TRANSFORM_MODULES, "build_tasks.tensors"),
    )
    return stage.task(doc=f"{file}: {model.torchscript.precision}, {model.torchscript.memory_format}")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import torch

    signature = read_json(inputs["trace's signature"])
    tools = read_json(inputs["trace's tools"])
    options = settings["torchscript"]
    notes = {**options, "batches": list(BATCHES)}
    rewritten = settings["for_gpu"] and options["precision"] != "fp32" and options["memory_format"] == "channels_last"
    save = functools.partial(save_cast, inputs["trace"], outputs["model"], signature, settings)
    try:
        try:
            counts, needs_gpu = save(rewritten)
            notes |= {"rewritten": ", ".join(f"{count} {what}" for what, count in counts.items() if count)}
        except RuntimeError as error:
            if not rewritten:
                raise
            _, needs_gpu = save(rewritten=False)
            notes |= {"not rewritten": first_lines(error)}
    except RuntimeError as error:
        raise UserError(
            f"the trace does not run in {options['precision']}: {first_lines(error)}; "
            'with torchscript.precision = "fp32" model.pt is served as it is'
        ) from error
    record = {**signature, "PyTorch": torch.__version__.partition("+")[0]}
    if needs_gpu:
        record["needs_gpu"] = True
    write_json(outputs["signature"], record)
    write_json(outputs["tools"], {**tools, **versions(TOOLS)})
    return {key: value for key, value in notes.items() if value}


def save_cast(
    trace: str, path: str, signature: Signature, settings: Settings, rewritten: bool
) -> tuple[dict[str, int], bool]:
    """Write the cast file and check it.

    Returns: How often each rewrite was applied, and whether the file needs a GPU.
    Raises:
        RuntimeError: If the file does not run, or if its outputs are other ones than those of model.pt.
    """
    from build_tasks.formats import torchscript_gpu, torchscript_graph
    from build_tasks.formats.example_inputs import lengths_to_check

    module = torchscript_graph.cast_trace(
        trace,
        **settings["torchscript"],
        output_dtypes=[tensor["dtype"] for tensor in signature["outputs"]],
        input_dtypes=[tensor["dtype"] for tensor in signature["inputs"]],
        pictures=[each["layout"] == "nchw" for each in settings["inputs"]],
    )
    counts = {}
    if rewritten:
        lengths = lengths_to_check(settings["dimensions"])[0]
        counts = torchscript_gpu.rewrite_for_gpu(module, example_inputs(signature, settings, max(BATCHES), lengths))
    torchscript_graph.save_torchscript(module, path)
    check(trace, path, signature, settings)
    return counts, torchscript_gpu.needs_gpu(module)


def check(trace: str, path: str, signature: Signature, settings: Settings) -> None:
    """Compare the dtypes and shapes of the outputs with those of model.pt, at all lengths of open dimensions.

    Args:
        trace: Path of model.pt.
        path: Path of the cast file.
        signature: That of model.pt.
        settings: The settings of the stage.
    Raises:
        RuntimeError: If they differ, or if the cast file does not run.
    """
    import torch

    from build_tasks.formats import torchscript_graph
    from build_tasks.formats.example_inputs import lengths_to_check
    from build_tasks.formats.serving_interface import forward

    exact, loaded = torch.jit.load(trace), torch.jit.load(path)
    rounded = functools.partial(torchscript_graph.run_with_gpu_rounding, loaded)
    for lengths in lengths_to_check(settings["dimensions"]):
        for count in BATCHES:
            batch = example_inputs(signature, settings, count, lengths)
            expected, actual = forward(exact, batch), forward(rounded, batch)
            forms = [[(answer.dtype, answer.shape) for answer in each] for each in (actual, expected)]
            if forms[0] != forms[1]:
                raise RuntimeError(f"at batch {count} its outputs are {forms[0]}, and those of model.pt {forms[1]}")


def example_inputs(
    signature: Signature, settings: Settings, count: int, lengths: dict[str, int]
) -> "list[torch.Tensor]":
    """Random tensors for all inputs of the network, of a batch and of these lengths of the open dimensions."""
    from build_tasks.formats.example_inputs import random_values

    return [
        random_values(each, [count, *dims_at(each["shape"] or own["shape"][1:], lengths)], seed)
        for seed, (each, own) in enumerate(zip(settings["inputs"], signature["inputs"], strict=True))
    ]
