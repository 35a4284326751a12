"""Instances of an artifact, as `doit bench` measures them: one loader for each format.

    model.pt, the plain trace    TorchScript modules     on the GPU a CUDA stream each
    the network                  torch.compile           likewise; one compilation for all instances
    model.pt2                    AOTInductor packages    likewise
    model.onnx                   ONNX Runtime sessions
    plans, engines of RTX        execution contexts      always on a GPU

Only the artifact is timed: the inputs lie on its device before the first request, and the outputs stay there.
"""

import io
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from build_tasks.bench.records import COMPILED, TRACE
from build_tasks.errors import UserError
from build_tasks.formats import ragged_batches
from build_tasks.formats.artifacts import read_signature
from build_tasks.formats.onnx_files import onnx_file
from build_tasks.runtime.stage import Paths, Settings
from build_tasks.tensors import Feed, Interface

if TYPE_CHECKING:
    import torch

CUDA_EVENTS, WALL_CLOCK = "CUDA events", "wall clock"

Request = Callable[[], float]  # runs one batch and returns the seconds that it took
Instance = Callable[[Feed], Request]  # prepares requests of a batch, in the thread that then runs them


class Loaded(NamedTuple):
    """The instances of an artifact.

    Args:
        device: "cpu" or "cuda".
        timed_by: CUDA_EVENTS or WALL_CLOCK.
        dtypes: NumPy's type of each input, by its name, in their order.
    """

    instances: list[Instance]
    device: str
    timed_by: str
    dtypes: dict[str, str]


def load_torchscript(inputs: Paths, settings: Settings, threads: int, count: int) -> Loaded:
    """Copies of model.pt.

    Raises:
        UserError: If the file was cast for a GPU, and PyTorch sees none.
    """
    if read_signature(inputs).get("needs_gpu") and _device(settings) == "cpu":
        raise UserError("the file was cast for a GPU (triton.device), and PyTorch sees none here")
    with open(inputs["model"], "rb") as file:
        return _load_modules(file.read(), _input_dtypes(inputs), settings, threads, count)


