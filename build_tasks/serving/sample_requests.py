"""Requests with the accuracy samples to a model of a running server: one at a time, and many at once."""

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from build_tasks.serving.triton_client import Client, Tensors, cast_to_input_types
from build_tasks.tensors import Feed, batch_of, take
from build_tasks.verification import batch_check, reference_outputs

if TYPE_CHECKING:
    import numpy as np

CONCURRENCY = 8  # number of requests at a time, to see whether the server's own batching is right
CONCURRENT_REQUESTS = 48  # number of such requests
LARGEST_REQUEST = 128_000_000  # maximum number of bytes of one request
REQUESTS = 20  # number of requests with one sample each, to measure the latency


def send_batch(
    name: str,
    tensors: Tensors,
    reference: reference_outputs.Reference,
    versions: set[str],
    client: Client,
    batch: Feed,
    sequences: bool,
) -> "list[np.ndarray]":
    """Send one batch to a model, and return its outputs.

    Args:
        name: The Triton model's name.
        tensors: Its tensors.
        reference: The reference. An output that has one value per sample there is (batch, 1) in Triton, which needs a
            dimension, and is (batch,) here.
        versions: Grows by the version that answers.
        client: The client that sends the batch.
        batch: The batch.
        sequences: Whether each request is a sequence of its own.
    """
    sequence = new_sequence() if sequences else 0
    version, outputs = client.infer(name, tensors, cast_to_input_types(batch, tensors), sequence)
    versions.add(version)
    expected = list(reference.outputs.values())
    return [
        output[:, 0] if index < len(expected) and expected[index].ndim == 1 and output.shape[1:] == (1,) else output
        for index, output in enumerate(outputs)
    ]


def new_sequence() -> int:
    """A correlation ID that no other client uses."""
    return secrets.randbelow(2**31) + 1


def takes_sequences(client: Client, config: dict[str, Any]) -> bool:
    """Whether a model, or a step of an ensemble, wants a correlation ID with every request.

    Args:
        config: The ModelConfig that the server uses for the model.
    """
    steps = config.get("ensemble_scheduling", {}).get("step", ())
    return "sequence_batching" in config or any(
        takes_sequences(client, client.config(step["model_name"])) for step in steps
    )


def takes_ragged(config: dict[str, Any]) -> bool:
    """Whether requests of several lengths form one batch. Triton counts requests then, so that each has one sample."""
    return any(tensor.get("allow_ragged_batch") for tensor in config.get("input", ()))


def fills_inputs(config: dict[str, Any]) -> bool:
    """Whether Triton fills inputs of the network with other values than the samples have.

    The reference of a model with ragged inputs fills its batch_input as Triton does.
    """
    batching = config.get("sequence_batching", {})
    return bool(
        batching.get("control_input")
        or batching.get("state")
        or (config.get("batch_input") and not takes_ragged(config))
    )


def largest_request(groups: Sequence[Feed], max_batch_size: int) -> int:
    """The largest batch of the samples that is sent in one request: at most LARGEST_REQUEST bytes."""
    size = max(
        sum(_bytes_of(array[index]) for array in feed.values()) for feed in groups for index in range(batch_of(feed))
    )
    return max(min(max_batch_size, LARGEST_REQUEST // size), min(max_batch_size, reference_outputs.BATCH))


def _bytes_of(sample: "np.ndarray") -> int:
    return sum(map(len, sample.ravel())) if sample.dtype == object else sample.nbytes


def send_concurrently(
    connect: "Callable[[], reference_outputs.RunBatch]", reference: reference_outputs.Reference, sizes: tuple[int, int]
) -> list[batch_check.BatchDifference]:
    """Send requests of mixed batch sizes at once, so that the server batches them, and return the largest differences.

    Args:
        connect: Returns the function that sends a batch, with a client of its own. Each thread calls it.
        reference: The reference, which also holds the answers to requests that were sent one at a time.
        sizes: The smallest and the largest batch of a request.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    random = np.random.default_rng(0)
    batches = [
        np.resize(random.permutation(len(reference.names)), random.integers(sizes[0], sizes[1] + 1))
        for _ in range(CONCURRENT_REQUESTS)
    ]
    own = threading.local()

    def start() -> None:
        own.run = connect()

    def send(batch: "np.ndarray") -> list[batch_check.BatchDifference]:
        return reference.compare_batch(reference.answers, reference_outputs.Batch(own.run, batch))

    with ThreadPoolExecutor(CONCURRENCY, initializer=start) as pool:
        results = list(pool.map(send, batches))
    return [max(of_output, key=lambda each: each["difference"]) for of_output in zip(*results, strict=True)]


def request_latencies(run: reference_outputs.RunBatch, groups: Sequence[Feed], batch_size: int) -> list[float]:
    """Seconds of each of REQUESTS single requests of `batch_size` samples."""
    seconds = []
    for index in range(REQUESTS):
        feed = groups[index % len(groups)]
        batch = take(feed, [index % batch_of(feed)] * batch_size)
        started = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - started)
    return seconds
