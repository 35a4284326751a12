"""Suggests values for the table [triton] of the spec, with the figures that they are derived from.

    points within --latency ─► the smallest load that is nearly the best ─► max_batch_size, instances, queue delay

**Batch.** Throughput rises with the batch until the machine is busy; from then on only latency rises. The proposal is
the smallest batch with at least 95 % of the best throughput. (Two runs of one point differ by up to 5 %.)

**Instances.** The smallest number with that throughput at that batch: more instances share the machine without more
throughput. On a CPU each instance has its share of the cores, which the backend must be configured with, because it
would otherwise use all cores for each instance.

**Queue delay.** Triton's batcher sends the waiting requests as soon as an instance is free. Batches fill without a
delay when the server is busy. A delay matters only while an instance is idle. It should not be longer than

- the time in which a batch fills at the highest throughput that was measured, (batch - 1) / throughput: a load that
  the server can sustain does not need more;
- the time that a full batch saves an instance, batch x latency of one image - latency of the batch: a request that
  waits longer would have been faster without waiting;
- the difference between the limit of latency and the batch's p99.

The shortest of these is proposed. Triton's own guide (model_configuration.md, "Delayed Batching") says to increase the
delay until the latency is too long: the proposal is a value to begin with.
"""

from build_tasks.bench.records import Point, Proposal
from build_tasks.triton.cpu_cores import THREAD_PARAMETERS

NEARLY_BEST = 0.95  # a point is nearly the best if it has this share of the best throughput

SERVER_REASON = "nothing is proposed: the server builds batches itself, and its number of instances was not varied"

# The PyTorch backend calls at::set_num_threads, which is the process's setting, in a std::call_once. Source:
# ModelState::ParseParameters in src/model_state.cc of triton-inference-server/pytorch_backend, commit 1dc810c.
# The ONNX Runtime backend sets its parameter in the session options of each model.
WHOLE_SERVER = (
    "INTRA_OP_THREAD_COUNT holds for all PyTorch models of the server: the first model with this parameter that is "
    "loaded decides, so set the same value in each of them"
)


def propose(
    model_format: str, points: list[Point], *, limit_ms: float | None, fixed_batch: bool, at_server: bool, cores: int
) -> Proposal:
    """The proposal for one format, from its points.

    Args:
        limit_ms: Limit for the p99 latency.
        fixed_batch: Whether the artifact takes one batch size only.
        at_server: Whether a running server was measured. Then the number of requests at a time was varied, and neither
            the instances nor the batches that they run.
        cores: Number of cores of the machine.
    """
    eligible = [point for point in points if limit_ms is None or point.p99_ms <= limit_ms]
    if not eligible:
        fastest = min(points, key=lambda point: point.p99_ms)
        return Proposal([], [f"no point is within {limit_ms:g} ms; the fastest has p99 {_format_ms(fastest.p99_ms)}"])
    best = max(eligible, key=lambda point: point.images_per_s)
    chosen = min(
        (point for point in eligible if point.images_per_s >= NEARLY_BEST * best.images_per_s),
        key=lambda point: (point.batch, point.concurrency),
    )
    reasons = [_format_choice(chosen, best, limit_ms)]
    if at_server:
        return Proposal([], [*reasons, SERVER_REASON])
    lines = [f"[triton.{model_format}]"]
    if not fixed_batch:
        lines.append(f"max_batch_size = {chosen.batch}")
        if chosen.batch == max(point.batch for point in points):
            reasons.append("max_batch_size: no larger batch was measured (--batches)")
    lines.append(f"instance_group = [{{ count = {chosen.concurrency} }}]")
    if 1 < chosen.concurrency == max(point.concurrency for point in points) and chosen.threads != 1:
        reasons.append("count: no larger number of instances was measured (--concurrency)")
    if not fixed_batch:
        line, reason = dynamic_batching(chosen, points, limit_ms)
        lines.append(line)
        reasons.append(reason)
    threads = chosen.threads or cores
    if model_format in THREAD_PARAMETERS and threads < cores:
        parameter = THREAD_PARAMETERS[model_format]
        lines.append(f"parameters = {{ {parameter} = {threads} }}")
        reasons.append(f"{parameter}: each instance was measured with {threads} of {cores} cores")
        if model_format == "torchscript":
            reasons.append(WHOLE_SERVER)
        if threads == 1 and chosen.concurrency == cores:
            reasons.append(f'instance_group and parameters: device = "cpu" and cores = {cores} in [triton] do the same')
    return Proposal(lines, reasons)


def dynamic_batching(chosen: Point, points: list[Point], limit_ms: float | None) -> tuple[str, str]:
    """The line for Triton's dynamic batcher, and its reason."""
    if chosen.batch == 1:
        return "dynamic_batching = false", "dynamic_batching: larger batches do not raise the throughput"
    smallest = min(
        (point for point in points if point.concurrency == chosen.concurrency), key=lambda point: point.batch
    )
    one_image = smallest.p50_ms / smallest.batch
    saving = f"{chosen.batch} x {_format_ms(one_image)} - {_format_ms(chosen.p50_ms)}"
    delays = {
        f"a batch fills in {{}} at {chosen.images_per_s:.1f} images/s": (chosen.batch - 1) / chosen.images_per_s * 1e3,
        f"a batch of {chosen.batch} saves {{}} ({saving})": max(chosen.batch * one_image - chosen.p50_ms, 0.0),
    }
    if limit_ms is not None:
        delays[f"p99 is {{}} below the limit of {limit_ms:g} ms"] = limit_ms - chosen.p99_ms
    reason, shortest = min(delays.items(), key=lambda item: item[1])
    others = "; ".join(text.format(_format_ms(delay)) for text, delay in delays.items() if text != reason)
    return (
        f"dynamic_batching = {{ max_queue_delay_microseconds = {round_to_two_digits(shortest * 1e3)} }}",
        f"max_queue_delay_microseconds: {reason.format(_format_ms(shortest))}, the shortest time ({others})",
    )


def round_to_two_digits(value: float) -> int:
    """A value with two significant digits: the measured figures are not more precise."""
    return int(float(f"{value:.1e}"))


def _format_choice(chosen: Point, best: Point, limit_ms: float | None) -> str:
    """The throughput of the chosen point, compared with the best point."""
    throughput = f"{_format_load(chosen)} gives {chosen.images_per_s:.1f} images/s"
    limit = "" if limit_ms is None else f" with p99 within {limit_ms:g} ms"
    if chosen is best:
        return f"{throughput}, the best{limit}"
    share = chosen.images_per_s / best.images_per_s
    return f"{throughput}, {share:.0%} of the best{limit} ({best.images_per_s:.1f}, {_format_load(best)})"


def _format_load(point: Point) -> str:
    return f"batch {point.batch} x {point.concurrency}"


def _format_ms(value: float) -> str:
    return f"{value:.3g} ms"