def load_trace(inputs: Paths, settings: Settings, threads: int, count: int) -> Loaded:
    """Copies of the network as torch.jit.trace gives it, in fp32, neither frozen nor optimized."""
    import torch

    from build_tasks.formats.example_inputs import example_inputs
    from build_tasks.formats.torchscript_trace import TRACED_BATCH

    module, interface = _create_network(inputs, settings)
    example = tuple(example_inputs(interface, TRACED_BATCH))
    with torch.no_grad():
        module(*example)  # values that a network computes only once must not become part of the trace
        traced = torch.jit.trace(module, example, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    return _load_modules(buffer.getvalue(), dtypes_of(interface["inputs"]), settings, threads, count)


def load_compiled(inputs: Paths, settings: Settings, threads: int, count: int) -> Loaded:
    """The network as torch.compile compiles it, for each batch, in the precision and memory format that PyTorch serves.

    Triton cannot serve it. Without CUDA graphs, a compiled function keeps no state, so all instances share it.
    """
    import torch

    from build_tasks.formats.torchscript_graph import DTYPES, MEMORY_FORMATS

    module, interface = _create_network(inputs, settings)
    device, dtype = _device(settings), DTYPES[settings["precision"]]
    layout = MEMORY_FORMATS[settings["memory_format"]]
    module = module.to(device, dtype).to(memory_format=layout)
    pictures = [each["layout"] == "nchw" for each in interface["inputs"]]

    def forward(*tensors: "torch.Tensor") -> Any:
        cast = [each.to(dtype) if each.is_floating_point() else each for each in tensors]
        laid_out = [
            each.contiguous(memory_format=layout) if is_picture else each
            for each, is_picture in zip(cast, pictures, strict=True)
        ]
        return torch.utils._pytree.tree_map(
            lambda answer: answer.float() if answer.dtype == dtype else answer, module(*laid_out)
        )

    # Each batch is a compilation; beyond the limit PyTorch would not compile.
    options: dict[str, Any] = {"recompile_limit": sys.maxsize}  # torch's annotations lack it
    compiled: Any = torch.compile(forward, dynamic=False, **options)
    return _as_instances([compiled] * count, device, dtypes_of(interface["inputs"]), threads)


def _create_network(inputs: Paths, settings: Settings) -> "tuple[torch.nn.Module, Interface]":
    """The network with the interface of the spec."""
    from build_tasks.formats import pytorch_network
    from build_tasks.formats.serving_interface import resolve_interface, wrap_for_serving

    network = pytorch_network.create_network(settings["network"], inputs["weights"])
    interface = resolve_interface(network, settings["interface"])
    return wrap_for_serving(network, interface), interface


def load_aoti(inputs: Paths, settings: Settings, threads: int, count: int) -> Loaded:
    """Packages of AOTInductor, each loaded for itself, on the device that they are for."""
    from build_tasks.formats.aoti_package import load_package

    signature = read_signature(inputs)
    device = "cuda" if signature["device"] == "gpu" else "cpu"
    packages = [load_package(inputs["model"]) for _ in range(count)]
    return _as_instances(packages, device, _input_dtypes(inputs), threads)


def _device(settings: Settings) -> str:
    """The GPU if PyTorch sees one and [triton] allows it."""
    import torch

    return "cuda" if settings["device"] != "cpu" and torch.cuda.is_available() else "cpu"


def _load_modules(data: bytes, dtypes: dict[str, str], settings: Settings, threads: int, count: int) -> Loaded:
    """Copies of a TorchScript module."""
    import torch

    device = _device(settings)
    copies = [torch.jit.load(io.BytesIO(data), map_location=device).eval() for _ in range(count)]
    return _as_instances(copies, device, dtypes, threads)


def _as_instances(modules: list[Any], device: str, dtypes: dict[str, str], threads: int) -> Loaded:
    """Modules that PyTorch runs, each as an instance.

    Args:
        modules: Functions from the inputs, in their order, to the outputs, on the device.
        device: "cpu" or "cuda".
        dtypes: NumPy's type of each input, by its name.
        threads: Threads of each instance.
    """
    import torch

    def instance(module: Any) -> Instance:
        def prepare(feed: Feed) -> Request:
            torch.set_num_threads(threads)  # each thread has an OpenMP team of its own
            example = [torch.from_numpy(feed[name]).to(device) for name in dtypes]
            if device == "cpu":
                return wall_clock_request(lambda: run(module, example))
            stream = torch.cuda.Stream()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()  # the example was copied on another stream

            def request() -> float:
                with torch.cuda.stream(stream):
                    before.record()
                    run(module, example)
                    after.record()
                after.synchronize()
                return float(before.elapsed_time(after)) / 1e3

            return request

        return prepare

    def run(module: Any, example: "list[torch.Tensor]") -> None:
        with torch.inference_mode():
            module(*example)

    timed_by = WALL_CLOCK if device == "cpu" else CUDA_EVENTS
    return Loaded([instance(module) for module in modules], device, timed_by, dtypes)


def load_onnx(inputs: Paths, settings: Settings, threads: int, count: int) -> Loaded:
    """Sessions of ONNX Runtime, on the GPU if it has the CUDA provider.

    A run with the CUDA provider ends when the outputs are complete.
    """
    import onnxruntime

    cuda = "CUDAExecutionProvider"
    on_gpu = settings["device"] != "cpu" and cuda in onnxruntime.get_available_providers()

    def instance() -> Instance:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        providers = [*([cuda] if on_gpu else []), "CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(onnx_file(inputs["model"]), options, providers=providers)

        def prepare(feed: Feed) -> Request:
            if not on_gpu:
                run = ragged_batches.run_of(session)
                return wall_clock_request(lambda: run(feed))
            binding = session.io_binding()
            for name, array in feed.items():
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
            for output in session.get_outputs():
                binding.bind_output(output.name, "cuda")
            return wall_clock_request(lambda: session.run_with_iobinding(binding))

        return prepare

    device = "cuda" if on_gpu else "cpu"
    return Loaded([instance() for _ in range(count)], device, WALL_CLOCK, _input_dtypes(inputs))


def load_plan(inputs: Paths, settings: Settings, threads: int, count: int) -> Loaded:
    """Execution contexts of a plan of TensorRT."""
    return _load_contexts(inputs, count, rtx=False)


def load_rtx(inputs: Paths, settings: Settings, threads: int, count: int) -> Loaded:
    """Execution contexts of an engine of TensorRT-RTX."""
    return _load_contexts(inputs, count, rtx=True)


def _load_contexts(inputs: Paths, count: int, rtx: bool) -> Loaded:
    """Execution contexts of an engine.

    Raises:
        UserError: If this machine cannot load the engine.
    """
    import polygraphy.config

    polygraphy.config.USE_TENSORRT_RTX = rtx
    from build_tasks.formats.tensorrt_context import ExecutionContext

    signature = read_signature(inputs)
    instances: list[Instance] = [ExecutionContext(inputs["model"], signature).prepare_request for _ in range(count)]
    return Loaded(instances, "cuda", CUDA_EVENTS, _input_dtypes(inputs))


def _input_dtypes(inputs: Paths) -> dict[str, str]:
    return dtypes_of(read_signature(inputs)["inputs"])


def dtypes_of(inputs: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """NumPy's type of each input, by its name.

    Args:
        inputs: Those of a signature or, where there is no artifact, of an interface.
    """
    return {tensor["name"]: tensor["dtype"] for tensor in inputs}


def wall_clock_request(run: Callable[[], object]) -> Request:
    """A request that is timed by the clock, around a function that returns when the outputs are complete."""

    def request() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return request


LOADERS: dict[str, Callable[[Paths, Settings, int, int], Loaded]] = {
    TRACE: load_trace,
    COMPILED: load_compiled,
    "torchscript": load_torchscript,
    "onnx": load_onnx,
    "tensorrt": load_plan,
    "rtx": load_rtx,
    "aoti": load_aoti,
}
