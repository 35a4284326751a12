"""The inputs and outputs of an artifact that was made from a PyTorch network, for its signature."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from build_tasks.formats.example_inputs import example_inputs
from build_tasks.formats.serving_interface import forward, open_axes, open_output_axes
from build_tasks.tensors import Interface, TensorSignature

if TYPE_CHECKING:
    import torch


def signature_tensors(
    module: Any, names: list[str], interface: Interface, batch: int
) -> dict[str, list[TensorSignature]]:
    """Return the inputs and outputs of a network with the interface of its spec, or of an artifact of it.

    Args:
        module: The network or the artifact, which is run.
        names: The names of the outputs.
        interface: The interface of the spec, resolved.
        batch: The batch with which it is run.
    """
    example = example_inputs(interface, batch)
    answers = zip(names, forward(module, example), open_output_axes(module, interface), strict=True)
    return {
        "inputs": [
            _tensor(each["name"], value, open_axes(each["shape"] or []))
            for each, value in zip(interface["inputs"], example, strict=True)
        ],
        "outputs": [_tensor(*answer) for answer in answers],
    }


def _tensor(name: str, value: "torch.Tensor", opened: Iterable[int]) -> TensorSignature:
    """One tensor of a signature.

    Args:
        opened: Axes that are open (-1) besides the batch.
    """
    shape = [-1 if axis in (0, *opened) else length for axis, length in enumerate(value.shape)]
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
