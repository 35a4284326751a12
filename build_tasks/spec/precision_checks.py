"""What contradicts itself in [engine], and the precision of the ONNX graph that Triton serves."""

from collections.abc import Iterator
from typing import Any

from build_tasks.spec.model import Model, Spec
from build_tasks.spec.overrides import Overrides
from build_tasks.spec.tables import NATIVE_PRECISIONS, QUANTIZED_PRECISIONS
from build_tasks.spec.value_checks import Mistake
from build_tasks.triton.model_config import fields_of_format


def mistakes(model: Model, overrides: Overrides) -> Iterator[Mistake]:
    """Yield what is wrong, each as (key, expected, found)."""
    yield from _engine_mistakes(model, overrides)
    yield from _onnx_mistakes(model)
    yield from _aoti_mistakes(model)


def _onnx_mistakes(model: Model) -> Iterator[Mistake]:
    """Yield what is wrong with onnx.precision.

    ONNX Runtime has no bf16 convolutions and no bf16 at all on a CPU, so that only its TensorRT accelerator takes such
    a graph.
    """
    spec, precision = model.spec, model.spec.onnx.precision
    if precision == "fp32":
        return
    if "onnx" not in spec.formats:
        yield "onnx.precision", "fp32, since formats has no onnx to serve", repr(precision)
    elif precision == "bf16" and not _has_accelerator(fields_of_format(model.config_fields, "onnx")):
        yield (
            "onnx.precision",
            (
                "fp16 or fp32: bf16 needs ONNX Runtime's TensorRT accelerator "
                "(optimization.execution_accelerators in triton.onnx)"
            ),
            repr(precision),
        )
    if spec.has_engine and precision == spec.engine.precision and not spec.engine.keep_io_types:
        yield "engine.keep_io_types", "true, since onnx.precision serves the same graph", "false"


def _aoti_mistakes(model: Model) -> Iterator[Mistake]:
    """Yield what is wrong with aoti.compute_capabilities."""
    capabilities, key = model.spec.aoti.compute_capabilities, "aoti.compute_capabilities"
    if len(set(capabilities)) != len(capabilities):
        yield key, "each compute capability once", repr(capabilities)
    if capabilities and model.triton_keys.device == "cpu":
        yield key, 'nothing, since triton.device = "cpu"', repr(capabilities)


def _has_accelerator(fields: Any) -> bool:
    """Whether the ModelConfig of ONNX asks for TensorRT. What is wrong in it is reported by its own checks."""
    for key in ("optimization", "execution_accelerators", "gpu_execution_accelerator"):
        fields = fields.get(key) if isinstance(fields, dict) else None
    entries = fields if isinstance(fields, list) else []
    return any(isinstance(entry, dict) and entry.get("name") == "tensorrt" for entry in entries)


def _engine_mistakes(model: Model, overrides: Overrides) -> Iterator[Mistake]:
    spec, engine, precision = model.spec, model.spec.engine, model.spec.engine.precision
    if engine.profiles:
        from build_tasks.spec import profile_checks  # few specs have several profiles

        yield from profile_checks.mistakes(model)
    else:
        yield from _batch_mistakes(spec, overrides)
    if precision != "fp16" and not engine.keep_io_types:
        expected = "true, since only fp16 engines can have inputs and outputs in their own precision"
        yield "engine.keep_io_types", expected, "false"
    if precision in NATIVE_PRECISIONS and engine.keep_fp32 and spec.onnx.precision == "fp32":
        yield "engine.keep_fp32", f"nothing, since all nodes of a {precision} graph are fp32", repr(engine.keep_fp32)
    if engine.calibration is not None and precision not in QUANTIZED_PRECISIONS:
        yield "engine.calibration", f"nothing, since {precision} needs no calibration", repr(engine.calibration)
    if precision in NATIVE_PRECISIONS and engine.repair:
        yield "engine.repair", f"false, since all nodes of a {precision} graph are fp32", "true"
    if engine.strip_plan and "tensorrt" in spec.formats:
        yield "engine.strip_plan", "false, since Triton cannot refit a plan without weights", "true"
    for key in ("compute_capabilities", "rtx_compute_capabilities"):
        if len(set(getattr(engine, key))) != len(getattr(engine, key)):
            yield f"engine.{key}", "each compute capability once", repr(getattr(engine, key))


def _batch_mistakes(spec: Spec, overrides: Overrides) -> Iterator[Mistake]:
    """Yield contradictions between the batches of the only profile."""
    smallest, best, largest = spec.profile
    if not smallest <= best <= largest:
        yield "engine", "min_batch_size <= opt_batch_size <= max_batch_size", f"{smallest}, {best}, {largest}"
    if not spec.onnx.dynamic_axes:
        for key in ("min_batch_size", "opt_batch_size", "max_batch_size"):
            if ("onnx", "dynamic_axes") in overrides and ("engine", key) not in overrides:
                continue  # a batch that an option fixes for one run also replaces the profile of the spec
            if getattr(spec.engine, key) not in (None, spec.onnx.batch_size):
                expected = f"{spec.onnx.batch_size}, the batch that onnx.dynamic_axes = false fixes"
                yield f"engine.{key}", expected, repr(getattr(spec.engine, key))
