"""The trace of a network as a TorchScript file: model.pt, or the source of the TorchScript exporter without model.pt.

network ─► reparameterized ─► traced at batch 2 ─► frozen ─► new tensors follow the input's device ─► saved
"""

import inspect
import re
import types
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, first_lines, last_line
from build_tasks.formats.example_inputs import example_inputs
from build_tasks.formats.serving_interface import explain_errors, wrap_for_serving
from build_tasks.formats.shared_weights import copy_with_same_weights
from build_tasks.runtime.stage import Notes
from build_tasks.tensors import INPUT, Interface, can_be_argument

if TYPE_CHECKING:
    import torch


TRACED_BATCH = 2  # at batch 1, a trace may treat the batch dimension as a constant
VALUES = re.compile("to a (Python|NumPy) ")  # the words of PyTorch's warning
MAX_LINES = 3  # of the user's code, in one message
REPARAMETERIZE = ("fuse", "reparameterize", "switch_to_deploy")  # the methods that timm calls
TRACED_AWAY = "turns a tensor into a Python value, which the trace keeps as a constant (write it with torch.where)"


class UntraceableError(UserError):
    """torch.jit.trace cannot write the network."""


def save_trace(module: "torch.nn.Module", interface: Interface, path: str) -> str:
    """Trace a network and save the frozen trace.

    Returns:
        The lines of the user's code whose decisions the trace cannot keep, as `constant_lines` names them.

    Args:
        module: The network without the interface of the spec.
        interface: The interface of the spec, resolved.
        path: The file.
    Raises:
        UntraceableError: If the network cannot be traced, or if the trace cannot be saved.
        UserError: If the network does not run.
    """
    import torch

    from build_tasks.formats import torchscript_device, torchscript_graph
    from build_tasks.formats.per_sample_filters import PerSampleFilters

    slim = wrap_for_serving(_reparameterized(module), interface)
    names = [each["name"] for each in interface["inputs"]]
    if names != [INPUT] and all(map(can_be_argument, names)):
        name_arguments(slim, names)  # other names are those of an ONNX model, which has no need of the arguments
    batch = tuple(example_inputs(interface, TRACED_BATCH))
    torch.backends.mha.set_fastpath_enabled(False)  # no exporter knows the operator of its fast path
    filters = PerSampleFilters()
    with torch.inference_mode(False), torch.no_grad():
        with filters, explain_errors(batch):
            slim(*batch)  # values that a network computes only at its first call must not be traced
        try:
            with warnings.catch_warnings(record=True) as caught, filters if filters.found else nullcontext():
                warnings.simplefilter("always", torch.jit.TracerWarning)
                plain = torch.jit.trace(slim, batch, check_trace=False)
            for warning in caught:  # for the log
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            trace = torch.jit.freeze(plain)
            torchscript_device.follow_input(trace)
            torchscript_graph.save_torchscript(trace, path)
        except RuntimeError as error:
            # An error of an operator ends with its reason. One about a Python function begins with it.
            first = first_lines(error)
            reason = first.partition(". ")[0] if "Python function" in first else last_line(error)
            raise UntraceableError(f"torch.jit.trace refuses the network: {reason}") from error
    return constant_lines(caught)


def _reparameterized(module: "torch.nn.Module") -> "torch.nn.Module":
    """Return a copy of a network with fewer layers, where the layers have methods for that.

    They may change weights. A network without such layers is copied with the same weights.
    """
    from timm.utils.model import reparameterize_model

    if any(hasattr(layer, method) for layer in module.modules() for method in REPARAMETERIZE):
        return reparameterize_model(module)
    return copy_with_same_weights(module)


def name_arguments(module: "torch.nn.Module", names: list[str]) -> None:
    """Give the arguments of a network's forward the names of the inputs, which torch.jit.trace writes into the file.

    Triton's PyTorch backend finds the inputs by them. The arguments of the network itself may be in another order.
    """
    forward = module.forward

    def renamed(_: Any, *inputs: Any, **named: Any) -> Any:
        return forward(*inputs, **named)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *names)]
    renamed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    module.forward = types.MethodType(renamed, module)


def constant_lines(caught: "Iterable[warnings.WarningMessage]") -> str:
    """Return where the user's code turns a tensor into a Python number or boolean, as "models/a/network.py:14".

    The trace keeps such a value as it was for the example, with the side that a branch took. The warnings about the
    code of packages are left out: those of timm's networks are about shapes, and the comparison covers them.
    """
    import torch

    root = Path.cwd()
    lines = set()
    for warning in caught:
        file = Path(warning.filename).resolve()
        if not issubclass(warning.category, torch.jit.TracerWarning) or not VALUES.search(str(warning.message)):
            continue
        if file.is_relative_to(root) and not {"site-packages", "build_tasks"}.intersection(file.parts):
            lines.add((str(file.relative_to(root)), warning.lineno))
    first = ", ".join(f"{name}:{line}" for name, line in sorted(lines)[:MAX_LINES])
    return first + (f" and {len(lines) - MAX_LINES} more" if len(lines) > MAX_LINES else "")


def traced_away_note(lines: str) -> Notes:
    """Return the note for the line of a stage: where a trace leaves out a decision. Empty if it leaves out none."""
    return {"traced away": f"{lines}, where a tensor becomes a Python value"} if lines else {}
