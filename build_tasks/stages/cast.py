"""cast: model.pt -> model.<precision>.pt, which PyTorch serves, and its signature

    fp32 NCHW ─► cast, channels last ─► the frozen trace in fp16 ─► cast ─► fp32      clients see no difference

The ONNX export always starts from model.pt, and so does the serving of models that need no cast. This stage compares
only dtypes and shapes with model.pt. The gate checks the values later, on the accuracy samples, with the rounding of a
GPU (see formats/torchscript_graph.py).
"""

import functools
from typing import Any

from build_tasks.errors import UserError, first_lines
from build_tasks.formats import pytorch_network
from build_tasks.formats.example_inputs import lengths_to_check, random_values
from build_tasks.formats.serving_interface import INTERFACE_MODULES, forward
from build_tasks.json_files import read_json, write_json
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.interface import dimensions_of, inputs_of
from build_tasks.spec.model import Model, table_settings
from build_tasks.tensors import Signature, dims_at

TOOLS = ("torch",)
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
        },
        tools=TOOLS,
        modules=(
            __name__,
            "build_tasks.formats.torchscript_graph",
            *INTERFACE_MODULES,
            *pytorch_network.source_modules(model),
        ),
    )
    return stage.task(doc=f"{file}: {model.torchscript.precision}, {model.torchscript.memory_format}")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import torch

    from build_tasks.formats import torchscript_graph

    signature = read_json(inputs["trace's signature"])
    tools = read_json(inputs["trace's tools"])
    options = settings["torchscript"]
    dtypes = [tensor["dtype"] for tensor in signature["outputs"]]
    pictures = [each["layout"] == "nchw" for each in settings["inputs"]]
    try:
        torchscript_graph.save_torchscript(
            torchscript_graph.cast_trace(
                inputs["trace"],
                **options,
                output_dtypes=dtypes,
                input_dtypes=[tensor["dtype"] for tensor in signature["inputs"]],
                pictures=pictures,
            ),
            outputs["model"],
        )
        check(inputs["trace"], outputs["model"], signature, settings)
    except RuntimeError as error:
        raise UserError(
            f"the trace does not run in {options['precision']}: {first_lines(error)}; "
            'with torchscript.precision = "fp32" model.pt is served as it is'
        ) from error
    for name, record in (
        ("signature", {**signature, "PyTorch": torch.__version__.partition("+")[0]}),
        ("tools", {**tools, **versions(TOOLS)}),
    ):
        write_json(outputs[name], record)
    return {**options, "batches": list(BATCHES)}


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

    exact, loaded = torch.jit.load(trace), torch.jit.load(path)
    rounded = functools.partial(torchscript_graph.run_with_gpu_rounding, loaded)
    for lengths in lengths_to_check(settings["dimensions"]):
        for count in BATCHES:
            batch = [
                random_values(each, [count, *dims_at(each["shape"] or own["shape"][1:], lengths)], seed)
                for seed, (each, own) in enumerate(zip(settings["inputs"], signature["inputs"], strict=True))
            ]
            expected, actual = forward(exact, batch), forward(rounded, batch)
            forms = [[(answer.dtype, answer.shape) for answer in each] for each in (actual, expected)]
            if forms[0] != forms[1]:
                raise RuntimeError(f"at batch {count} its outputs are {forms[0]}, and those of model.pt {forms[1]}")
