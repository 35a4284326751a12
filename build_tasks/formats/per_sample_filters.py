"""Convolutions with filters of their own for each sample, traced so that the file serves every batch.

    image (1, batch * channels, height, width), groups = batch ─► columns (batch, inputs, places) ┐
    filters (batch * outputs, channels, height, width) ─────────► rows (batch, outputs, inputs) ──┴► product

Such networks (CondConv, dynamic filters, modulated convolutions) move the batch into the channels and have as many
groups as samples. PyTorch, TorchScript and ONNX take the number of groups as a constant, so that a trace would serve
no batch but its own. As a product of matrices, the convolution has no groups.

This module imports PyTorch.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def conv1d(
    image: torch.Tensor,
    filters: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> torch.Tensor:
    """torch.conv1d with a number of groups that may follow the batch."""
    (pads,) = _pads(padding, dilation, filters.shape[2:])
    strides, dilations = (1, *_each(stride, 1)), (1, *_each(dilation, 1))
    padded = functional.pad(image, pads).unsqueeze(2)
    return conv2d(padded, filters.unsqueeze(2), bias, strides, 0, dilations, groups).squeeze(2)


def conv2d(
    image: torch.Tensor,
    filters: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> torch.Tensor:
    """torch.conv2d with a number of groups that may follow the batch."""
    size = tuple(int(each) for each in filters.shape[2:])  # a constant of the layer
    strides, dilations = _each(stride, 2), _each(dilation, 2)
    vertical, horizontal = _pads(padding, dilation, size)
    if any([*vertical, *horizontal]):
        image = functional.pad(image, [*horizontal, *vertical])
    columns = functional.unfold(image, size, dilations, 0, strides)
    columns = columns.reshape(image.shape[0], groups, -1, columns.shape[-1])
    rows = filters.flatten(1)
    answer = rows.reshape(groups, -1, rows.shape[1]) @ columns
    places = [
        (length - step * (each - 1) - 1) // move + 1
        for length, each, step, move in zip(image.shape[2:], size, dilations, strides, strict=True)
    ]
    answer = answer.reshape(image.shape[0], -1, *places)
    return answer if bias is None else answer + bias.reshape(-1, 1, 1)


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    """Return an argument of a convolution for each dimension."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * dimensions if len(values) == 1 else values


def _pads(padding: Any, dilation: Any, size: Sequence[Any]) -> list[list[int]]:
    """Return the padding before and after each dimension. PyTorch's "same" puts an odd one at the end."""
    if padding == "valid":
        padding = 0
    if padding != "same":
        return [[each, each] for each in _each(padding, len(size))]
    totals = [step * (int(each) - 1) for step, each in zip(_each(dilation, len(size)), size, strict=True)]
    return [[total // 2, total - total // 2] for total in totals]


FUNCTIONS: dict[Callable[..., Any], Callable[..., torch.Tensor]] = {torch.conv1d: conv1d, torch.conv2d: conv2d}


class PerSampleFilters(TorchFunctionMode):
    """A mode that finds such convolutions while a network runs, and replaces them while torch.jit.trace runs it.

    While it traces, PyTorch holds the size of a tensor, and what is computed from it, as a tensor. So a number of
    groups that is a tensor follows a size, and a Python number is a constant of the network.

    Attributes:
        found: Whether a convolution with several groups got one image, as is so when the batch is in the channels. The
            network must run with a batch of several.
    """

    found = False

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if product := FUNCTIONS.get(function):
            names = {"input": "image", "weight": "filters"}
            named = {names.get(name, name): value for name, value in kwargs.items()}
            arguments = inspect.signature(product).bind(*args, **named).arguments
            groups = arguments.get("groups", 1)
            if isinstance(groups, torch.Tensor):
                return product(**arguments)
            self.found = self.found or (groups > 1 and arguments["image"].shape[0] == 1)
        return function(*args, **kwargs)
