"""What Triton's backends do around the network: ragged inputs, batch inputs and outputs, and the states of sequences.

Triton's core leaves these to the backends, whose common library has the rules. Both stubs use this module.
Source: BackendInputCollector in src/backend_input_collector.cc, BackendOutputResponder in
src/backend_output_responder.cc of Triton's repository `backend`.
"""

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

SEQUENCE_START, SEQUENCE_END = 1, 2  # of TRITONSERVER_RequestFlag in the core's tritonserver.h
COUNT_TYPES = {"TYPE_INT32": np.int32, "TYPE_FP32": np.float32}

Arrays = dict[str, np.ndarray]


class RequestBatches:
    """Gathers the inputs of requests, and scatters the outputs of the network.

    Args:
        config: The ModelConfig.
        controls: Names of the inputs that Triton fills with the flags and the ID of a sequence.
    """

    def __init__(self, config: dict[str, Any], controls: list[str]):
        self.states = config.get("sequence_batching", {}).get("state", ())
        self.batch_inputs = config.get("batch_input", ())
        self.ragged = {tensor["name"] for tensor in config["input"] if tensor.get("allow_ragged_batch")}
        self.sources = {
            name: output["source_input"][0]
            for output in config.get("batch_output", ())
            for name in output["target_name"]
        }
        self.of_requests = [*(tensor["name"] for tensor in config["input"]), *controls]
        self.inputs = [
            *self.of_requests,
            *(state["input_name"] for state in self.states),
            *(name for each in self.batch_inputs for name in each["target_name"]),
        ]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.state_outputs = [state["output_name"] for state in self.states]
        self.kept: dict[Any, Arrays] = {}  # states by correlation ID

    def split(self, requests: list[Any]) -> list[list[Any]]:
        """The requests that the network runs together: all of them if it counts them, otherwise each alone."""
        return [requests] if self.batch_inputs else [[request] for request in requests]

    def gather(self, requests: list[Any]) -> Arrays:
        """The inputs of the network."""
        parts = {
            name: [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in self.of_requests
        }
        feed = {
            name: np.concatenate([array.reshape(-1) for array in arrays] if name in self.ragged else arrays)
            if len(arrays) > 1 or name in self.ragged
            else arrays[0]
            for name, arrays in parts.items()
        }
        for each in self.batch_inputs:
            counts = batch_input(each["kind"], parts[each["source_input"][0]])
            feed |= dict.fromkeys(each["target_name"], counts.astype(COUNT_TYPES[each["data_type"]]))
        if self.states:
            (request,) = requests
            starts = request.flags() & SEQUENCE_START
            kept = {} if starts else self.kept.get(request.correlation_id(), {})
            for state in self.states:  # the core sends the initial state, and does not know the later ones
                name = state["input_name"]
                feed[name] = kept[name] if name in kept else pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        return feed

    def keep_states(self, requests: list[Any], outputs: Arrays) -> None:
        """Keep the states that the network answered with for the next request of the sequence."""
        if not self.states:
            return
        (request,) = requests
        identity = request.correlation_id()
        if request.flags() & SEQUENCE_END:
            self.kept.pop(identity, None)
        else:
            self.kept[identity] = {state["input_name"]: outputs[state["output_name"]] for state in self.states}

    def scatter(self, requests: list[Any], outputs: Arrays) -> list[Any]:
        """One response for each request, with the outputs of the ModelConfig."""
        if len(requests) == 1 and not self.sources:
            return [response(outputs, self.outputs)]
        first = self.of_requests[0]
        rows = [len(pb_utils.get_input_tensor_by_name(request, first).as_numpy()) for request in requests]
        parts = [{} for _ in requests]  # type: list[Arrays]
        for name in self.outputs:
            if name in self.sources:
                shapes = [
                    pb_utils.get_input_tensor_by_name(request, self.sources[name]).as_numpy().shape
                    for request in requests
                ]
                ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
                pieces = [
                    piece.reshape(shape)
                    for piece, shape in zip(np.split(outputs[name].reshape(-1), ends), shapes, strict=True)
                ]
            else:
                pieces = np.split(outputs[name], np.cumsum(rows)[:-1])
            for part, piece in zip(parts, pieces, strict=True):
                part[name] = piece
        return [response(part, self.outputs) for part in parts]


def response(outputs: Arrays, names: list[str]) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, np.ascontiguousarray(outputs[name])) for name in names])


def batch_input(kind: str, arrays: list[np.ndarray]) -> np.ndarray:
    """The values that describe a batch of requests to the network, by the kind of batch_input.

    Args:
        arrays: The source input of each request.
    """
    counts = np.array([array.size for array in arrays])
    if kind == "BATCH_ELEMENT_COUNT":
        return counts
    if kind == "BATCH_ACCUMULATED_ELEMENT_COUNT":
        return np.cumsum(counts)
    if kind == "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO":
        return np.concatenate([[0], np.cumsum(counts)])
    if kind == "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE":
        return np.zeros(counts.max())
    shapes = np.array([array.shape[1:] for array in arrays for _ in range(len(array))])
    return shapes if kind == "BATCH_ITEM_SHAPE" else shapes.reshape(-1)
