"""What a benchmark proposes for [triton] of a spec, and from which of its figures that follows.

    points of one format ─► the smallest load that is nearly the best ─► max_batch_size, instances, queue delay

**Batch.** Throughput rises with the batch until the machine is busy, and then only latency does. So: the smallest batch
with at least 95 % of the best throughput of all points within the limit of latency (5 % are within what two runs of one
point differ by).

**Instances.** At that batch the smallest number with that throughput: more of them share the machine, and no more comes
out of it. On a CPU each has its share of the cores, which must then be said to the backend; else each takes all.

**Queue delay.** Triton's batcher sends what waits as soon as an instance is free, so that batches fill by themselves
under load, and a delay matters where an instance is idle. It should not be longer than
- the time in which a batch fills at the highest rate that was measured, (batch - 1) / throughput: no load that can be
  served needs longer to be served at its best;
- the time that a full batch saves an instance, batch x latency of one alone - latency of the batch: who waits longer
  would have been answered sooner one by one;
- what the limit of latency leaves over the batch's p99.

The shortest of these is proposed. Triton's own guide (model_configuration.md, "Delayed Batching") is to try delays
until the latency is too long: this is where to begin.
"""

from typing import Any, NamedTuple

Point = dict[str, Any]

NEARLY = 0.95  # of the best throughput

AT_SERVER = "nothing is proposed: a server puts requests into batches itself, and its instances were not varied"

# The backends' own name for the threads of an instance. Sources: README.md of onnxruntime_backend and pytorch_backend.
THREADS = {"onnx": "intra_op_thread_count", "torchscript": "INTRA_OP_THREAD_COUNT"}


class Proposal(NamedTuple):
    """lines: of TOML, for the spec; none where no point is within the limit, or at a server."""

    lines: list[str]
    reasons: list[str]


def proposal(
    model_format: str, points: list[Point], *, limit_ms: float | None, fixed: bool, at_server: bool, cores: int
) -> Proposal:
    """What follows from the points of one format.

    limit_ms: of the p99 latency. fixed: the batch stands in the artifact. at_server: what was varied are requests,
    and neither instances nor the batches that they run.
    """
    within = [point for point in points if limit_ms is None or point["p99_ms"] <= limit_ms]
    if not within:
        fastest = min(points, key=lambda point: float(point["p99_ms"]))
        return Proposal([], [f"no point is within {limit_ms:g} ms; the fastest has p99 {_ms(fastest['p99_ms'])}"])
    best = max(within, key=lambda point: float(point["images_per_s"]))
    chosen = min(
        (point for point in within if point["images_per_s"] >= NEARLY * best["images_per_s"]),
        key=lambda point: (point["batch"], point["concurrency"]),
    )
    if at_server:
        return Proposal([], [_why(chosen, best, limit_ms), AT_SERVER])
    lines, reasons = [f"[triton.{model_format}]"], [_why(chosen, best, limit_ms)]
    if not fixed:
        lines.append(f"max_batch_size = {chosen['batch']}")
        if chosen["batch"] == max(point["batch"] for point in points):
            reasons.append("max_batch_size: no larger batch was measured (--batches)")
    lines.append(f"instance_group = [{{ count = {chosen['concurrency']} }}]")
    if 1 < chosen["concurrency"] == max(point["concurrency"] for point in points) and chosen.get("threads") != 1:
        reasons.append("count: no more instances were measured (--concurrency)")
    if not fixed:
        line, reason = queue_delay(chosen, points, limit_ms)
        lines.append(line)
        reasons.append(reason)
    threads = chosen.get("threads", cores)
    if model_format in THREADS and threads < cores:
        lines.append(f"parameters = {{ {THREADS[model_format]} = {threads} }}")
        reasons.append(f"{THREADS[model_format]}: each instance was measured with {threads} of {cores} cores")
    return Proposal(lines, reasons)


def _why(chosen: Point, best: Point, limit_ms: float | None) -> str:
    what = f"{_load(chosen)} gives {chosen['images_per_s']:.1f} images/s"
    bound = "" if limit_ms is None else f" with p99 within {limit_ms:g} ms"
    if chosen is best:
        return f"{what}, the best{bound}"
    share = chosen["images_per_s"] / best["images_per_s"]
    return f"{what}, {share:.0%} of the best{bound} ({best['images_per_s']:.1f}, {_load(best)})"


def queue_delay(chosen: Point, points: list[Point], limit_ms: float | None) -> tuple[str, str]:
    """The line for the dynamic batcher, and why."""
    if chosen["batch"] == 1:
        return "dynamic_batching = false", "dynamic_batching: larger batches give no more, and would only wait to fill"
    alone = min(
        (point for point in points if point["concurrency"] == chosen["concurrency"]), key=lambda point: point["batch"]
    )
    each = alone["p50_ms"] / alone["batch"]
    delays = {
        f"a batch fills in {{}} at {chosen['images_per_s']:.1f} images/s": (
            (chosen["batch"] - 1) / chosen["images_per_s"] * 1e3
        ),
        f"{chosen['batch']} images at once save {{}} ({chosen['batch']} x {_ms(each)} - {_ms(chosen['p50_ms'])})": max(
            chosen["batch"] * each - chosen["p50_ms"], 0.0
        ),
    }
    if limit_ms is not None:
        delays[f"{{}} are left of {limit_ms:g} ms"] = limit_ms - chosen["p99_ms"]
    why, shortest = min(delays.items(), key=lambda item: item[1])
    others = "; ".join(told.format(_ms(delay)) for told, delay in delays.items() if told != why)
    microseconds = rounded(shortest * 1e3)
    reason = f"max_queue_delay_microseconds: {why.format(_ms(shortest))}, the shortest ({others})"
    return f"dynamic_batching = {{ max_queue_delay_microseconds = {microseconds} }}", reason


def rounded(value: float) -> int:
    """To two digits: the figures that it comes from are no better."""
    return int(float(f"{value:.1e}"))


def _load(point: Point) -> str:
    return f"batch {point['batch']} x {point['concurrency']}"


def _ms(value: float) -> str:
    return f"{value:.3g} ms"
