"""Runs of a network whose inputs, or weights, are perturbed by one unit in the last place.

The change of the outputs is the sensitivity of the network: no artifact is required to be closer than that. Integers
and bytes have no such unit. So bytes of a picture are normalized before, and if no input is a float, the weights are
perturbed.
"""

import copy
from collections.abc import Sequence
from typing import Any

from build_tasks.formats.serving_interface import normalize_input
from build_tasks.tensors import Interface
from build_tasks.verification.tolerance import perturb_one_ulp


def exact_inputs(module: Any, inputs: Sequence[Any], interface: Interface) -> list[Any]:
    """Return the inputs with the bytes of a picture as the normalized floats that the network computes with."""
    first, *others = inputs
    return [normalize_input(module, first, interface) if interface["normalization"] else first, *others]


def perturbed(module: Any, inputs: Sequence[Any], seed: int = 0) -> tuple[Any, list[Any]]:
    """Return the network and its inputs, of which one is perturbed: the float inputs, or else the weights.

    Args:
        module: The network.
        inputs: What `exact_inputs` returns.
        seed: Seed of the random generator.
    """
    import torch

    changed = [
        torch.from_numpy(perturb_one_ulp(each.numpy(), seed + index))
        if isinstance(each, torch.Tensor) and each.dtype == torch.float32
        else each
        for index, each in enumerate(inputs)
    ]
    if any(one is not other for one, other in zip(changed, inputs, strict=True)):
        return module, changed
    return perturb_weights(module, seed), changed


def perturb_weights(module: Any, seed: int) -> Any:
    """Return a copy of a network whose fp32 weights are each replaced by the next larger or smaller value."""
    import torch

    if hasattr(module, "perturbed"):  # an ONNX file, whose weights are no parameters of PyTorch
        return module.perturbed(seed)
    duplicate = copy.deepcopy(module)
    with torch.no_grad():
        for index, tensor in enumerate(duplicate.parameters()):
            if tensor.dtype == torch.float32:
                tensor.copy_(torch.from_numpy(perturb_one_ulp(tensor.detach().numpy(), seed + index)))
    return duplicate
