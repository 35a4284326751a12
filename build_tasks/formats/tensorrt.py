"""Engines of TensorRT and TensorRT-RTX: how they are compiled. Both libraries share an API.

    model.onnx ─► parser ─► network ─► builder, with optimization profiles and a timing cache ─► engine, signature

Polygraphy chooses the library. Import this module only in the process of a stage, after
`polygraphy.config.USE_TENSORRT_RTX` was set to select one of the two.
"""

import os
import re
import textwrap
from typing import TYPE_CHECKING, Any

from polygraphy import config as polygraphy
from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile, create_network, engine_bytes_from_network
from polygraphy.backend.trt.util import get_trt_logger
from polygraphy.exception import PolygraphyException
from polygraphy.mod.trt_importer import lazy_import_trt

from build_tasks.errors import UserError, first_lines
from build_tasks.formats.onnx_files import onnx_file
from build_tasks.runtime import progress
from build_tasks.runtime.stage import Settings
from build_tasks.tensors import OptimizationProfile, ProfileShapes, Shape, Signature, TensorSignature, profile_shapes

if TYPE_CHECKING:
    import tensorrt as trt
else:
    trt = lazy_import_trt()

os.environ.setdefault(
    "CUDA_DEVICE_ORDER", "PCI_BUS_ID"
)  # the order of NVML, by which runtime/hardware.py finds the GPU

MIB = 1 << 20
MAX_PARSER_ERRORS = 3  # maximum number of parser errors in a message


def library_name() -> str:
    """Return the name and the version of the library, for messages."""
    return f"TensorRT{'-RTX' if polygraphy.USE_TENSORRT_RTX else ''} {trt.__version__}"


class ErrorRecorder(trt.IErrorRecorder):
    """Keeps the errors that the library reports, which would otherwise only be in its log."""

    def __init__(self) -> None:
        trt.IErrorRecorder.__init__(self)
        self.errors: list[tuple[trt.ErrorCodeTRT, str]] = []

    def num_errors(self) -> int:
        return len(self.errors)

    def get_error_code(self, index: int) -> "trt.ErrorCodeTRT":
        return self.errors[index][0]

    def get_error_desc(self, index: int) -> str:
        return self.errors[index][1]

    def has_overflowed(self) -> bool:
        return False

    def clear(self) -> None:
        self.errors.clear()

    def report_error(self, code: "trt.ErrorCodeTRT", description: str) -> bool:
        self.errors.append((code, description))
        return False  # the library continues, and the caller handles the failure

    def last_error(self) -> str:
        """Return the last error, which is why the library gave up, without the location in its source."""
        text = first_lines(Exception(self.errors[-1][1]))
        return re.sub(r"^\[[^]]*\]\s*|^\w+::\w+:\s*|\s*In \w+ at .*$", "", text).strip(" ()")


class BuildProgress(trt.IProgressMonitor):
    """Writes the phases of the builder to the log and sends them to the terminal. The builder nests phases."""

    def __init__(self) -> None:
        trt.IProgressMonitor.__init__(self)
        self.steps: dict[str, int] = {}  # number of finished steps by phase

    def phase_start(self, phase: str, parent: str, steps: int) -> None:
        self.steps[phase] = steps
        progress.emit(progress.Progress(phase, 0, steps, "steps"))

    def step_complete(self, phase: str, step: int) -> bool:
        progress.emit(progress.Progress(phase, step + 1, self.steps.get(phase), "steps"))
        return True  # continue

    def phase_finish(self, phase: str) -> None:
        print(f"{phase}: {self.steps.pop(phase, 0)} steps", flush=True)


def compile_engine(path: str, settings: Settings, timing_cache: str) -> tuple[bytes, Signature]:
    """Compile an ONNX graph and return the engine and its signature.

    Args:
        path: The graph.
        settings: The settings of the engine stage.
        timing_cache: A file that is read if it exists, and is written.
    Raises:
        UserError: If the library refuses the graph or the settings.
    """
    # TensorRT 11 has strongly typed networks only and may remove the flag.
    strongly_typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    builder, network = create_network(strongly_typed=strongly_typed)
    recorder = ErrorRecorder()
    builder.error_recorder = recorder
    parser = parse_graph(network, path)
    profiles = optimization_profiles(network, settings)
    monitor = BuildProgress()  # a variable, because the builder holds no reference to it
    try:
        config = builder_config(profiles, settings, timing_cache, monitor)
        engine = engine_bytes_from_network((builder, network, parser), config, save_timing_cache=timing_cache)
    except PolygraphyException as error:
        raise UserError(build_error_message(recorder, error)) from error
    return bytes(engine), {**network_tensors(network), "profiles": [each for each in profiles if each]}


