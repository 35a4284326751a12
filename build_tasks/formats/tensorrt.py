"""TensorRT and TensorRT-RTX behind one door: they share an API, and Polygraphy picks the library.

Imported only in the process of a stage, after `polygraphy.config.USE_TENSORRT_RTX` says which of the two it is.
"""

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from polygraphy import config as polygraphy
from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile, create_network, engine_bytes_from_network
from polygraphy.backend.trt.util import get_trt_logger
from polygraphy.exception import PolygraphyException
from polygraphy.mod.trt_importer import lazy_import_trt

from build_tasks.errors import UserError, first_lines
from build_tasks.formats.onnx_files import onnx_file
from build_tasks.runtime import progress
from build_tasks.tensors import INPUT, layout_dims

if TYPE_CHECKING:
    import numpy as np
    import tensorrt as trt
else:
    trt = lazy_import_trt()

os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # NVML's order, by which machine.py names the GPU

Settings = dict[str, Any]
Signature = dict[str, Any]

MIB = 1 << 20


def library_name() -> str:
    return f"TensorRT{'-RTX' if polygraphy.USE_TENSORRT_RTX else ''} {trt.__version__}"


class Errors(trt.IErrorRecorder):
    """What the library reports as errors, which otherwise only its log would tell."""

    def __init__(self) -> None:
        trt.IErrorRecorder.__init__(self)
        self.found: list[tuple[trt.ErrorCodeTRT, str]] = []

    def num_errors(self) -> int:
        return len(self.found)

    def get_error_code(self, index: int) -> "trt.ErrorCodeTRT":
        return self.found[index][0]

    def get_error_desc(self, index: int) -> str:
        return self.found[index][1]

    def has_overflowed(self) -> bool:
        return False

    def clear(self) -> None:
        self.found.clear()

    def report_error(self, code: "trt.ErrorCodeTRT", description: str) -> bool:
        self.found.append((code, description))
        return False  # go on, and let the caller decide


class Phases(trt.IProgressMonitor):
    """What the builder is at, for the log and whoever is watching. It has several phases at once, nested."""

    def __init__(self) -> None:
        trt.IProgressMonitor.__init__(self)
        self.steps: dict[str, int] = {}

    def phase_start(self, phase: str, parent: str, steps: int) -> None:
        self.steps[phase] = steps
        progress.emit(progress.Progress(phase, 0, steps, "steps"))

    def step_complete(self, phase: str, step: int) -> bool:
        progress.emit(progress.Progress(phase, step + 1, self.steps.get(phase), "steps"))
        return True  # go on

    def phase_finish(self, phase: str) -> None:
        print(f"{phase}: {self.steps.pop(phase, 0)} steps", flush=True)


def compile_engine(path: str, settings: Settings, timing_cache: str) -> tuple[bytes, Signature]:
    """The engine of an ONNX graph, and its signature. UserError for what the library refuses.

    timing_cache: a file that is read where it exists, and written.
    """
    # TensorRT 11 may drop the flag: it knows no other networks.
    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    builder, network = create_network(strongly_typed=typed)
    errors = Errors()
    builder.error_recorder = errors
    parser = parsed(network, path)
    profile = shapes(network, settings)
    phases = Phases()  # which the builder only refers to
    try:
        options = configuration(profile, settings, timing_cache, phases)
        engine = engine_bytes_from_network((builder, network, parser), options, save_timing_cache=timing_cache)
    except PolygraphyException as error:
        raise UserError(plain(errors, error)) from error
    return bytes(engine), {**tensors(network), "profile": profile}


def parsed(network: "trt.INetworkDefinition", path: str) -> "trt.OnnxParser":
    """The parser, which keeps the weights of the network. UserError for a graph that cannot be parsed."""
    parser = trt.OnnxParser(network, get_trt_logger())
    if not parser.parse_from_file(onnx_file(path)):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        raise UserError("; ".join(unsupported(error) for error in found[:3]) or f"{library_name()} cannot parse {path}")
    return parser


def unsupported(error: "trt.ParserError") -> str:
    """A node that the parser refuses, and what to try."""
    node = f"operator {error.node_operator()} (node {error.node_name()})"
    if error.code() == trt.ErrorCode.UNSUPPORTED_NODE or "Plugin not found" in error.desc():
        return (
            f'{library_name()} has no {node}: try another onnx.opset, onnx.exporter = "dynamo", or arguments of the '
            "architecture that avoid it"
        )
    return f"{library_name()} refuses {node}: {first_lines(Exception(error.desc()))} ({error.func()})"


def shapes(network: "trt.INetworkDefinition", settings: Settings) -> dict[str, dict[str, list[int]]]:
    """The optimisation profile of each input with open dimensions: its min, opt and max shapes.

    UserError where the spec's sizes contradict the graph.
    """
    profile = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = extents(tensor.shape)
        batches = {point: settings[f"{point}_batch_size"] for point in ("min", "opt", "max")}
        if shape[0] != -1 and set(batches.values()) != {shape[0]}:
            raise UserError(
                f"the graph has a fixed batch of {shape[0]}, and the engine's profile asks for "
                f"{', '.join(map(str, batches.values()))}; set onnx.dynamic_axes = true, or leave the batch sizes out"
            )
        sizes = dict.fromkeys(batches, shape[1:])
        if settings["sizes"]:
            (small, large), (channels, *own) = settings["sizes"], settings["shape"]
            sizes = {
                point: layout_dims([channels, *size], settings["format"])
                for point, size in (("min", small), ("opt", own), ("max", large))
            }
        if -1 in shape:
            profile[tensor.name] = {point: [batch, *sizes[point]] for point, batch in batches.items()}
    return profile


