"""Checks of ModelConfig's `optimization`. Each backend reads a part of it, and the core checks none of it."""

from collections.abc import Iterator
from typing import Any

from build_tasks.errors import with_suggestion
from build_tasks.triton import releases
from build_tasks.triton.model_config import Mistake, shorten
from build_tasks.triton.parameter_checks import (
    BYTES,
    COUNT,
    COUNT_OR_DEFAULT,
    TEXT,
    Parameter,
    expected_value,
)
from build_tasks.triton.serving_facts import ServingFacts

# ONNX Runtime reads these booleans itself.
BOOLEAN = ("1", "0", "true", "false", "True", "False")

# fmt: off
# Until release 24.03 the TensorRT accelerator read these parameters only.
FIRST_TENSORRT_PARAMETERS = {
    "precision_mode": Parameter(("FP32", "FP16", "BF16", "INT8")), "max_workspace_size_bytes": Parameter(BYTES),
    "int8_calibration_table_name": Parameter(TEXT), "int8_use_native_calibration_table": Parameter(BOOLEAN),
    "trt_engine_cache_enable": Parameter(BOOLEAN), "trt_engine_cache_path": Parameter(TEXT),
}
TENSORRT_PARAMETERS: dict[str, str | range | tuple[str, ...]] = {
    "trt_max_partition_iterations": COUNT, "trt_min_subgraph_size": COUNT, "trt_dla_enable": BOOLEAN,
    "trt_dla_core": COUNT_OR_DEFAULT, "trt_engine_cache_prefix": TEXT, "trt_dump_subgraphs": BOOLEAN,
    "trt_force_sequential_engine_build": BOOLEAN, "trt_context_memory_sharing_enable": BOOLEAN,
    "trt_layer_norm_fp32_fallback": BOOLEAN, "trt_timing_cache_enable": BOOLEAN, "trt_timing_cache_path": TEXT,
    "trt_force_timing_cache": BOOLEAN, "trt_detailed_build_log": BOOLEAN, "trt_build_heuristics_enable": BOOLEAN,
    "trt_sparsity_enable": BOOLEAN, "trt_builder_optimization_level": range(6), "trt_auxiliary_streams": range(-1, 100),
    "trt_tactic_sources": TEXT, "trt_extra_plugin_lib_paths": TEXT, "trt_profile_min_shapes": TEXT,
    "trt_profile_max_shapes": TEXT, "trt_profile_opt_shapes": TEXT, "trt_cuda_graph_enable": BOOLEAN,
    "trt_dump_ep_context_model": BOOLEAN, "trt_ep_context_file_path": TEXT, "trt_ep_context_embed_mode": range(2),
}
# fmt: on

# Parameters of ONNX Runtime's accelerators. None: the backend passes all parameters on to ONNX Runtime.
# Source: onnxruntime_backend, src/onnxruntime.cc, in the branches r23.10 to r26.06.
ACCELERATORS: dict[str, dict[str, dict[str, Parameter] | None]] = {
    "gpu_execution_accelerator": {
        "tensorrt": {
            **FIRST_TENSORRT_PARAMETERS,
            **{name: Parameter(values, since="24.04") for name, values in TENSORRT_PARAMETERS.items()},
        },
        "cuda": None,
    },
    "cpu_execution_accelerator": {"openvino": {}},
}
STRONGLY_TYPED_MAJOR = 11  # the first TensorRT without flags for the precision
CUDA_SINCE = "24.06"  # the first release with the accelerator "cuda"
BF16_MODE_SINCE = "26.02"  # the first release with precision_mode BF16
GRAPH_LEVELS = {-1: "basic", 0: "all", 1: "extended", 2: "none"}  # optimization levels of ONNX Runtime


