"""A model that exists only as ONNX: weights.source is its file, and ONNX Runtime with it the reference.

model.onnx ─► one input, images ─► INPUT__0, OUTPUT__0 ─► weights.onnx ──► reference
(or a folder, with its weights apart)                          │
                             batch and size as the spec says ◄─┘
                                       └─► slim ─► check against weights.onnx ─► model.onnx
"""

import math
from typing import TYPE_CHECKING, Any

from build_tasks import architecture, overrides, worker
from build_tasks import onnx as export
from build_tasks import weights as source
from build_tasks.compare import INPUT, OUTPUT, fixed_batch, onnx_file
from build_tasks.errors import UserError, first_lines
from build_tasks.spec import Model
from build_tasks.stage import Notes, Paths, Settings, code_of

if TYPE_CHECKING:
    import onnx

CHANNELS = (1, 3, 4)  # of pictures: grey, RGB, RGBA


def weights_task(model: Model) -> dict[str, Any]:
    """Of the weights stage."""
    more = {"shape": model.spec.input.shape}
    stage = source.stage(model, build_weights, more, code_of("onnx_only", "onnx", "compare"))
    return stage.task(doc=f"weights.onnx from {model.spec.weights.source}")


def task(model: Model) -> dict[str, Any]:
    """Of the onnx stage."""
    stage = export.stage(model, build, {"weights": model.weights}, code_of("onnx_only"))
    return stage.task(doc="model.onnx: the source, checked in ONNX Runtime", params=overrides.params("onnx"))


def build_weights(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    path = inputs.get("source", settings["weights"]["source"])
    graph = source.taken(inputs, settings, read)
    image = only_input(graph, path)
    for axis, length in enumerate(settings["shape"], start=1):
        if image[axis] not in (None, length):
            raise UserError(f"input.shape: {path} takes {told(image)}, not {settings['shape']}")
    export.save(named(graph), outputs["weights"], external_data=False)
    try:
        network = architecture.create(settings, outputs["weights"])
        architecture.forward(network, architecture.example(settings["shape"], 2))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # of ONNX Runtime, whose errors have no common base
        raise UserError(f"{path} does not run in ONNX Runtime: {first_lines(error)}") from error
    parameters = sum(math.prod(tensor.dims) for tensor in graph.graph.initializer)
    return {"weights": settings["weights"]["source"], "parameters": parameters}


def read(path: str) -> "onnx.ModelProto":
    """The graph of an ONNX file, or of a folder with its weights apart. UserError where it is none.

    Whether it is sound is ONNX Runtime's to say: onnx's checker misses shapes that no server needs, too.
    """
    import onnx

    try:
        return onnx.load(onnx_file(path))
    except Exception as error:  # of onnx, of protobuf, or of the file system
        raise UserError(f"{path} cannot be read as ONNX: {first_lines(error)}") from error


def only_input(graph: "onnx.ModelProto", path: str) -> list[int | None]:
    """Its dimensions, batch first; None for an open one. UserError where it is not (batch, channels, height, width).

    What old files list as inputs because they have values for it is taken off that list.
    """
    import onnx

    valued = {tensor.name for tensor in graph.graph.initializer}
    for tensor in [tensor for tensor in graph.graph.input if tensor.name in valued]:
        graph.graph.input.remove(tensor)
        graph.ir_version = max(graph.ir_version, 4)  # the first in which the others need not be inputs
    found = ", ".join(f"{tensor.name} {told(dimensions(tensor))}" for tensor in graph.graph.input)
    if len(graph.graph.input) != 1:
        raise UserError(f"{path}: expected one input of images, found {len(graph.graph.input)}: {found or 'none'}")
    (tensor,) = graph.graph.input
    image, type = dimensions(tensor), onnx.TensorProto.DataType.Name(tensor.type.tensor_type.elem_type)
    if len(image) != 4 or type != "FLOAT":
        raise UserError(f"{path}: expected FLOAT (batch, channels, height, width), found {type} {found}")
    if image[3] in CHANNELS and image[1] not in (None, *CHANNELS):
        raise UserError(
            f"{path}: expected (batch, channels, height, width), found {found}, with the channels last: "
            "export it with the channels first"
        )
    return image


def dimensions(tensor: "onnx.ValueInfoProto") -> list[int | None]:
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.type.tensor_type.shape.dim]


