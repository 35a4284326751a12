"""Checks of ModelConfig's `optimization`. Each backend reads a part of it, and the core checks none of it."""

from collections.abc import Iterator
from typing import Any

from build_tasks.errors import with_suggestion
from build_tasks.triton.model_config import Mistake, shorten
from build_tasks.triton.serving_facts import ServingFacts

# Parameters of ONNX Runtime's accelerators. None: the backend passes all parameters on to ONNX Runtime.
# Source: onnxruntime_backend, src/onnxruntime.cc.
ACCELERATORS: dict[str, dict[str, set[str] | None]] = {
    "gpu_execution_accelerator": {
        "tensorrt": {
            "precision_mode", "max_workspace_size_bytes", "int8_calibration_table_name",
            "int8_use_native_calibration_table", "trt_max_partition_iterations", "trt_min_subgraph_size",
            "trt_dla_enable", "trt_dla_core", "trt_engine_cache_enable", "trt_engine_cache_path",
            "trt_engine_cache_prefix", "trt_dump_subgraphs", "trt_force_sequential_engine_build",
            "trt_context_memory_sharing_enable", "trt_layer_norm_fp32_fallback", "trt_timing_cache_enable",
            "trt_timing_cache_path", "trt_force_timing_cache", "trt_detailed_build_log",
            "trt_build_heuristics_enable", "trt_sparsity_enable", "trt_builder_optimization_level",
            "trt_auxiliary_streams", "trt_tactic_sources", "trt_extra_plugin_lib_paths", "trt_profile_min_shapes",
            "trt_profile_max_shapes", "trt_profile_opt_shapes", "trt_cuda_graph_enable", "trt_dump_ep_context_model",
            "trt_ep_context_file_path", "trt_ep_context_embed_mode",
        },
        "cuda": None,
    },
    "cpu_execution_accelerator": {"openvino": set()},
}  # fmt: skip
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
                yield from _accelerator(f"{key}[{index}]", entry, accelerators)


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


def _accelerator(key: str, entry: Any, accelerators: dict[str, set[str] | None]) -> Iterator[Mistake]:
    if entry.name not in accelerators:
        yield f"{key}.name", f"one of {', '.join(accelerators)}", with_suggestion(entry.name, accelerators)
        return
    parameters = accelerators[entry.name]
    for parameter in sorted(entry.parameters):
        if parameters is not None and parameter not in parameters:
            found = with_suggestion(parameter, sorted(parameters))
            yield f"{key}.parameters", f"parameters of {entry.name}", found
