"""The comparison of an fp32 artifact with its network, on photographs and on noise, judged against a run in fp64.

    a photograph, and noise, repeated to a batch ─► network, artifact ─► nearly equal? done
                                │ no
                                ├─► network in fp64 ────────────────────────► exact outputs ─┐
                                ├─► network in fp32, inputs perturbed too ─► its own errors ─┴► limit of each sample
                                └─► the artifact's errors ─► at most a few times as large?

Noise shows faults that photographs do not. But a network may amplify rounding without end on inputs that are unlike
those that its batch statistics come from. So the limit follows from the error of the network itself, for each sample.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError
from build_tasks.formats.declarations import PHOTOGRAPHS
from build_tasks.formats.example_inputs import Lengths, example_inputs
from build_tasks.formats.perturbation import exact_inputs, perturbed
from build_tasks.formats.serving_interface import explain_errors, forward
from build_tasks.formats.shared_weights import copy_with_same_weights, layers_in_fp64
from build_tasks.tensors import Interface, dims_at
from build_tasks.verification.tolerance import float_outputs, relative_error

if TYPE_CHECKING:
    import numpy as np

    Inputs = list[Any]  # a tensor for each input, in their order; an array of NumPy for strings
    Outputs = list[np.ndarray]

SAMPLES = ("coffee.jpg", "noise")  # of a picture; few, because fp64 is slow on a CPU
RANDOM_SAMPLES = ("random sample 0", "random sample 1")  # of other inputs
DRAWS = 2  # runs of the network with perturbed inputs

# Measured by tests/formats/test_fp32_comparison.py; see docs/explanation/accuracy.md.
SAFETY_FACTOR = 8
SMALLEST_LIMIT = 3e-5  # a mean over a million values differs by 1e-5 between libraries
# An artifact this near to the network, which is this near to its own answers for the samples, passes whatever the slow
# run in fp64 says. If those answers have the error e in fp64, the artifact's is less than e + SMALLEST_LIMIT / 2 there.
# Up to e = SMALLEST_LIMIT / 2 that is within SMALLEST_LIMIT, and above that within SAFETY_FACTOR * e.
CERTAIN = SMALLEST_LIMIT / 5
# The largest error of the network over the change of its outputs for perturbed inputs: above it, the run in fp64 is not
# credible.
CREDIBLE_RATIO = 100


class InaccurateError(Exception):
    """The outputs of an artifact differ from those of the network. The message continues the words "it differs"."""


class Comparison:
    """The network's outputs for some samples, with which those of artifacts are compared.

    Args:
        module: The network, with the interface of the spec.
        interface: The interface, resolved.
    """

    def __init__(self, module: Any, interface: Interface):
        self.module = module
        self.interface = interface
        self.samples = SAMPLES if takes_picture(interface) else RANDOM_SAMPLES
        # What _answers and _expected return, by the lengths of open dimensions.
        self.answers: dict[tuple[int, ...], tuple[Inputs, Outputs]] = {}
        self.expected: dict[tuple[int, ...], tuple[list[Outputs], list[list[float]]]] = {}

    def batch(self, lengths: Lengths, size: int) -> "Inputs":
        """Return a batch of this size, of the samples in the order of _sample_of_slot."""
        samples, _ = self._answers(lengths)
        return [each[[_sample_of_slot(slot) for slot in range(size)]] for each in samples]

    def check(self, run: "Callable[[Inputs], Outputs]", lengths: Lengths, size: int) -> float:
        """Return the largest relative error of an artifact's outputs for a batch.

        It is that against the network in fp32, or against fp64 where the two are not nearly equal.

        Args:
            run: The artifact, as a function from a batch of its inputs to its outputs.
            lengths: The lengths of open dimensions.
            size: The number of samples in the batch.
        Raises:
            InaccurateError: If the error of a sample is above its limit.
            UserError: If the network itself has no certain answer.
        """
        batch = self.batch(lengths, size)
        found = float_outputs(run(batch))
        own = float_outputs(_forward(self.module, batch))
        if [output.shape for output in found] != [output.shape for output in own]:
            raise InaccurateError(f"in shape: {[output.shape for output in found]}")
        if (certain := self._certain_error(found, own, lengths)) is not None:
            return certain
        exact, limits = self._expected(lengths)
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
                    raise InaccurateError(f"by {error:.1e} on {self.samples[sample]}{slot} (limit {limit:.0e})")
                largest = max(largest, error)
        return largest

    def _certain_error(self, found: "Outputs", own: "Outputs", lengths: Lengths) -> float | None:
        """The largest error against the network, None if not all outputs are as near as CERTAIN."""
        _, answers = self._answers(lengths)
        largest = 0.0
        for output, expected, samples in zip(found, own, answers, strict=True):
            for row in range(len(output)):
                error = relative_error(output[row], expected[row])
                if not max(error, relative_error(expected[row], samples[_sample_of_slot(row)])) <= CERTAIN:
                    return None
                largest = max(largest, error)
        return largest

    def _answers(self, lengths: Lengths) -> "tuple[Inputs, Outputs]":
        """The samples at these lengths, and the network's own outputs for them."""
        key = tuple(lengths.values())
        if key not in self.answers:
            samples = _load_samples(self.module, self.interface, lengths)
            self.answers[key] = samples, self._own(samples)
        return self.answers[key]

    def _own(self, samples: "Inputs") -> "Outputs":
        import numpy as np

        with explain_errors(samples):  # the first run at these lengths
            own = float_outputs(_forward(self.module, samples))
        if not all(np.isfinite(output).all() for output in own):
            raise UserError(f"the network answers with NaN or infinity to {self.samples[0]} or another one")
        again = float_outputs(_forward(self.module, samples))
        if max(relative_error(one[0], other[0]) for one, other in zip(again, own, strict=True)) > SMALLEST_LIMIT:
            raise UserError(
                f"the network answers with other values when the same {self.samples[0]} comes again: "
                "does its forward use random numbers, batch statistics, or write into its input?"
            )
        return own

    def _expected(self, lengths: Lengths) -> "tuple[list[Outputs], list[list[float]]]":
        """For each sample at these lengths the expected outputs, and the limits of the outputs."""
        key = tuple(lengths.values())
        if key not in self.expected:
            self.expected[key] = self._expect(*self._answers(lengths))
        return self.expected[key]

    def _expect(self, samples: "Inputs", own: "Outputs") -> "tuple[list[Outputs], list[list[float]]]":
        import numpy as np

        inputs = exact_inputs(self.module, samples, self.interface)
        draws = [float_outputs(_forward(*perturbed(self.module, inputs, seed))) for seed in range(DRAWS)]
        doubled = _forward_in_fp64(self.module, inputs)
        exact, limits = [], []
        for row in range(len(samples[0])):
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


