"""Artifacts under load: closed loops of single batches, timed after a warm-up; what `doit bench` measures by.

    samples ─► batches ─► 1, 2, 4 threads, an instance of the artifact each ─► latencies, images a second

Instances are what Triton's instance groups are: copies of the artifact, each on a stream of its own where there is a
GPU, and with its share of the cores where there is none. What is timed is the artifact: its inputs lie ready, on the
GPU where it runs there, and what it answers stays there.
"""

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from build_tasks.errors import UserError, first_lines
from build_tasks.formats.artifacts import read_signature
from build_tasks.formats.onnx_files import onnx_file
from build_tasks.runtime import progress
from build_tasks.runtime.stage import Paths, Settings
from build_tasks.tensors import INPUT

if TYPE_CHECKING:
    import numpy as np

# TorchScript's profiling executor compiles at the first two requests of a shape; the third is as fast as the hundredth.
WARM_UP = 3  # runs, at least, of every instance at every batch
WARM_UP_SHARE = 0.25  # of the measuring time, at least
LEAST = 3  # runs that are measured, however long they take

EVENTS, CLOCK = "CUDA events", "wall clock"

Point = dict[str, Any]
Request = Callable[[], float]  # one batch; the seconds that it took
Instance = Callable[["np.ndarray"], Request]  # called in the thread that then runs the requests


