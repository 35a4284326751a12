"""cast: model.pt -> model.<precision>.pt, which PyTorch serves, and its signature

    fp32 NCHW ─► cast, channels last ─► the frozen trace in fp16 ─► cast ─► fp32      clients see no difference

The ONNX export always starts from model.pt, and so does the serving of models that need no cast. This stage compares
only dtypes and shapes with model.pt. The gate checks the values later, on the accuracy samples, with the rounding of a
GPU (see formats/torchscript_graph.py).
"""

from typing import Any

from build_tasks.errors import UserError, first_lines
from build_tasks.formats import pytorch_network
from build_tasks.json_files import read_json, write_json
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.model import Model, table_settings

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
            "format": model.spec.input.format,
            "shape": model.spec.input.shape,
            "sizes": model.spec.sizes,
        },
        tools=TOOLS,
        modules=(__name__, "build_tasks.formats.torchscript_graph", *pytorch_network.source_modules(model)),
    )
    return stage.task(doc=f"{file}: {model.torchscript.precision}, {model.torchscript.memory_format}")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import torch

    from build_tasks.formats import torchscript_graph

    signature = read_json(inputs["trace's signature"])
    tools = read_json(inputs["trace's tools"])
    options, input_format = settings["torchscript"], settings["format"]
    dtypes = [tensor["dtype"] for tensor in signature["outputs"]]
    try:
        torchscript_graph.save_torchscript(
            torchscript_graph.cast_trace(inputs["trace"], **options, output_dtypes=dtypes, input_format=input_format),
            outputs["model"],
        )
        check(inputs["trace"], outputs["model"], signature["inputs"][0]["shape"], settings)
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


def check(trace: str, path: str, dims: list[int], settings: Settings) -> None:
    """Compare the dtypes and shapes of the outputs with the outputs of model.pt, at all sizes of the spec.

    Args:
        trace: Path of model.pt.
        path: Path of the cast file.
        dims: Shape of the input in the signature, with the batch.
    Raises:
        RuntimeError: If they differ, or if the cast file does not run.
    """
    import torch

    from build_tasks.formats import torchscript_graph

    exact, loaded = torch.jit.load(trace), torch.jit.load(path)
    channels_last = settings["format"] == "uint8_nhwc"
    traced = (dims[3], dims[1], dims[2]) if channels_last else (dims[1], dims[2], dims[3])
    shape = tuple(settings["shape"] or traced)
    for size in pytorch_network.shapes_to_check(shape, settings["sizes"]):
        for count in BATCHES:
            batch = pytorch_network.example_input(size, count, settings["format"])
            expected = pytorch_network.forward(exact, batch)
            actual = pytorch_network.forward(
                lambda batch: torchscript_graph.run_with_gpu_rounding(loaded, batch), batch
            )
            forms = [[(answer.dtype, answer.shape) for answer in each] for each in (actual, expected)]
            if forms[0] != forms[1]:
                raise RuntimeError(f"at batch {count} its outputs are {forms[0]}, and those of model.pt {forms[1]}")