def takes_picture(interface: Interface) -> bool:
    """Return whether the only input is a picture."""
    return len(interface["inputs"]) == 1 and interface["inputs"][0]["layout"] is not None


def _load_samples(module: Any, interface: Interface, lengths: Lengths) -> "Inputs":
    """The photographs and noise for a picture, otherwise random samples.

    Photographs have the preprocessing that the architecture has by itself. Networks for another number of channels get
    the mean of the colors in each channel.
    """
    import torch
    from PIL import Image
    from timm.data import resolve_data_config

    if not takes_picture(interface):
        return example_inputs(interface, len(RANDOM_SAMPLES), lengths)
    (tensor,) = interface["inputs"]
    dims, of_bytes = dims_at(tensor["shape"] or [], lengths), tensor["dtype"] == "uint8"
    channels, height, width = dims if tensor["layout"] == "nchw" else (dims[2], dims[0], dims[1])
    pictures = []
    for path in PHOTOGRAPHS:
        with Image.open(path) as image:
            pictures.append(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    pixels = torch.stack([torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures])
    pixels = pixels.reshape(len(pictures), height, width, 3)
    if channels != 3:
        pixels = pixels.float().mean(3, keepdim=True).round().to(torch.uint8).expand(-1, -1, -1, channels)
    (noise,) = example_inputs(interface, 1, lengths)
    if of_bytes:
        pixels = pixels if tensor["layout"] == "nhwc" else pixels.permute(0, 3, 1, 2)
        return [torch.cat([pixels, noise])]
    config = resolve_data_config(model=module)
    mean, std = (torch.tensor(config[key], dtype=torch.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    if len(mean) != channels:
        mean, std = mean.mean(), std.mean()
    normalized = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    if tensor["layout"] == "nhwc":
        normalized = normalized.permute(0, 2, 3, 1)
    return [torch.cat([normalized.to(noise.dtype), noise]).contiguous()]


def _forward(module: Any, inputs: "Inputs") -> "Outputs":
    return [output.numpy() for output in forward(module, inputs)]


def _forward_in_fp64(module: Any, inputs: "Inputs") -> "Outputs | None":
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
        duplicate = copy_with_same_weights(module)  # a forward may keep tensors, which would be in fp64
        with torch.jit.optimized_execution(False), layers_in_fp64(duplicate), Fp64():
            outputs = forward(duplicate, [widen(each) for each in inputs])
    except Exception as error:  # the network's own code, which may refuse fp64 in any way
        print(f"the network does not run in fp64: {error}")
        return None
    return float_outputs([output.numpy() for output in outputs])
