"""What each of Triton's backends reads of ModelConfig's `optimization`, of which the core checks nothing."""

from collections.abc import Iterator
from typing import Any

from build_tasks.errors import with_suggestion
from build_tasks.spec.model import Model
from build_tasks.triton.model_config import Mistake, short

# Parameters of ONNX Runtime's accelerators; those of CUDA go to ONNX Runtime as they are.
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
GRAPH_LEVELS = {-1: "basic", 0: "all", 1: "extended", 2: "none"}  # of ONNX Runtime's optimisations


def mistakes(model: Model, model_format: str, config: Any, given: dict[str, Any]) -> Iterator[Mistake]:
    optimisation, at = config.optimization, "optimization"
    if optimisation.HasField("cuda"):
        if model_format != "tensorrt":
            yield (
                f"{at}.cuda",
                f"nothing in {model_format}, since only TensorRT's backend reads it",
                short(given[at]["cuda"]),
            )
        elif optimisation.cuda.graph_spec and not optimisation.cuda.graphs:
            yield (
                f"{at}.cuda.graph_spec",
                "nothing, since graphs = false",
                f"{len(optimisation.cuda.graph_spec)} of them",
            )
        smallest, largest = (model.spec.profile[0], config.max_batch_size) if config.max_batch_size else (0, 0)
        for index, spec in enumerate(optimisation.cuda.graph_spec):
            if model_format == "tensorrt" and not smallest <= spec.batch_size <= largest:
                expected = f"{smallest} to {largest}, the batches of the engine" if largest else "0, since it is fixed"
                yield f"{at}.cuda.graph_spec[{index}].batch_size", expected, repr(spec.batch_size)
    if optimisation.HasField("graph"):
        level = optimisation.graph.level
        if model_format != "onnx":
            yield (
                f"{at}.graph",
                f"nothing in {model_format}, since only ONNX Runtime's backend reads it",
                f"level = {level}",
            )
        elif level not in GRAPH_LEVELS:
            levels = ", ".join(f"{number} ({name})" for number, name in GRAPH_LEVELS.items())
            yield f"{at}.graph.level", f"one of {levels}", repr(level)
    accelerators = optimisation.execution_accelerators
    for where, known in ACCELERATORS.items():
        key = f"{at}.execution_accelerators.{where}"
        entries = list(getattr(accelerators, where))
        if entries and model_format != "onnx":
            expected = f"nothing in {model_format}, since only ONNX Runtime's backend has accelerators"
            yield key, expected, repr(", ".join(entry.name for entry in entries))
            continue
        if entries and where.startswith("gpu") and model.triton("device") == "cpu":
            yield key, 'nothing, since triton.device = "cpu"', repr(", ".join(entry.name for entry in entries))
            continue
        for index, entry in enumerate(entries):
            if entry.name not in known:
                yield f"{key}[{index}].name", f"one of {', '.join(known)}", with_suggestion(entry.name, list(known))
                continue
            allowed = known[entry.name]
            for parameter in sorted(entry.parameters):
                if allowed is not None and parameter not in allowed:
                    expected = f"parameters of {entry.name}"
                    yield f"{key}[{index}].parameters", expected, with_suggestion(parameter, sorted(allowed))
