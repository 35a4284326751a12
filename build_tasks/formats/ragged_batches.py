"""Batches of networks that take the values of all requests in one row, as Triton's backends form them.

    samples (batch, …) ─► one row of values, and counts ─► network ─► rows that are cut to the samples

What is ragged stands in the metadata of the ONNX file, so that whoever runs the file runs it as Triton does.
Sources of the rules: docs/user_guide/ragged_batching.md of Triton's server; BackendInputCollector and
BackendOutputResponder in its repository `backend`.
"""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError
from build_tasks.tensors import Feed, batch_of, take
from build_tasks.verification.tolerance import relative_error

if TYPE_CHECKING:
    import numpy as np
    import onnx

    Run = Callable[[Feed], list[np.ndarray]]

KEY = "ragged_batches"  # of the metadata
Ragged = dict[str, Any]  # see spec/ragged.py
# The kinds of batch_input whose first dimension is not the number of requests.
OTHER_LENGTHS = (
    "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO",
    "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE",
    "BATCH_ITEM_SHAPE_FLATTEN",
)
LIMIT = 1e-4  # of the difference between a request alone and the same one in a batch of others


def describe(graph: "onnx.ModelProto", ragged: Ragged | None) -> None:
    """Write what is ragged into the metadata of a graph."""
    if ragged is not None:
        del graph.metadata_props[:]
        graph.metadata_props.add(key=KEY, value=json.dumps(ragged, sort_keys=True))


def dims_of(tensor: str, ragged: Ragged | None, dims: list[int | str]) -> list[int | str]:
    """Return the dims with the batch that a tensor of the network has, where others have `dims`."""
    ragged = ragged or {"inputs": (), "outputs": (), "counts": ()}
    if tensor in ragged["inputs"] or tensor in ragged["outputs"]:
        return [f"{tensor}_values"]
    if any(each["name"] == tensor and each["kind"] in OTHER_LENGTHS for each in ragged["counts"]):
        return [f"{tensor}_0", *dims[1:]]
    return dims


def run_of(session: Any) -> "Run":
    """Return the function from a batch of samples to the outputs of a session of ONNX Runtime."""
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    if text is None:
        return lambda feed: list(session.run(None, feed))
    ragged: Ragged = json.loads(text)
    names = [output.name for output in session.get_outputs()]

    def run(feed: Feed) -> "list[np.ndarray]":
        import numpy as np

        requests = [take(feed, [index]) for index in range(batch_of(feed))]
        answers = run_requests(lambda row: session.run(None, row), names, ragged, requests)
        return [np.concatenate(parts) for parts in zip(*answers, strict=True)]

    return run


def run_requests(
    run: "Run", names: Sequence[str], ragged: Ragged, requests: Sequence[Feed]
) -> "list[list[np.ndarray]]":
    """Run requests of one sample each as one batch, and return the outputs of each.

    Args:
        run: The network.
        names: Of its outputs.
        ragged: What is ragged.
        requests: The samples, which may have different lengths.
    Raises:
        UserError: If an output has no row for each request.
    """
    import numpy as np

    feed = {
        name: np.concatenate([each[name].reshape(-1) if name in ragged["inputs"] else each[name] for each in requests])
        for name in requests[0]
    }
    for each in ragged["counts"]:
        counts = count_elements(each["kind"], [request[each["source"]] for request in requests])
        feed[each["name"]] = counts.astype(each["dtype"])
    answers: list[list[np.ndarray]] = [[] for _ in requests]
    for name, output in zip(names, run(feed), strict=True):
        if source := ragged["outputs"].get(name):
            shapes = [request[source].shape for request in requests]
            ends = np.cumsum([request[source].size for request in requests])
            if output.size != ends[-1]:
                expected = f"{ends[-1]} values, as many as {source}, since batch_output names it"
                raise UserError(f"the output {name} has shape {list(output.shape)}; expected {expected}")
            parts = np.split(output.reshape(-1), ends[:-1])
            parts = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        elif output.shape[:1] != (len(requests),):
            raise UserError(
                f"the output {name} has shape {list(output.shape)} for {len(requests)} requests; expected a row for "
                "each, or a batch_output in [triton.onnx] that names it"
            )
        else:
            parts = np.split(output, len(requests))
        for answer, part in zip(answers, parts, strict=True):
            answer.append(part)
    return answers


def count_elements(kind: str, arrays: "Sequence[np.ndarray]") -> "np.ndarray":
    """Return what Triton tells the network about a batch, by the kind of batch_input.

    Args:
        arrays: The source input of each request.
    """
    import numpy as np

    counts = np.array([array.size for array in arrays])
    shapes = np.array([array.shape[1:] for array in arrays])
    return {
        "BATCH_ELEMENT_COUNT": counts,
        "BATCH_ACCUMULATED_ELEMENT_COUNT": np.cumsum(counts),
        "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO": np.concatenate([[0], np.cumsum(counts)]),
        "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE": np.zeros(counts.max()),
        "BATCH_ITEM_SHAPE": shapes,
        "BATCH_ITEM_SHAPE_FLATTEN": shapes.reshape(-1),
    }[kind]


def check_lengths(session: Any, ragged: Ragged, requests: Sequence[Feed]) -> None:
    """Check that requests of several lengths are answered in one batch as each is alone.

    Raises:
        UserError: If they are not.
    """
    names = [output.name for output in session.get_outputs()]

    def run(feed: Feed) -> "list[np.ndarray]":
        return list(session.run(None, feed))

    together = run_requests(run, names, ragged, requests)
    for request, found in zip(requests, together, strict=True):
        (alone,) = run_requests(run, names, ragged, [request])
        for name, one, other in zip(names, found, alone, strict=True):
            same = one.shape == other.shape and (one.dtype.kind != "f" or relative_error(one, other) <= LIMIT)
            if not same or (one.dtype.kind != "f" and (one != other).any()):
                lengths = ", ".join(str(list(each[ragged["inputs"][0]].shape[1:])) for each in requests)
                raise UserError(
                    f"the output {name} of a request changes with the others in its batch, of {lengths}: does the "
                    "network cut the values as batch_input in [triton.onnx] counts them?"
                )
