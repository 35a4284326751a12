"""The roofline of a network: images per second that the measured speed of a matrix product and of a copy would allow.

    network on the meta device ─► FLOPs and bytes of each operator ─┐
    a matrix product and a copy, timed on the device ───────────────┴► seconds of a batch, at least

The model: operators run one after the other, and each takes the longer of two times, that of its FLOPs at the speed of
a large matrix product, and that of its bytes at the speed of a large copy.

- Convolutions, matrix products and attention read their weights and inputs once, and write their outputs once.
  Attention never writes its scores. FLOPs are those of torch.utils.flop_counter.
- Poolings, means and softmax also read and write once.
- Activations, normalization, additions and whatever else works on single values are free: a fused kernel does them
  while it writes. Changes of shape are free, too.

So no way of running this graph on this device is faster, but for two reasons: inputs of an operator may still lie in a
cache, and the copy measures the memory alone. Figures of small batches can so exceed 100 %.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# Operators that read and write memory although they have no FLOPs by the counter.
MEMORY_BOUND = {
    aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.mean, aten.sum, aten.amax,
    aten._softmax, aten.upsample_bilinear2d, aten.upsample_nearest2d,
}  # fmt: skip
PRODUCT = {"cuda": 8192, "cpu": 2048}  # rows and columns of the matrices
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
TIMES = 5  # the fastest of so many counts


class Ceilings(NamedTuple):
    """What the device reaches in its best case."""

    flops_per_second: float
    bytes_per_second: float


class Operator(NamedTuple):
    """The work of one operator for a batch."""

    flops: float
    values: int  # that it reads and writes


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Time a matrix product and a copy."""
    size, count = PRODUCT[device], COPY_BYTES[device] // dtype.itemsize
    left, right, product = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    source, target = (torch.zeros(count, dtype=dtype, device=device) for _ in range(2))
    matmul = fastest(lambda: torch.matmul(left, right, out=product), device)
    copy = fastest(lambda: target.copy_(source), device)
    return Ceilings(2 * size**3 / matmul, 2 * count * dtype.itemsize / copy)


def fastest(run: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    best = float("inf")
    for index in range(TIMES + 1):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if index:
            best = min(best, time.perf_counter() - started)
    return best


class CountOperators(TorchDispatchMode):
    """Records the operators that read and write memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry or packet in MEMORY_BOUND:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=output) if packet in flop_registry else 0
            outputs = output[:1] if isinstance(output, tuple) else [output]  # without the indices of a pooling
            inputs = [each for each in args if isinstance(each, torch.Tensor)]
            self.operators.append(Operator(float(flops), sum(tensor.numel() for tensor in (*inputs, *outputs))))
        return output


class FuseAttention(TorchFunctionMode):
    """Records attention as one operator, whose scores stay in its kernel."""

    def __init__(self, counter: CountOperators):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        flops = 2.0 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        values = sum(tensor.numel() for tensor in (query, key, value, output))
        self.counter.operators.append(Operator(flops, values))
        return output


def count_operators(network: torch.nn.Module, shape: tuple[int, ...], batch: int) -> list[Operator]:
    """Return the operators of a batch.

    Args:
        network: On the meta device, in inference mode.
        shape: Of an image, (channels, height, width).
    """
    counter = CountOperators()
    with torch.no_grad(), FuseAttention(counter), counter:
        network(torch.empty(batch, *shape, device="meta"))
    return counter.operators


def images_per_second(operators: list[Operator], batch: int, ceilings: Ceilings, value_bytes: int) -> float:
    """Return the images per second that no way of running these operators exceeds (the model is above).

    Args:
        value_bytes: Bytes of a value, 2 for fp16.
    """
    seconds = sum(
        max(each.flops / ceilings.flops_per_second, each.values * value_bytes / ceilings.bytes_per_second)
        for each in operators
    )
    return batch / seconds
