"""The signs of weights that are smaller than the smallest number of fp16, 6e-8.

modelopt's AutoCast replaces each weight between -6e-8 and 6e-8 by +6e-8, so that no divisor becomes zero. A negative
weight gets the wrong sign. Source: `_convert_initializer_data` in modelopt/onnx/autocast/precisionconverter.py.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx

SMALLEST = 2.0**-24
ROUNDING = 2.0**-11  # the largest relative error of fp16 for other numbers


def restore_signs(graph: "onnx.ModelProto", source: "onnx.ModelProto") -> None:
    """Make weights of an fp16 graph -6e-8 where AutoCast wrote +6e-8 for a negative one.

    Only tensors that AutoCast has changed by more than fp16 rounds are corrected, such as biases of 1e-9. In others,
    these weights are too few, or too small beside the rest, to matter.

    Args:
        graph: What AutoCast has written. It is changed.
        source: The fp32 graph, with the same names of nodes.
    """
    import numpy as np
    import onnx

    weights = {tensor.name: tensor for tensor in source.graph.initializer}
    inputs = {node.name: node.input for node in source.graph.node}
    cast = {tensor.name: tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    for node in graph.graph.node:
        for name, source_name in zip(node.input, inputs.get(node.name, ()), strict=False):
            if name not in cast or source_name not in weights:
                continue
            negative = _lost_signs(onnx.numpy_helper.to_array(weights[source_name]))
            if negative is not None:
                tensor = cast.pop(name)  # several nodes may share it
                values = np.where(negative, np.float16(-SMALLEST), onnx.numpy_helper.to_array(tensor))
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))


def _lost_signs(weights: "np.ndarray") -> "np.ndarray | None":
    """Return which weights get the wrong sign, None if that changes the tensor by no more than fp16 rounds."""
    import numpy as np

    negative = (weights < 0) & (weights > -SMALLEST)
    error = np.linalg.norm(weights[negative].astype(np.float64) - SMALLEST)
    return negative if error > ROUNDING * np.linalg.norm(weights.astype(np.float64)) else None
