"""How far an artifact is from what it stands for, and how an artifact is run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


# What a precision may cost: its unit roundoff, and the bounds of the relative L2 error that it is allowed.
#
# Rounding moves a network's outputs about as far as the network amplifies any small difference. Over 38 of timm's
# architectures (random weights, batch statistics of the photographs; real ones for efficientnet_lite0) the error of
# graphs in ONNX Runtime was 0.9 to 2.0 (fp32), 0.1 to 1.1 (fp16) and 0.1 to 1.4 (bf16) times SENSITIVITY x roundoff
# over fp32's, where SENSITIVITY is the relative change of the fp32 outputs when every input value moves by an ulp; of
# PyTorch itself on an H100, over 29 of them, 0.9 to 2.3, 0.2 to 1.3 and 0.1 to 1.2. The one exception (13) has weights
# that fp16 cannot tell from zero. Hence a limit of 4 times that: above rounding, below whatever else goes wrong. The
# lower bound is for networks that average the inputs' differences away, the upper one for those that amplify so much
# that they should not be trusted in this precision.
# int8 and fp8 do not round, they coarsen: they are judged by the classes, and by this only in the gross.
ROUNDOFF = {"fp32": 2**-24, "tf32": 2**-11, "fp16": 2**-11, "bf16": 2**-8}
BOUNDS = {"fp32": (1e-4, 1e-2), "tf32": (1e-2, 0.1), "fp16": (1e-2, 0.1), "bf16": (5e-2, 0.3)}
COARSE = 0.5
MARGIN = 4


def tolerance(precision: str, sensitivity: float) -> float:
    """The relative L2 error that an output may have in a precision, by its sensitivity to an ulp of the inputs."""
    if precision not in ROUNDOFF:
        return COARSE
    least, most = BOUNDS[precision]
    return min(max(MARGIN * sensitivity * ROUNDOFF[precision] / ROUNDOFF["fp32"], least), most)


def perturb_one_ulp(batch: "np.ndarray", seed: int = 0) -> "np.ndarray":
    """Every value of a float32 array, moved to one of its two neighbours; which one is drawn under a seed."""
    import numpy as np

    up = np.random.default_rng(seed).random(batch.shape, dtype=np.float32) < 0.5
    moved: np.ndarray = np.nextafter(batch, np.where(up, np.float32(np.inf), np.float32(-np.inf)))
    return moved


def relative_error(found: "np.ndarray", expected: "np.ndarray") -> float:
    """The L2 norm of the difference over the norm of what is expected; inf where shape, dtype or a NaN forbids it."""
    import numpy as np

    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    difference = np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64))
    return float(difference / max(np.linalg.norm(expected.astype(np.float64)), np.finfo(np.float64).tiny))


def max_relative_error(found: "list[np.ndarray]", expected: "list[np.ndarray]") -> float:
    """The largest relative error of any output; inf where their number differs."""
    if len(found) != len(expected):
        return float("inf")
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def float_outputs(outputs: "list[np.ndarray]") -> "list[np.ndarray]":
    """The outputs without the classes of output.top_k, of which two that are as good as equal may change places."""
    return [output for output in outputs if output.dtype.kind == "f"] or outputs
