"""The comparison of an fp32 artifact with its network, on photographs and on noise, judged against a run in fp64.

    a photograph, and noise ───┬─► network in fp64 ────────────────────────► exact outputs ─┐
                               ├─► network in fp32, inputs perturbed too ─► its own errors ─┴► limit of each sample
                               └─► repeated to a batch ─► artifact ─► its errors ─► at most a few times as large?

Noise shows faults that photographs do not. But a network may amplify rounding without end on inputs that are unlike
those that its batch statistics come from. So the limit follows from the error of the network itself, for each sample.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError
from build_tasks.formats import pytorch_network
from build_tasks.runtime.stage import Settings
from build_tasks.verification.tolerance import float_outputs, perturb_one_ulp, relative_error

if TYPE_CHECKING:
    import numpy as np
    import torch

    Outputs = list[np.ndarray]

COMPARISON_MODULES = ("build_tasks.formats.fp32_comparison", "build_tasks.verification.tolerance")
PHOTOGRAPHS = ("build_tasks/verification/photographs/coffee.jpg",)
SAMPLES = ("coffee.jpg", "noise")  # few, because fp64 is slow on a CPU
DRAWS = 2  # runs of the network with perturbed inputs

# Measured by tests/formats/test_fp32_comparison.py; see docs/explanation/accuracy.md.
SAFETY_FACTOR = 8
SMALLEST_LIMIT = 3e-5  # a mean over a million values differs by 1e-5 between libraries
# The largest error of the network over the change of its outputs for perturbed inputs: above it, the run in fp64 is not
# credible.
CREDIBLE_RATIO = 100

Shape = tuple[int, int, int]


class InaccurateError(Exception):
    """The outputs of an artifact differ from those of the network. The message continues the words "it differs"."""


class Comparison:
    """The network's outputs for some samples, with which those of artifacts are compared.

    Args:
        module: The network, with the interface of the spec.
        settings: The settings of the stage: `interface` is used.
    """

    def __init__(self, module: Any, settings: Settings):
        self.module = module
        self.interface = settings["interface"]
        self.expected: dict[Shape, Any] = {}  # what _samples returns, by shape

    def batch(self, shape: Shape, size: int) -> "torch.Tensor":
        """Return a batch of this size, of the samples in the order of _sample_of_slot."""
        samples, _, _ = self._samples(shape)
        return samples[[_sample_of_slot(slot) for slot in range(size)]]

    def check(self, run: "Callable[[torch.Tensor], Outputs]", shape: Shape, size: int) -> float:
        """Return the largest relative error of an artifact's outputs for a batch.

        Args:
            run: The artifact, as a function from a batch to its outputs.
            shape: (channels, height, width) of one input.
            size: The number of inputs.
        Raises:
            InaccurateError: If the error of a sample is above its limit.
            UserError: If the network itself has no certain answer.
        """
        batch = self.batch(shape, size)
        _, exact, limits = self._samples(shape)
        found = float_outputs(run(batch))
        own = float_outputs(_forward(self.module, batch))
        if [output.shape for output in found] != [output.shape for output in own]:
            raise InaccurateError(f"in shape: {[output.shape for output in found]}")
        largest = 0.0
        for row in range(size):
            sample = _sample_of_slot(row)
            for index, output in enumerate(found):
                expected, limit = exact[sample][index], limits[sample][index]
                if relative_error(own[index][row].astype(expected.dtype), expected) > limit:
                    expected = own[index][row].astype(expected.dtype)  # the answer depends on the rest of the batch
                error = relative_error(output[row].astype(expected.dtype), expected)
                if not error <= limit:
                    slot = f", input {row} of the batch" if size > 1 else ""
                    raise InaccurateError(f"by {error:.1e} on {SAMPLES[sample]}{slot} (limit {limit:.0e})")
                largest = max(largest, error)
        return largest

    def _samples(self, shape: Shape) -> "tuple[torch.Tensor, list[Outputs], list[list[float]]]":
        """The samples of a size, and for each of them the expected outputs and the limits of the outputs."""
        if shape not in self.expected:
            samples = _load_samples(self.module, shape, self.interface["format"])
            self.expected[shape] = (samples, *self._expect(samples))
        samples, exact, limits = self.expected[shape]
        return samples, exact, limits

    def _expect(self, samples: "torch.Tensor") -> "tuple[list[Outputs], list[list[float]]]":
        import numpy as np
        import torch

        inputs = samples
        if self.interface["format"] == "uint8_nhwc":  # a byte has no ulp, so that the normalized floats are perturbed
            inputs = pytorch_network.normalize_input(self.module, samples, self.interface)
        own = float_outputs(_forward(self.module, inputs))
        again = float_outputs(_forward(self.module, inputs))
        if max(relative_error(one[0], other[0]) for one, other in zip(again, own, strict=True)) > SMALLEST_LIMIT:
            raise UserError(
                f"the network answers with other values when the same {SAMPLES[0]} comes again: "
                "does its forward use random numbers?"
            )
        draws = [
            float_outputs(_forward(self.module, torch.from_numpy(perturb_one_ulp(inputs.numpy(), seed))))
            for seed in range(DRAWS)
        ]
        doubled = _forward_in_fp64(self.module, inputs)
        exact, limits = [], []
        for row in range(len(samples)):
            outputs, bounds = [], []
            for index, output in enumerate(own):
                value = output[row].astype(np.float64)
                shifts = [relative_error(draw[index][row].astype(np.float64), value) for draw in draws]
                limit = max(SMALLEST_LIMIT, SAFETY_FACTOR * max(shifts))
                if doubled is not None and doubled[index].shape == output.shape:
                    errors = [
                        relative_error(answer[index][row].astype(np.float64), doubled[index][row])
                        for answer in (own, *draws)
                    ]
                    if max(errors) <= max(SMALLEST_LIMIT, CREDIBLE_RATIO * max(shifts)):
                        value, limit = doubled[index][row], max(SMALLEST_LIMIT, SAFETY_FACTOR * max(errors))
                outputs.append(value)
                bounds.append(limit)
            exact.append(outputs)
            limits.append(bounds)
        return exact, limits


def _sample_of_slot(slot: int) -> int:
    """The index of the sample in a slot of a batch: 0, 1, 1, 0, 1, 0, 0, 1, …, which no shift repeats."""
    return slot.bit_count() % len(SAMPLES)


def _load_samples(module: Any, shape: Shape, input_format: str) -> "torch.Tensor":
    """The photographs and the noise, with the preprocessing that the architecture has by itself.

    Networks for another number of channels get the mean of the colors in each channel.
    """
    import torch
    from PIL import Image
    from timm.data import resolve_data_config

    pictures = []
    for path in PHOTOGRAPHS:
        with Image.open(path) as image:
            pictures.append(image.convert("RGB").resize((shape[2], shape[1]), Image.Resampling.BICUBIC))
    pixels = torch.stack([torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures])
    pixels = pixels.reshape(len(pictures), shape[1], shape[2], 3)
    if shape[0] != 3:
        pixels = pixels.float().mean(3, keepdim=True).round().to(torch.uint8).expand(-1, -1, -1, shape[0])
    noise = pytorch_network.example_input(shape, 1, input_format)
    if input_format == "uint8_nhwc":
        return torch.cat([pixels, noise])
    config = resolve_data_config(model=module)
    mean, std = (torch.tensor(config[key], dtype=torch.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    if len(mean) != shape[0]:
        mean, std = mean.mean(), std.mean()
    return torch.cat([(pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std, noise]).contiguous()


def _forward(module: Any, batch: "torch.Tensor") -> "Outputs":
    return [output.numpy() for output in pytorch_network.forward(module, batch)]


def _forward_in_fp64(module: Any, batch: "torch.Tensor") -> "Outputs | None":
    """The outputs of the network with all its arithmetic in fp64, None if it cannot run so."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map

    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.double() if value.dtype == torch.float32 else value
        return torch.float64 if value is torch.float32 else value

    class Fp64(TorchDispatchMode):
        """Computes in fp64 also what the network asks for in fp32, for example with `x.float()`."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return tree_map(widen, function(*tree_map(widen, args), **tree_map(widen, kwargs or {})))

    try:
        doubled = copy.deepcopy(module).double()
        with torch.jit.optimized_execution(False), Fp64():
            outputs = pytorch_network.forward(doubled, batch.double())
    except Exception as error:  # the network's own code, which may refuse fp64 in any way
        print(f"the network does not run in fp64: {error}")
        return None
    return float_outputs([output.numpy() for output in outputs])