def told(dims: list[int | None]) -> str:
    return f"[{', '.join('?' if length is None else str(length) for length in dims)}]"


def named(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph with its input and outputs called as in every format."""
    names = {tensor.name: INPUT for tensor in graph.graph.input}
    names |= {tensor.name: OUTPUT.format(index) for index, tensor in enumerate(graph.graph.output)}
    _rename(graph.graph, names)
    return graph


def _rename(graph: "onnx.GraphProto", names: dict[str, str]) -> None:
    """In the nodes of the graph, and in those of the graphs in them, which may use its tensors."""
    for node in graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _rename(inner, names)
    for tensor in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        tensor.name = names.get(tensor.name, tensor.name)


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import onnx

    network = architecture.create(settings, inputs["weights"])
    channels, height, width = settings["shape"]
    graph = export.slimmed(shaped(onnx.load(onnx_file(inputs["weights"])), network, settings))
    export.save(graph, outputs["model"], settings["external_data"])
    try:
        error = export.check(outputs["model"], network, network, (channels, height, width), settings)
    except export.ExporterRefusedError as refusal:
        what = str(refusal).removeprefix("wrote a graph that ")
        batch = "an open batch" if settings["dynamic_axes"] else f"a batch of {settings['batch_size']}"
        own = fixed_batch(inputs["weights"])
        advice = f"; its own is {own}: onnx.dynamic_axes = false and onnx.batch_size = {own} keep it" if own else ""
        raise UserError(f"with {batch} the graph {what}{advice}") from refusal
    export.describe(graph, outputs, None, "the source is ONNX")
    return {"nodes": len(graph.graph.node), "opset": export.opset(graph), "error": error}


def shaped(graph: "onnx.ModelProto", network: Any, settings: Settings) -> "onnx.ModelProto":
    """The graph with the batch and the size that the spec says, fixed or open, whatever was written into the file.

    What in between was made for another batch shows when the graph is run.
    """
    shape, sizes = settings["shape"], settings["sizes"]
    batch = "batch" if settings["dynamic_axes"] else settings["batch_size"]
    size = ["height", "width"] if sizes else shape[1:]
    answers = architecture.forward(network, architecture.example(shape, 1))
    opened = architecture.open_dimensions(network, shape, sizes, "fp32_nchw")
    _set(graph.graph.input[0], [batch, shape[0], *size])
    for tensor, answer, axes in zip(graph.graph.output, answers, opened, strict=True):
        rest = [f"{tensor.name}_{axis}" if axis in axes else length for axis, length in enumerate(answer.shape)]
        _set(tensor, [batch, *rest[1:]])
    del graph.graph.value_info[:]
    return graph


def _set(tensor: "onnx.ValueInfoProto", shape: list[int | str]) -> None:
    del tensor.type.tensor_type.shape.dim[:]
    for length in shape:
        dim = tensor.type.tensor_type.shape.dim.add()
        if isinstance(length, str):
            dim.dim_param = length
        else:
            dim.dim_value = length


def tried(model: Model, file: str, scratch: str) -> None:
    """Builds model.onnx of a model that is not there yet, into a scratch folder. UserError where that fails."""
    for stage, inputs, names in (
        (weights_task(model)["meta"]["stage"], {"source": file}, ("weights",)),
        (task(model)["meta"]["stage"], {"weights": f"{scratch}/weights"}, ("model", "signature", "export", "tools")),
    ):
        outputs = {name: f"{scratch}/{name}" for name in names}
        try:
            worker.call(stage.build, inputs, outputs, stage.settings, log=f"{scratch}/log")
        except worker.CrashError as error:
            raise UserError(f"{file}: {first_lines(error)}") from error


def packed(file: str, scratch: str) -> str:
    """The file as it belongs beside a spec: as it is, or a folder where its weights are in other files."""
    import onnx

    graph = onnx.load(onnx_file(file), load_external_data=False)
    if all(tensor.data_location != onnx.TensorProto.EXTERNAL for tensor in graph.graph.initializer):
        return onnx_file(file)
    export.save(read(file), f"{scratch}/model.onnx", external_data=True)
    return f"{scratch}/model.onnx"
