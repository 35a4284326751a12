"""The answers of two artifacts of one format to the same inputs, for a comparison of a model with its original.

feeds ─┬► original ─┐
       └► built ────┴► relative error of each output
"""

from typing import TYPE_CHECKING, Any

from build_tasks.formats.onnx_files import onnx_file
from build_tasks.verification.tolerance import relative_error

if TYPE_CHECKING:
    import numpy as np


def compare_answers(
    paths: tuple[str, str], model_format: str, feeds: "list[dict[str, np.ndarray]]", outputs: list[str]
) -> dict[str, float]:
    """Return the largest relative L2 error of each output, by its name. Other values than floats give 0 or infinity.

    Args:
        paths: The original, and the artifact that was built from it.
        model_format: "onnx" or "torchscript".
        feeds: Batches of inputs, by name.
        outputs: Names of the outputs to compare, in the order of the artifact.
    """
    import numpy as np

    run = {"onnx": _onnx_answers, "torchscript": _torchscript_answers}[model_format]
    errors = dict.fromkeys(outputs, 0.0)
    for expected, found in zip(run(paths[0], feeds, outputs), run(paths[1], feeds, outputs), strict=True):
        for name in outputs:
            one, other = np.asarray(expected[name]), np.asarray(found[name])
            if one.shape == other.shape and one.dtype.kind == "f":
                error = relative_error(other.astype(np.float64), one.astype(np.float64))
            else:
                error = 0.0 if np.array_equal(one, other) else float("inf")
            errors[name] = max(errors[name], error)
    return errors


def _onnx_answers(path: str, feeds: "list[dict[str, np.ndarray]]", outputs: list[str]) -> list[dict[str, Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file(path), providers=["CPUExecutionProvider"])
    answers = []
    for feed in feeds:
        for part in _batches(feed, session.get_inputs()[0].shape[:1]):
            answers.append(dict(zip(outputs, session.run(outputs, part), strict=True)))
    return answers


def _batches(feed: "dict[str, np.ndarray]", batch: list[Any]) -> "list[dict[str, np.ndarray]]":
    """Return the parts of a feed that have the batch of the graph, if it is fixed."""
    size = len(next(iter(feed.values())))
    if not batch or not isinstance(batch[0], int) or batch[0] > size:
        return [feed]
    starts = range(0, size - batch[0] + 1, batch[0])
    return [{name: values[start : start + batch[0]] for name, values in feed.items()} for start in starts]


def _torchscript_answers(path: str, feeds: "list[dict[str, np.ndarray]]", outputs: list[str]) -> list[dict[str, Any]]:
    import torch

    network = torch.jit.load(path, map_location="cpu").eval()
    arguments = [argument.name for argument in network.forward.schema.arguments[1:]]
    answers = []
    with torch.inference_mode():
        for feed in feeds:
            names = arguments if set(arguments) == set(feed) else list(feed)
            answer = network(*(torch.from_numpy(feed[name]) for name in names))
            tensors = [answer] if torch.is_tensor(answer) else list(answer)
            answers.append({name: tensor.numpy() for name, tensor in zip(outputs, tensors, strict=False)})
    return answers
