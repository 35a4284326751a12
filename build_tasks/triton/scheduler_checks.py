"""Checks of ModelConfig's dynamic_batching; sequence_checks.py has those of the other scheduler.

Sources: the core's model_config_utils.cc, scheduler_utils.cc (PolicyQueue) and sequence_batch_scheduler.cc; trials with
the server of release 24.10: limits and timeouts of the queue also work with max_batch_size 1 and 0.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from build_tasks.triton.model_config import Mistake, enum

# With a shorter timeout an idle server rejects requests. Measured with release 24.10 on two cores, one request after
# the other: at 1 us all were rejected, at 10 us two of three, at 50 us 6 %, at 100 us and more 0 to 2 %.
SCHEDULER_MICROSECONDS = 100


def mistakes(config: Any) -> Iterator[Mistake]:
    """Yield contradictions within the dynamic batcher of a ModelConfig whose max_batch_size is set."""
    if not config.HasField("dynamic_batching"):
        return
    batching, key, largest = config.dynamic_batching, "dynamic_batching", config.max_batch_size
    if largest <= 1:
        yield from _queue_only(batching, key, largest)
    else:
        yield from _preferred_batch_sizes(batching.preferred_batch_size, key, largest)
    levels = batching.priority_levels
    if levels and not 1 <= batching.default_priority_level <= levels:
        yield f"{key}.default_priority_level", f"1 to priority_levels, {levels}", repr(batching.default_priority_level)
    for name, value in (
        ("default_priority_level", batching.default_priority_level),
        ("priority_queue_policy", sorted(batching.priority_queue_policy)),
    ):
        if not levels and value:
            yield f"{key}.{name}", "nothing, since there are no priority_levels", repr(value)
    for level in sorted(batching.priority_queue_policy):
        if levels and not 1 <= level <= levels:
            yield f"{key}.priority_queue_policy", f"levels from 1 to priority_levels, {levels}", repr(level)
    policies = {"default_queue_policy": batching.default_queue_policy}
    policies |= {f"priority_queue_policy.{n}": policy for n, policy in sorted(batching.priority_queue_policy.items())}
    delay = batching.max_queue_delay_microseconds
    for name, policy in policies.items():
        timeout = policy.default_timeout_microseconds
        delays = policy.timeout_action == enum("ModelQueuePolicy.TimeoutAction", "DELAY")
        if batching.preserve_ordering and delays:
            yield f"{key}.{name}.timeout_action", "REJECT, since preserve_ordering = true", "'DELAY'"
        elif delays and not timeout:
            yield (
                f"{key}.{name}.timeout_action",
                "nothing, since default_timeout_microseconds = 0 is no timeout",
                "'DELAY'",
            )
        if policy.allow_timeout_override and not timeout:
            expected = "false, since a request can only shorten default_timeout_microseconds, which is 0"
            yield f"{key}.{name}.allow_timeout_override", expected, "true"
        if 0 < timeout <= delay and not delays:
            expected = f"more than max_queue_delay_microseconds, {delay}, since a single request waits that long"
            yield f"{key}.{name}.default_timeout_microseconds", expected, repr(timeout)
        elif 0 < timeout < delay + SCHEDULER_MICROSECONDS and not delays:
            expected = f"at least {delay + SCHEDULER_MICROSECONDS}, since the scheduler itself takes so long"
            yield f"{key}.{name}.default_timeout_microseconds", expected, repr(timeout)
    if batching.preserve_ordering and levels > 1:
        yield f"{key}.preserve_ordering", f"false, since there are {levels} priority_levels", "true"


def _preferred_batch_sizes(sizes: Iterable[int], scheduler: str, largest: int) -> Iterator[Mistake]:
    for size in sizes:
        if not 1 <= size <= largest:
            yield f"{scheduler}.preferred_batch_size", f"1 to max_batch_size, {largest}", repr(size)


def _queue_only(batching: Any, key: str, largest: int) -> Iterator[Mistake]:
    """Yield the fields that form batches, in a scheduler whose batch is 1 or fixed. Its queue works as any other."""
    reason = "since max_batch_size = 1" if largest else "since onnx.dynamic_axes = false fixes the batch, which"
    for name in ("preferred_batch_size", "max_queue_delay_microseconds"):
        if value := getattr(batching, name):
            found = repr(value if isinstance(value, int) else list(value))
            yield f"{key}.{name}", f"nothing, {reason} leaves nothing to batch", found
    if batching == type(batching)():
        yield key, f"false, or the policies of a queue, {reason} leaves nothing to batch", "{}"