def parse_graph(network: "trt.INetworkDefinition", path: str) -> "trt.OnnxParser":
    """Parse an ONNX graph into the network and return the parser, which holds the weights of the network.

    Raises:
        UserError: If the graph cannot be parsed.
    """
    parser = trt.OnnxParser(network, get_trt_logger())
    if not parser.parse_from_file(onnx_file(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        messages = [parser_error_message(error) for error in errors[:MAX_PARSER_ERRORS]]
        raise UserError("; ".join(messages) or f"{library_name()} cannot parse {path}")
    return parser


def parser_error_message(error: "trt.ParserError") -> str:
    """Return a message with the node that the parser refuses, and a remedy."""
    node = f"operator {error.node_operator()} (node {error.node_name()})"
    if error.code() == trt.ErrorCode.UNSUPPORTED_NODE or "Plugin not found" in error.desc():
        return (
            f'{library_name()} has no {node}: try another onnx.opset, onnx.exporter = "dynamo", or arguments of the '
            "architecture that avoid it"
        )
    return f"{library_name()} refuses {node}: {first_lines(Exception(error.desc()))} ({error.func()})"


def optimization_profiles(network: "trt.INetworkDefinition", settings: Settings) -> list[dict[str, ProfileShapes]]:
    """Return the min, opt and max shapes of each input with open dimensions, for each profile of the spec.

    Raises:
        UserError: If the batch sizes of the spec contradict the graph.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    return [_profile_shapes(inputs, each, settings["open_inputs"]) for each in settings["profiles"]]


def _profile_shapes(
    inputs: "list[trt.ITensor]", profile: OptimizationProfile, open_inputs: dict[str, Shape]
) -> dict[str, ProfileShapes]:
    shapes: dict[str, ProfileShapes] = {}
    batch = profile["batch"]
    batches = batch["min"], batch["opt"], batch["max"]
    for tensor in inputs:
        shape = dims_of(tensor.shape)
        if shape[0] != -1 and set(batches) != {shape[0]}:
            raise UserError(
                f"the graph has a fixed batch of {shape[0]}, and the engine's profile asks for "
                f"{', '.join(map(str, batches))}; set onnx.dynamic_axes = true, or leave the batch sizes out"
            )
        if -1 in shape:
            shapes[tensor.name] = profile_shapes(profile, open_inputs.get(tensor.name, [*shape[1:]]))
    return shapes


def builder_config(
    profiles: list[dict[str, ProfileShapes]], settings: Settings, timing_cache: str, monitor: BuildProgress
) -> Any:
    """Return Polygraphy's loader of the builder's configuration."""
    options: dict[str, Any] = {
        "profiles": [_polygraphy_profile(each) for each in profiles],
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

        options["compute_capabilities"] = compute_capabilities(settings["rtx_compute_capabilities"])
        loader = CreateConfigRTX(**options)
    else:
        if settings["hardware_compatibility"] != "none":
            level = settings["hardware_compatibility"].upper()
            options["hardware_compatibility_level"] = getattr(trt.HardwareCompatibilityLevel, level)
        loader = CreateConfig(**options, version_compatible=settings["version_compatible"])

    def set_other_options(
        builder: "trt.Builder", network: "trt.INetworkDefinition", config: "trt.IBuilderConfig"
    ) -> None:
        """Set properties for which Polygraphy has no option, at least with TensorRT-RTX.

        The TF32 flag is set or cleared in every case: it is on by default in TensorRT, and off in Polygraphy.
        """
        config.progress_monitor = monitor
        if settings["precision"] == "tf32":
            config.set_flag(trt.BuilderFlag.TF32)
        else:
            config.clear_flag(trt.BuilderFlag.TF32)

    return PostprocessConfig(loader, set_other_options)


def _polygraphy_profile(shapes: dict[str, ProfileShapes]) -> Profile:
    profile = Profile()
    for tensor, points in shapes.items():
        profile.add(tensor, tuple(points["min"]), tuple(points["opt"]), tuple(points["max"]))
    return profile


def compute_capabilities(requested: list[str]) -> list[tuple[int, int]] | None:
    """Return compute capabilities as (major, minor), Polygraphy's form. None for all.

    Raises:
        UserError: If TensorRT-RTX does not have one of them.
    """
    members = trt.ComputeCapability.__members__  # type: ignore[attr-defined]  # TensorRT-RTX has no stubs
    valid = {member.removeprefix("SM") for member in members if member.startswith("SM")}
    for capability in requested:
        if capability.replace(".", "") not in valid:
            names = sorted((f"{number[:-1]}.{number[-1]}" for number in valid), key=float)
            raise UserError(
                f"engine.rtx_compute_capabilities: {library_name()} knows {', '.join(names)}, and not {capability}"
            )
    pairs = [capability.split(".") for capability in requested]
    return [(int(major), int(minor)) for major, minor in pairs] or None


def build_error_message(recorder: ErrorRecorder, failure: PolygraphyException) -> str:
    """Return a message with the reason why no engine was built, and the key of the spec to change."""
    text = " ".join(description for _, description in recorder.errors)
    if re.search(r"OutOfMemory|out of memory|insufficient memory|workspace", text, re.IGNORECASE):
        quoted = textwrap.shorten(recorder.last_error(), 120, placeholder=" …")  # leaves room for the advice
        return (
            f"{library_name()} ran out of memory ({quoted}): raise engine.workspace or leave it out, "
            "lower engine.max_batch_size or engine.optimization_level, or free the GPU"
        )
    reason = recorder.last_error() if recorder.errors else first_lines(failure)
    return f"{library_name()} cannot build the engine: {reason}"


def network_tensors(network: "trt.INetworkDefinition") -> Signature:
    """Return the inputs and outputs of a network, as in the signature of its engine."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return {
        "inputs": [tensor_signature(tensor.name, tensor.dtype, tensor.shape) for tensor in inputs],
        "outputs": [tensor_signature(tensor.name, tensor.dtype, tensor.shape) for tensor in outputs],
    }


def tensor_signature(name: str, dtype: "trt.DataType", shape: "trt.Dims") -> TensorSignature:
    import numpy as np

    return {"name": name, "dtype": str(np.dtype(trt.nptype(dtype)).name), "shape": dims_of(shape)}


def dims_of(shape: "trt.Dims") -> list[int]:
    """Return a shape as a list; -1 for an open dimension."""
    return [shape[axis] for axis in range(len(shape))]
