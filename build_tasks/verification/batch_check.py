"""Whether a model answers alike in a batch of every size, and in every slot of a batch.

    answers to the samples, in batches of 8 ─┐
    batches of other sizes and orders ───────┴► difference by output, batch and slot ─► the largest of each output

The gate compares the largest difference with a limit. A model that fails only at some batch, or in one slot, passes a
comparison at a single batch size. TensorRT has had such faults (its issues 2785, 4813, 4853 on GitHub).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

from build_tasks.errors import UserError, first_lines
from build_tasks.tensors import Feed, Signature, profile_batches, take

if TYPE_CHECKING:
    import numpy as np

    Run = Callable[[Feed], list[np.ndarray]]

TUNED = 8  # batch that stands for the tuned one, where no optimization profile names one

# On a CPU, batches are at most this large, because they take long there. The stages that build TorchScript and ONNX
# compare every slot of the largest batch with the network.
MAX_CPU_BATCH = 4

# Smaller differences are rounding, and count as none, so that the same figures are recorded on every machine.
SMALLEST_DIFFERENCE = 1e-6
LARGEST_DIFFERENCE = 1e9  # JSON has no infinity


class BatchDifference(TypedDict):
    """The slot of a batch whose answer is farthest from the answer to the same sample in another batch."""

    difference: float  # L2 norm of the difference, over the root mean square of the norms of all samples
    batch: int
    slot: int
    sample: str  # its name
    arrangement: str  # "the same sample in every slot", "the samples in another order"
    like: str  # name of the sample that the answer belongs to, if it is another one; else empty


def batches_of(signature: Signature, largest: int) -> list[int]:
    """The smallest, the tuned, the largest and an odd batch of an artifact.

    Args:
        largest: The largest batch to run, if the batch is open and no profile limits it.
    """
    batch = signature["inputs"][0]["shape"][0]
    if profiles := profile_batches(signature):
        return sorted({size for profile in profiles for size in batches_between(*profile)})
    return batches_between(1, TUNED, largest) if batch == -1 else [batch]


def batches_between(smallest: int, tuned: int, largest: int) -> list[int]:
    """The smallest, the tuned, the largest and an odd batch, ascending."""
    odd = (smallest + largest) // 2 | 1
    return sorted({smallest, min(max(tuned, smallest), largest), min(odd, largest), largest})


def arrangements(samples: int, sizes: Sequence[int], repeated: Sequence[int]) -> "list[np.ndarray]":
    """The indices of the samples of each batch: in another order, and at the sizes of `repeated` also one sample."""
    import numpy as np

    batches = []
    for size in sizes:
        batches.append(np.resize(np.random.default_rng(size).permutation(samples), size))
        if size in repeated and size > 1:
            batches.append(np.full(size, size % samples))
    return batches


def compare_batch(
    run: "Run",
    samples: Feed,
    answers: "list[np.ndarray]",
    expected: "list[np.ndarray]",
    names: Sequence[str],
    batch: "np.ndarray",
) -> list[BatchDifference]:
    """Run one batch and return the largest difference of each output.

    Args:
        run: Runs the batch.
        samples: All samples.
        answers: The outputs for all samples, from other batches.
        expected: The outputs of the reference. Where this batch is nearer to them than `answers`, it is not the one to
            blame, and its difference counts half.
        names: The names of the samples.
        batch: The indices of the samples in the batch.
    Raises:
        UserError: If the batch fails, or if an output has another shape.
    """
    import numpy as np

    try:
        outputs = run(take(samples, batch))
    except Exception as error:  # every library has its own
        raise UserError(f"a batch of {len(batch)} fails: {first_lines(error)}") from error
    differences: list[BatchDifference] = []
    for index, (output, answer, truth) in enumerate(zip(outputs, answers, expected, strict=False)):
        if output.shape != (len(batch), *answer.shape[1:]):
            shape = [len(batch), *answer.shape[1:]]
            raise UserError(
                f"output {index} of a batch of {len(batch)} has shape {list(output.shape)}, expected {shape}"
            )
        by_slot = _distances(output, answer[batch], answer)
        if truth.shape == answer.shape:
            nearer = _distances(output, truth[batch], answer) < _distances(answer[batch], truth[batch], answer)
            by_slot = np.where(nearer, by_slot / 2, by_slot)
        slot = int(by_slot.argmax())
        by_sample = _distances(np.broadcast_to(output[slot], answer.shape), answer, answer)
        nearest, sample = int(by_sample.argmin()), int(batch[slot])
        mixed_up = nearest != sample and by_sample[nearest] < by_slot[slot] / 4
        differences.append(
            {
                "difference": float(f"{by_slot[slot]:.3g}"),
                "batch": len(batch),
                "slot": slot,
                "sample": names[sample],
                "arrangement": "the same sample in every slot"
                if len(batch) > 1 and len(set(batch.tolist())) == 1
                else "the samples in another order",
                "like": names[nearest] if mixed_up else "",
            }
        )
    return differences


def _distances(found: "np.ndarray", expected: "np.ndarray", all_answers: "np.ndarray") -> "np.ndarray":
    """The distance of each row, over the root mean square of the norms of all answers."""
    import numpy as np

    def rows(array: "np.ndarray") -> "np.ndarray":
        return np.asarray(array.reshape(len(array), -1), dtype=np.float64)

    scale = float(np.linalg.norm(rows(all_answers))) / len(all_answers) ** 0.5 or 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        distances = np.linalg.norm(rows(found) - rows(expected), axis=1) / scale
    bounded: np.ndarray = np.nan_to_num(distances, nan=LARGEST_DIFFERENCE).clip(max=LARGEST_DIFFERENCE)
    return np.where(bounded < SMALLEST_DIFFERENCE, 0.0, bounded)


def format_difference(worst: BatchDifference, limit: float) -> str:
    """The message about a difference that is above its limit."""
    like = f", and is the answer to {worst['like']}" if worst["like"] else ""
    return (
        f"a batch of {worst['batch']}, {worst['arrangement']}: the answer to {worst['sample']} in slot {worst['slot']} "
        f"differs from that in another batch by {worst['difference']:.1e} (limit {limit:.1e}){like}"
    )
