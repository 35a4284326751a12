"""Copies of a network that have the network's own weights, because a second set of them may not fit into memory.

network ─► copy_with_same_weights ─► layers of other kinds, or a run in fp64, and the network stays as it is
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def copy_with_same_weights(module: "torch.nn.Module") -> "torch.nn.Module":
    """Return a copy of a module whose parameters and buffers are those of the module, not copies of them.

    A TorchScript module is copied with its weights.
    """
    weights = {id(tensor): tensor for tensor in _tensors(module, recurse=True)}
    duplicate: torch.nn.Module = copy.deepcopy(module, weights)
    return duplicate


@contextlib.contextmanager
def layers_in_fp64(module: "torch.nn.Module") -> Iterator[None]:
    """Context manager in which each layer has fp64 weights while it runs, and fp32 ones before and afterwards.

    Only the weights of the running layers exist in both types. Layers of TorchScript, which have no hooks, have fp64
    weights all the time.
    """
    import torch

    originals = {
        layer: [(tensor, tensor.data) for tensor in _tensors(layer, recurse=False) if tensor.dtype == torch.float32]
        for layer in module.modules()
    }

    def widen(layer: torch.nn.Module, *_: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for tensor, values in originals[layer]:
                tensor.data = values.double()

    def restore(layer: torch.nn.Module, *_: Any) -> None:
        for tensor, values in originals[layer]:
            tensor.data = values

    handles: list[Any] = []
    try:
        for layer in originals:
            if isinstance(layer, torch.jit.ScriptModule):
                widen(layer)
            else:
                handles += [layer.register_forward_pre_hook(widen, prepend=True), layer.register_forward_hook(restore)]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in originals:  # those of TorchScript, and those that have failed
            restore(layer)


def _tensors(module: "torch.nn.Module", recurse: bool) -> "list[torch.Tensor]":
    return [*module.parameters(recurse), *module.buffers(recurse)]