def configuration(
    profile: dict[str, dict[str, list[int]]], settings: Settings, timing_cache: str, phases: Phases
) -> Any:
    """The loader of the builder's configuration."""
    points = Profile()
    for tensor, shape in profile.items():
        points.add(tensor, tuple(shape["min"]), tuple(shape["opt"]), tuple(shape["max"]))
    options: dict[str, Any] = {
        "profiles": [points],
        "load_timing_cache": timing_cache,
        "builder_optimization_level": settings["optimization_level"],
        "sparse_weights": settings["sparse_weights"],
        "refittable": settings["refittable"],
        "strip_plan": settings["strip_plan"],
        "profiling_verbosity": getattr(trt.ProfilingVerbosity, settings["profiling_verbosity"].upper()),
    }
    if settings["workspace"] is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: settings["workspace"] * MIB}
    if polygraphy.USE_TENSORRT_RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        options["compute_capabilities"] = capabilities(settings["rtx_compute_capabilities"])
        loader = CreateConfigRTX(**options)
    else:
        if settings["hardware_compatibility"] != "none":
            level = settings["hardware_compatibility"].upper()
            options["hardware_compatibility_level"] = getattr(trt.HardwareCompatibilityLevel, level)
        loader = CreateConfig(**options, version_compatible=settings["version_compatible"])

    def more(builder: "trt.Builder", network: "trt.INetworkDefinition", config: "trt.IBuilderConfig") -> None:
        """What Polygraphy has no option for, at least with TensorRT-RTX.

        TF32 is said either way: TensorRT's default is on, Polygraphy's off.
        """
        config.progress_monitor = phases
        if settings["precision"] == "tf32":
            config.set_flag(trt.BuilderFlag.TF32)
        else:
            config.clear_flag(trt.BuilderFlag.TF32)

    return PostprocessConfig(loader, more)


def capabilities(wanted: list[str]) -> list[tuple[int, int]] | None:
    """The compute capabilities as Polygraphy takes them, None for all. UserError for one that TensorRT-RTX lacks."""
    members = trt.ComputeCapability.__members__  # type: ignore[attr-defined]  # of TensorRT-RTX, which has no stubs
    known = {member.removeprefix("SM") for member in members if member.startswith("SM")}
    for capability in wanted:
        if capability.replace(".", "") not in known:
            names = sorted((f"{number[:-1]}.{number[-1]}" for number in known), key=float)
            raise UserError(
                f"engine.rtx_compute_capabilities: {library_name()} knows {', '.join(names)}, and not {capability}"
            )
    pairs = [capability.split(".") for capability in wanted]
    return [(int(major), int(minor)) for major, minor in pairs] or None


def plain(errors: Errors, failure: PolygraphyException) -> str:
    """Why no engine was built, in the user's words."""
    said = " ".join(description for _, description in errors.found)
    if re.search(r"OutOfMemory|out of memory|insufficient memory|workspace", said, re.IGNORECASE):
        return (
            f"{library_name()} ran out of memory ({detail(errors)}): raise engine.workspace or leave it out, lower "
            "engine.max_batch_size or engine.optimization_level, or free the GPU"
        )
    return f"{library_name()} cannot build the engine: {detail(errors) if errors.found else first_lines(failure)}"


def detail(errors: Errors) -> str:
    """The library's last error, which is why it gave up, without the place in its source."""
    text = re.sub(r"^\[[^]]*\]\s*|^\w+::\w+:\s*|\s*In \w+ at .*$", "", first_lines(Exception(errors.found[-1][1])))
    return text.strip(" ()")


def engine_session(path: str, signature: Signature) -> "Callable[[np.ndarray], list[np.ndarray]]":
    """A plan on this machine's GPU, as a function from a batch to its outputs. UserError for one that it cannot run."""
    from polygraphy.backend.trt import EngineFromPath, TrtRunner

    try:
        engine: trt.ICudaEngine = EngineFromPath(path)()
        runner = TrtRunner(engine)
        runner.activate()  # until the process of the stage ends
    except (PolygraphyException, RuntimeError) as error:  # the second where there is no CUDA
        raise UserError(
            f"{library_name()} cannot run {path}, which TensorRT {signature['TensorRT']} built for {signature['GPU']}: "
            f"{first_lines(error)}"
        ) from error
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    expected = {tensor["name"]: tensor for tensor in (*signature["inputs"], *signature["outputs"])}
    found = {
        name: {
            "name": name,
            "dtype": dtype(engine.get_tensor_dtype(name)),
            "shape": extents(engine.get_tensor_shape(name)),
        }
        for name in names
    }
    if found != expected:
        raise UserError(f"{path} has other tensors than its signature says: {found}, not {expected}")
    wanted = signature["inputs"][0]["dtype"]
    outputs = [tensor["name"] for tensor in signature["outputs"]]

    def run(batch: "np.ndarray") -> "list[np.ndarray]":
        answers = runner.infer({INPUT: batch.astype(wanted)})
        return [answers[name].copy() for name in outputs]  # the next call fills the same buffers

    return run


def tensors(network: "trt.INetworkDefinition") -> dict[str, list[dict[str, Any]]]:
    """Name, NumPy's dtype and shape of each input and output; -1 for an open dimension."""

    def tensor(value: "trt.ITensor") -> dict[str, Any]:
        return {"name": value.name, "dtype": dtype(value.dtype), "shape": extents(value.shape)}

    return {
        "inputs": [tensor(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [tensor(network.get_output(index)) for index in range(network.num_outputs)],
    }


def extents(shape: "trt.Dims") -> list[int]:
    return [shape[axis] for axis in range(len(shape))]


def dtype(value: "trt.DataType") -> str:
    import numpy as np

    return str(np.dtype(trt.nptype(value)).name)
