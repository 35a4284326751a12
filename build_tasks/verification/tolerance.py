"""The tolerance of an output in a precision, and relative errors of arrays."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


# Rounding changes the outputs of a network about as much as the network amplifies any small difference. SENSITIVITY is
# this amplification: the relative change of the fp32 outputs after every input value is perturbed by one ulp. The
# expected error is SENSITIVITY x roundoff of the precision / roundoff of fp32. Measured errors, as multiples of it:
#
#                                                              fp32         fp16         bf16
#     ONNX Runtime, 38 architectures of timm                   0.9 to 2.0   0.1 to 1.1   0.1 to 1.4
#     PyTorch on an H100, 29 of these                          0.9 to 2.3   0.2 to 1.3   0.1 to 1.2
#
# (Random weights with batch statistics of the photographs; real weights for efficientnet_lite0.) The one exception, 13,
# has weights that fp16 cannot distinguish from zero. SAFETY_FACTOR is therefore 4: larger than the effect of
# rounding, and smaller than the effect of other faults. The lower bound is for networks in which differences of the
# inputs average out. The upper bound is for networks that amplify them so much that they should not be trusted in this
# precision.
# int8 and fp8 change the outputs far more than rounding. Their main limit is the agreement of classes, and
# QUANTIZED_TOLERANCE finds only gross faults.
ROUNDOFF = {"fp32": 2**-24, "tf32": 2**-11, "fp16": 2**-11, "bf16": 2**-8}  # unit roundoff
TOLERANCE_BOUNDS = {"fp32": (1e-4, 1e-2), "tf32": (1e-2, 0.1), "fp16": (1e-2, 0.1), "bf16": (5e-2, 0.3)}
QUANTIZED_TOLERANCE = 0.5
SAFETY_FACTOR = 4


def tolerance(precision: str, sensitivity: float) -> float:
    """Return the relative L2 error that an output may have in a precision.

    Args:
        precision: "fp32", "tf32", "fp16", "bf16", "int8" or "fp8".
        sensitivity: The relative change of the fp32 output after its inputs are perturbed by one ulp.
    """
    if precision not in ROUNDOFF:
        return QUANTIZED_TOLERANCE
    lower, upper = TOLERANCE_BOUNDS[precision]
    return min(max(SAFETY_FACTOR * sensitivity * ROUNDOFF[precision] / ROUNDOFF["fp32"], lower), upper)


def perturb_one_ulp(batch: "np.ndarray", seed: int = 0) -> "np.ndarray":
    """Return a float32 array whose values are each replaced by the next larger or smaller one, at random."""
    import numpy as np

    up = np.random.default_rng(seed).random(batch.shape, dtype=np.float32) < 0.5
    perturbed: np.ndarray = np.nextafter(batch, np.where(up, np.float32(np.inf), np.float32(-np.inf)))
    return perturbed


def relative_error(found: "np.ndarray", expected: "np.ndarray") -> float:
    """Return the L2 norm of the difference over the L2 norm of the expected values.

    It is infinite if the shapes or dtypes differ, or if a value is NaN or infinite.
    """
    import numpy as np

    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    difference = np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64))
    return float(difference / max(np.linalg.norm(expected.astype(np.float64)), np.finfo(np.float64).tiny))


def max_relative_error(found: "list[np.ndarray]", expected: "list[np.ndarray]") -> float:
    """Return the largest relative error of any output. It is infinite if the numbers of outputs differ."""
    if len(found) != len(expected):
        return float("inf")
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def float_outputs(outputs: "list[np.ndarray]") -> "list[np.ndarray]":
    """Return the outputs without the classes of output.top_k, whose order may differ if two values are equal."""
    return [output for output in outputs if output.dtype.kind == "f"] or outputs
