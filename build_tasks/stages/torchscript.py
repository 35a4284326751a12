"""torchscript: weights.safetensors -> model.pt, model.pt.signature.json

network ─► reparameterized ─► traced at batch 2 ─► frozen ─► new tensors follow the input's device ─► model.pt
                                                                                                          │
                                 compared with the network at batches 1, 2, 3, max and at lengths of open dimensions
"""

from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, last_line
from build_tasks.formats import declarations
from build_tasks.formats.declarations import COMPARISON_MODULES, INTERFACE_MODULES, PHOTOGRAPHS, TRACE_MODULES
from build_tasks.json_files import write_json
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.interface import interface_of
from build_tasks.spec.model import Model
from build_tasks.tensors import Interface

if TYPE_CHECKING:
    import numpy as np
    import torch

TOOLS = ("torch", "timm")


def task(model: Model) -> dict[str, Any]:
    stage = Stage(
        name=f"torchscript:{model.name}",
        model=model,
        build=build,
        inputs={"weights": model.weights, **{path: path for path in PHOTOGRAPHS}},
        outputs={
            "model": model.artifact("model.pt"),
            "signature": model.artifact("model.pt.signature.json"),
            "tools": model.artifact("model.pt.tools.json"),
        },
        peak_batch=model.spec.max_batch_size,
        settings={
            **declarations.settings_of(model),
            "interface": interface_of(model.spec),
            "max_batch_size": model.spec.max_batch_size,
        },
        tools=TOOLS,
        modules=(
            __name__,
            "build_tasks.formats.torch_signature",
            *TRACE_MODULES,
            *COMPARISON_MODULES,
            *INTERFACE_MODULES,
            *declarations.source_modules(model),
        ),
        source_files=declarations.user_source_files(model),
    )
    return stage.task(doc="model.pt: traced, frozen, checked at batches 1, 2, 3 and the maximum")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import torch

    from build_tasks.formats import pytorch_network, torchscript_device
    from build_tasks.formats.example_inputs import example_inputs, lengths_to_check
    from build_tasks.formats.serving_interface import output_names, resolve_interface, wrap_for_serving
    from build_tasks.formats.torch_signature import signature_tensors
    from build_tasks.formats.torchscript_trace import (
        TRACED_AWAY,
        TRACED_BATCH,
        UntraceableError,
        save_trace,
        traced_away_note,
    )

    module = pytorch_network.create_network(settings, inputs["weights"], exportable=True)
    interface = resolve_interface(module, settings["interface"])
    try:
        constants = save_trace(module, interface, outputs["model"])
    except UntraceableError as error:
        raise UserError(f'{error}; formats = ["onnx"] serves it if the dynamo exporter can write it') from error
    module = wrap_for_serving(module, interface)
    try:
        errors = check(outputs["model"], module, interface, settings["max_batch_size"])
    except UserError as error:
        if not constants:
            raise
        raise UserError(f"{constants} {TRACED_AWAY}; {error}") from error
    signature: dict[str, Any] = {
        **signature_tensors(torch.jit.load(outputs["model"]), output_names(module), interface, TRACED_BATCH),
        "PyTorch": torch.__version__.partition("+")[0],
    }
    examples = [example_inputs(interface, 1, lengths) for lengths in lengths_to_check(interface["dimensions"])]
    if message := torchscript_device.device_error(outputs["model"], examples):
        signature["device_error"] = message
    if constants:
        signature["traced_away"] = f"{constants} {TRACED_AWAY}"
    for name, record in (("signature", signature), ("tools", versions(TOOLS))):
        write_json(outputs[name], record)
    batches = sorted({batch for batch, *_ in errors})
    return {"error": max(errors.values()), "batches": batches, **traced_away_note(constants)}


def check(
    path: str, module: "torch.nn.Module", interface: Interface, max_batch_size: int
) -> dict[tuple[int, ...], float]:
    """The relative errors of model.pt against the module, by the batch and the lengths of open dimensions.

    Raises:
        UserError: If model.pt refuses a batch or a length, or if its error is above its limit.
    """
    import torch

    from build_tasks.formats import fp32_comparison
    from build_tasks.formats.example_inputs import cases_to_check, format_case
    from build_tasks.formats.serving_interface import forward
    from build_tasks.formats.torchscript_trace import TRACED_BATCH

    try:
        loaded = torch.jit.load(path)
    except UnicodeDecodeError as error:  # torch writes such names, and cannot read them
        raise UserError(
            "TorchScript takes only ASCII letters in names of classes and attributes: rename those of the network"
        ) from error

    def run(batch: "list[torch.Tensor]") -> "list[np.ndarray]":
        try:
            return [answer.numpy() for answer in forward(loaded, batch)]
        except UserError as error:  # the network itself has answered with tensors of this batch
            raise RuntimeError(str(error)) from error

    comparison = fp32_comparison.Comparison(module, interface)
    errors = {}
    for size, lengths in cases_to_check(interface, sorted({1, TRACED_BATCH, 3, max_batch_size})):
        at = format_case(size, lengths)
        try:
            errors[size, *lengths.values()] = comparison.check(run, lengths, size)
        except fp32_comparison.InaccurateError as error:
            raise UserError(f"at {at} the trace differs from the network {error}") from error
        except RuntimeError as error:  # it refuses the batch, or its answer has another batch size
            reason = last_line(error)
            raise UserError(f"the trace, taken at batch {TRACED_BATCH}, fails at {at}: {reason}") from error
    return errors
