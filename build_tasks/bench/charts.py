"""bench.svg: throughput and latency of one run over the batch size."""

from build_tasks import figures
from build_tasks.bench.records import COMPILED, TRACE, TRTEXEC, Run

COLORS = {
    TRACE: "#666666", "torchscript": "#b3261e", "onnx": "#1f5fa8", "tensorrt": "#2a7f62", TRTEXEC: "#8ac2ab",
    "rtx": "#b8860b", "aoti": "#6a3d9a", COMPILED: "#d98200",
}  # fmt: skip
LINE_STYLES = ("solid", "dashed", "dotted", "dashdot")  # one style for each concurrency


def plot_run(model: str, run: Run, path: str) -> None:
    """Draw a run. The same figures give the same bytes."""
    from matplotlib import ticker

    pyplot = figures.pyplot(model)
    figure, (throughput, latency) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    concurrencies = sorted({point.concurrency for point in run.points})
    for model_format, color in COLORS.items():
        for index, concurrency in enumerate(concurrencies):
            points = [p for p in run.points if (p.model_format, p.concurrency) == (model_format, concurrency)]
            if not points:
                continue
            points.sort(key=lambda point: point.batch)
            batches = [point.batch for point in points]
            style = {"color": color, "linestyle": LINE_STYLES[index % len(LINE_STYLES)], "marker": "o", "markersize": 3}
            images_per_s = [point.images_per_s for point in points]
            throughput.plot(batches, images_per_s, label=f"{model_format} x {concurrency}", **style)
            p50, p99 = [point.p50_ms for point in points], [point.p99_ms for point in points]
            latency.plot(batches, p50, **style)
            latency.vlines(batches, p50, p99, color=color, linewidth=1)
    batches = sorted({point.batch for point in run.points})
    for axes, title in (
        (throughput, "images per second"),
        (latency, "milliseconds per batch: p50, with a line to p99"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_xlabel("batch")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    throughput.set_ylim(bottom=0)
    latency.set_yscale("log")
    latency.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    latency.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    latency.minorticks_off()
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    machine = run.machine
    hardware = f"the server at {machine.server}" if machine.server else machine.gpu or machine.cpu
    concurrency_unit = "requests at a time" if machine.server else "instances"
    figure.suptitle(f"{model} on {hardware} (x: {concurrency_unit})", fontsize=9)
    figures.save_svg(figure, path)
