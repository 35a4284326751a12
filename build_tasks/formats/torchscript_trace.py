"""The trace of a network as a TorchScript file: model.pt, or the source of the TorchScript exporter without model.pt.

network ─► reparameterized ─► traced at batch 2 ─► frozen ─► new tensors follow the input's device ─► saved
"""

from typing import TYPE_CHECKING

from build_tasks.errors import UserError, first_lines
from build_tasks.formats import pytorch_network
from build_tasks.runtime.stage import Settings

if TYPE_CHECKING:
    import torch

# The modules of the project that affect a trace, besides those that make the network.
TRACE_MODULES = (
    "build_tasks.formats.torchscript_trace",
    "build_tasks.formats.torchscript_device",
    "build_tasks.formats.torchscript_graph",
)

TRACED_BATCH = 2  # at batch 1, a trace may treat the batch dimension as a constant


def save_trace(module: "torch.nn.Module", shape: tuple[int, int, int], interface: Settings, path: str) -> None:
    """Trace a network and save the frozen trace.

    Args:
        module: The network without the interface of the spec.
        shape: (channels, height, width) of one input.
        interface: The settings of `interface_of`.
        path: The file.
    Raises:
        UserError: If the network cannot be traced, or if the trace cannot be saved.
    """
    import torch
    from timm.utils.model import reparameterize_model

    from build_tasks.formats import torchscript_device, torchscript_graph

    slim = pytorch_network.wrap_for_serving(reparameterize_model(module), interface)
    batch = pytorch_network.example_input(shape, TRACED_BATCH, interface["format"])
    torch.backends.mha.set_fastpath_enabled(False)  # no exporter knows the operator of its fast path
    with torch.inference_mode(False), torch.no_grad():
        slim(batch)  # values that a network computes only at its first call must not be traced
        try:
            trace = torch.jit.freeze(torch.jit.trace(slim, batch, check_trace=False))
            torchscript_device.follow_input(trace)
            torchscript_graph.save_torchscript(trace, path)
        except RuntimeError as error:
            # An error of an operator ends with its reason. One about a Python function begins with it.
            lines = str(error).strip().splitlines()
            reason = first_lines(error).partition(". ")[0] if "Python function" in lines[0] else lines[-1]
            raise UserError(f"torch.jit.trace refuses the network: {reason}") from error