def mistakes(facts: ServingFacts, model_format: str, config: Any, fields: dict[str, Any]) -> Iterator[Mistake]:
    """Yield fields that the backend of a model format does not read, and values that it does not know.

    Args:
        config: The ModelConfig of the fields, with its max_batch_size.
        fields: The fields as the spec has them.
    """
    optimization = config.optimization
    if optimization.HasField("cuda"):
        yield from _cuda(facts, model_format, config, fields["optimization"]["cuda"])
    if optimization.HasField("graph"):
        level = optimization.graph.level
        if model_format != "onnx":
            expected = f"nothing in {model_format}, since only ONNX Runtime's backend reads it"
            yield "optimization.graph", expected, f"level = {level}"
        elif level not in GRAPH_LEVELS:
            levels = ", ".join(f"{number} ({name})" for number, name in GRAPH_LEVELS.items())
            yield "optimization.graph.level", f"one of {levels}", repr(level)
    for device, accelerators in ACCELERATORS.items():
        entries = list(getattr(optimization.execution_accelerators, device))
        key = f"optimization.execution_accelerators.{device}"
        names = repr(", ".join(entry.name for entry in entries))
        if entries and model_format != "onnx":
            yield key, f"nothing in {model_format}, since only ONNX Runtime's backend has accelerators", names
        elif entries and device.startswith("gpu") and facts.device == "cpu":
            yield key, 'nothing, since triton.device = "cpu"', names
        else:
            for index, entry in enumerate(entries):
                yield from _accelerator(facts, f"{key}[{index}]", entry, accelerators)


def _cuda(facts: ServingFacts, model_format: str, config: Any, table: Any) -> Iterator[Mistake]:
    key, cuda = "optimization.cuda", config.optimization.cuda
    if model_format != "tensorrt":
        yield key, f"nothing in {model_format}, since only TensorRT's backend reads it", shorten(table)
        return
    if cuda.graph_spec and not cuda.graphs:
        yield f"{key}.graph_spec", "nothing, since graphs = false", f"{len(cuda.graph_spec)} of them"
    smallest, largest = (facts.profile[0], config.max_batch_size) if config.max_batch_size else (0, 0)
    for index, spec in enumerate(cuda.graph_spec):
        if not smallest <= spec.batch_size <= largest:
            expected = f"{smallest} to {largest}, the batches of the engine" if largest else "0, since it is fixed"
            yield f"{key}.graph_spec[{index}].batch_size", expected, repr(spec.batch_size)


def _accelerator(
    facts: ServingFacts, key: str, entry: Any, accelerators: dict[str, dict[str, Parameter] | None]
) -> Iterator[Mistake]:
    if entry.name not in accelerators:
        yield f"{key}.name", f"one of {', '.join(accelerators)}", with_suggestion(entry.name, accelerators)
        return
    if entry.name == "cuda" and facts.release < CUDA_SINCE:
        expected = f"tensorrt, since Triton {facts.release} does not know cuda ({CUDA_SINCE} and newer do)"
        yield f"{key}.name", expected, repr(entry.name)
    parameters = accelerators[entry.name]
    for name, value in sorted(entry.parameters.items()):
        if parameters is None:
            continue
        if name not in parameters:
            yield f"{key}.parameters", f"parameters of {entry.name}", with_suggestion(name, sorted(parameters))
        elif expected_text := (
            _expected_precision(facts.release, name, value) or expected_value(facts, parameters[name], value)
        ):
            yield f"{key}.parameters.{name}", expected_text, repr(value)


def _expected_precision(release: str, name: str, value: str) -> str | None:
    """Return what is expected of a parameter that sets the precision. None if its value is right.

    TensorRT 11 takes the precision from the graph alone. Source: onnxruntime#28611.
    """
    has_flags = releases.tensorrt_major(release) < STRONGLY_TYPED_MAJOR
    if not has_flags and (name.startswith("int8_") or (name == "precision_mode" and value in ("FP16", "BF16", "INT8"))):
        return (
            f"{'FP32' if name == 'precision_mode' else 'nothing'}, since TensorRT 11 of Triton {release} takes the "
            f"precision from the graph alone, which onnx.precision sets"
        )
    if name == "precision_mode" and value == "BF16" and release < BF16_MODE_SINCE:
        return f"FP32, FP16 or INT8, since Triton {release} does not know BF16 ({BF16_MODE_SINCE} and newer do)"
    return None