def measured(inputs: Paths, settings: Settings) -> dict[str, Any]:
    """One format on this machine, in a process of its own: its points, where and how it was timed, what failed.

    settings: format, batches, concurrency, seconds (of each point), device (as in [triton]), cores; for the plain trace
    what decides its network.
    """
    from polygraphy.json import load_json

    samples: np.ndarray = load_json(inputs["samples"])[0][INPUT]
    points: list[Point] = []
    failed: list[str] = []
    for concurrency in settings["concurrency"]:
        threads = max(settings["cores"] // concurrency, 1)
        loaded = LOADED[settings["format"]](inputs, settings, threads, concurrency)
        share = {"threads": threads} if loaded.device == "cpu" else {}
        batches = samples.astype(loaded.dtype or samples.dtype)
        # Each library has its own exception for want of memory, or of a kernel.
        failed += sweep(loaded.instances, batches, settings, share, points, Exception)
    return {"points": points, "device": loaded.device, "timed_by": loaded.timed_by, "failed": failed}


def sweep(
    instances: Sequence[Instance],
    samples: "np.ndarray",
    settings: Settings,
    share: Point,
    points: list[Point],
    refused: type[Exception],
) -> list[str]:
    """Every batch size with so many instances, into `points`; returns what failed: larger ones are not tried then.

    share: what each point says of its instances. refused: what makes a point fail, and not the whole benchmark.
    """
    concurrency = len(instances)
    for batch in settings["batches"]:
        try:
            found = under_load(instances, resized(samples, batch), settings["seconds"])
        except refused as error:
            return [f"batch {batch} x {concurrency}: {first_lines(error)}"]
        points.append({"format": settings["format"], "batch": batch, "concurrency": concurrency, **share, **found})
        progress.emit(told(points[-1]))
    return []


def resized(samples: "np.ndarray", batch: int) -> "np.ndarray":
    """A batch of some size: the samples, repeated or cut."""
    import numpy as np

    filled: np.ndarray = samples[np.arange(batch) % len(samples)]
    return filled


def told(point: Point) -> str:
    """A line on a point, while the others are still to come."""
    return (
        f"  {point['format']:<12} batch {point['batch']:>3} x {point['concurrency']:<2} "
        f"{point['images_per_s']:>9.1f} images/s   p50 {point['p50_ms']:.2f} ms, p99 {point['p99_ms']:.2f} ms"
    )


def under_load(instances: Sequence[Instance], batch: "np.ndarray", seconds: float) -> Point:
    """Every instance in a thread, one batch after the other, for some seconds after a warm-up.

    The throughput is the sum of the instances': the last request of one may end when the others have ended.
    """
    from concurrent.futures import ThreadPoolExecutor

    together = threading.Barrier(len(instances))

    def client(instance: Instance) -> tuple[list[float], float]:
        try:
            request = instance(batch)
            for _ in timed(request, seconds * WARM_UP_SHARE, WARM_UP):
                pass
            together.wait()
        except threading.BrokenBarrierError:
            return [], 1.0  # another thread tells why
        except BaseException:
            together.abort()
            raise
        started = time.perf_counter()
        latencies = list(timed(request, seconds, LEAST))
        return latencies, time.perf_counter() - started

    with ThreadPoolExecutor(len(instances)) as pool:
        found = list(pool.map(client, instances))
    rate = sum(len(latencies) / spent for latencies, spent in found)
    return figures([latency for latencies, _ in found for latency in latencies], rate * len(batch))


def timed(request: Request, seconds: float, least: int) -> Iterator[float]:
    """Latencies of requests, until some seconds are over and there are enough of them."""
    until, count = time.perf_counter() + seconds, 0
    while count < least or time.perf_counter() < until:
        yield request()
        count += 1


def figures(latencies: list[float], images_per_s: float) -> Point:
    """A point's figures; latencies in seconds, told in milliseconds."""
    import numpy as np

    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return {
        "requests": len(latencies),
        "p50_ms": round(float(p50), 4),
        "p99_ms": round(float(p99), 4),
        "images_per_s": round(images_per_s, 2),
    }


class Loaded(NamedTuple):
    """An artifact in so many instances.

    device: "cpu" or "cuda". dtype: NumPy's, of the input; None for that of the samples.
    """

    instances: list[Instance]
    device: str
    timed_by: str
    dtype: str | None


def torchscript(inputs: Paths, settings: Settings, threads: int, count: int) -> Loaded:
    """Copies of model.pt."""
    with open(inputs["model"], "rb") as file:
        return scripts(file.read(), settings, threads, count)


def trace(inputs: Paths, settings: Settings, threads: int, count: int) -> Loaded:
    """The network as torch.jit.trace gives it, in fp32, neither frozen nor otherwise improved."""
    import torch

    from build_tasks.formats import pytorch_network
    from build_tasks.stages.torchscript import TRACED_BATCH

    network = pytorch_network.create_network(settings["network"], inputs["weights"])
    module = pytorch_network.wrap_for_serving(network, settings["interface"])
    shape = pytorch_network.input_shape(network, settings["shape"])
    example = pytorch_network.example_input(shape, TRACED_BATCH, settings["interface"]["format"])
    with torch.no_grad():
        module(example)  # what a network computes only once must not end up in the trace
        traced = torch.jit.trace(module, example, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    return scripts(buffer.getvalue(), settings, threads, count)


def scripts(data: bytes, settings: Settings, threads: int, count: int) -> Loaded:
    """Copies of a TorchScript module; on the GPU where PyTorch has one."""
    import torch

    device = "cuda" if settings["device"] != "cpu" and torch.cuda.is_available() else "cpu"

    def instance(module: "torch.jit.ScriptModule") -> Instance:
        def prepared(batch: "np.ndarray") -> Request:
            torch.set_num_threads(threads)  # OpenMP's teams are each thread's own
            example = torch.from_numpy(batch).to(device)
            if device == "cpu":
                return by_clock(lambda: run(module, example))
            stream = torch.cuda.Stream()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()  # the example is there, whichever stream brought it

            def request() -> float:
                with torch.cuda.stream(stream):
                    before.record()
                    run(module, example)
                    after.record()
                after.synchronize()
                return float(before.elapsed_time(after)) / 1e3

            return request

        return prepared

    def run(module: "torch.jit.ScriptModule", example: "torch.Tensor") -> None:
        with torch.inference_mode():
            module(example)

    copies = [torch.jit.load(io.BytesIO(data), map_location=device).eval() for _ in range(count)]
    return Loaded([instance(module) for module in copies], device, CLOCK if device == "cpu" else EVENTS, None)


def by_clock(run: Callable[[], object]) -> Request:
    def request() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return request


def onnx(inputs: Paths, settings: Settings, threads: int, count: int) -> Loaded:
    """Sessions of ONNX Runtime; on the GPU where it has its CUDA provider, which answers when the GPU has."""
    import onnxruntime

    cuda = "CUDAExecutionProvider"
    on_gpu = settings["device"] != "cpu" and cuda in onnxruntime.get_available_providers()

    def instance() -> Instance:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        providers = [*([cuda] if on_gpu else []), "CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(onnx_file(inputs["model"]), options, providers=providers)

        def prepared(batch: "np.ndarray") -> Request:
            if not on_gpu:
                return by_clock(lambda: session.run(None, {INPUT: batch}))
            binding = session.io_binding()
            binding.bind_ortvalue_input(INPUT, onnxruntime.OrtValue.ortvalue_from_numpy(batch, "cuda", 0))
            for output in session.get_outputs():
                binding.bind_output(output.name, "cuda")
            return by_clock(lambda: session.run_with_iobinding(binding))

        return prepared

    instances = [instance() for _ in range(count)]
    return Loaded(instances, "cuda" if on_gpu else "cpu", CLOCK, read_signature(inputs)["inputs"][0]["dtype"])


def engine(inputs: Paths, settings: Settings, threads: int, count: int) -> Loaded:
    """Execution contexts of a plan, or of an engine of TensorRT-RTX. UserError where it cannot be loaded here."""
    import polygraphy.config

    polygraphy.config.USE_TENSORRT_RTX = settings["format"] == "rtx"
    from build_tasks.formats.tensorrt_context import ExecutionContext

    instances: list[Instance] = [ExecutionContext(inputs["model"]).prepare_request for _ in range(count)]
    return Loaded(instances, "cuda", EVENTS, read_signature(inputs)["inputs"][0]["dtype"])


LOADED: dict[str, Callable[[Paths, Settings, int, int], Loaded]] = {
    "trace": trace,
    "torchscript": torchscript,
    "onnx": onnx,
    "tensorrt": engine,
    "rtx": engine,
}


def requests(inputs: Paths, settings: Settings) -> dict[str, Any]:
    """A running server by Triton's client for Python, where perf_analyzer is not at hand.

    settings: as of `measured`, with the server's url, and the name of its model.
    """
    from polygraphy.json import load_json

    from build_tasks.serving.smoke import typed
    from build_tasks.serving.triton_client import Client

    samples: np.ndarray = load_json(inputs["samples"])[0][INPUT]

    def instance(batch: "np.ndarray") -> Request:
        client = Client("HTTP", settings["url"])
        tensors = client.tensors(settings["name"])
        asked = typed(batch, tensors.type)
        return by_clock(lambda: client.infer(settings["name"], tensors, asked))

    points: list[Point] = []
    failed: list[str] = []
    for concurrency in settings["concurrency"]:
        failed += sweep([instance] * concurrency, samples, settings, {}, points, UserError)
    return {"points": points, "timed_by": "Triton's client for Python", "failed": failed}
