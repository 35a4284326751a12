"""engine: model.<precision>.onnx -> model.plan (TensorRT) or model.rtx (TensorRT-RTX), and its signature

    verdict ok? ─► parse ─► profile ─► build ─► model.plan
                              timing cache ┘    model.plan.signature.json

A plan is built on the GPU that it is for, and runs with the TensorRT that built it. TensorRT-RTX needs no GPU; its
engines are for GeForce and RTX GPUs, and no models of Triton's.
"""

import contextlib
import functools
import os
import re
import shutil
from typing import Any

from build_tasks.errors import UserError
from build_tasks.json_files import read_json, write_json
from build_tasks.paths import BUILD
from build_tasks.runtime import atomic_files, hardware
from build_tasks.runtime.digests import digest
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec import overrides
from build_tasks.spec.model import Model, settings

TOOLS = ("polygraphy",)
TIMING_CACHES = f"{BUILD}/.timing"
GPU = f"{BUILD}/.gpu"  # locked by whoever builds on it

# The oldest compute capability that has a precision in hardware.
# Source: the TensorRT support matrix, "Hardware and Precision".
OLDEST = {"tf32": (8, 0), "bf16": (8, 0), "int8": (6, 1), "fp8": (8, 9)}

# Keys of [engine] that decide the graph, and those that mean something to one compiler only.
NOT_THE_BUILDER = {"keep_fp32", "keep_io_types", "calibration", "repair"}
PLANS_ONLY = {"compute_capabilities", "hardware_compatibility", "version_compatible", "timing_cache"}
RTX_ONLY = {"rtx_compute_capabilities"}


def task(model: Model, file: str) -> dict[str, Any]:
    """Of model.rtx, or of a plan."""
    engine, rtx = model.spec.engine, file == "model.rtx"
    smallest, best, largest = model.spec.profile
    capability = None if rtx else model.plans[file]
    cache = model.source(engine.timing_cache) if engine.timing_cache and not rtx else None
    stage = Stage(
        name=f"rtx:{model.name}" if rtx else f"engine:{model.name}{model.plan_suffix(file)}",
        model=model,
        build=build,
        inputs={
            "graph": model.artifact(model.graph),
            "verdict": model.artifact(f"{model.graph}.verdict.json"),
            **({"timing_cache": cache} if cache else {}),
        },
        outputs={
            "engine": model.artifact(file),
            "signature": model.artifact(f"{file}.signature.json"),
            "tools": model.artifact(f"{file}.tools.json"),
        },
        settings={
            **{
                key: value
                for key, value in settings(engine).items()
                if key not in NOT_THE_BUILDER | (PLANS_ONLY if rtx else RTX_ONLY)
            },
            **({} if rtx else {"compute_capabilities": capability and [capability]}),
            "compiler": "rtx" if rtx else "tensorrt",
            "min_batch_size": smallest,
            "opt_batch_size": best,
            "max_batch_size": largest,
            "format": model.spec.input.format,
            "shape": model.spec.input.shape if model.spec.sizes else None,
            "sizes": model.spec.sizes,
        },
        tools=TOOLS,
        modules=(__name__, "build_tasks.formats.tensorrt", "build_tasks.runtime.hardware", "build_tasks.tensors"),
        missing_requirements=hardware.missing_requirements_rtx
        if rtx
        else functools.partial(hardware.missing_requirements, capability),
        host_fingerprint=hardware.host_fingerprint_rtx if rtx else hardware.host_fingerprint,
    )
    doc = f"{file}: {engine.precision}, batches {smallest}, {best}, {largest}"
    return stage.task(doc=doc, params=overrides.params("rtx" if rtx else "engine"))


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import polygraphy.config

    # Which of the two Polygraphy works with; this process compiles nothing else.
    polygraphy.config.USE_TENSORRT_RTX = rtx = settings["compiler"] == "rtx"
    from build_tasks.formats import tensorrt

    if read_json(inputs["verdict"])["model"] != digest(inputs["graph"]):  # `doit -s` leaves out the task that judges
        raise UserError(f"{inputs['verdict']} judges another file than {inputs['graph']}; nothing was compiled")
    check_precision(settings["precision"], targets(settings))
    with contextlib.ExitStack() as held:
        if not rtx:  # builds time their tactics on the GPU, and two at once would time each other
            os.makedirs(GPU, exist_ok=True)
            held.enter_context(atomic_files.locked(GPU))
        folder = held.enter_context(atomic_files.scratch_dir(TIMING_CACHES, prefix="draft-"))
        kept = None if rtx or "timing_cache" in inputs else f"{TIMING_CACHES}/{cache_name(hardware.host_fingerprint())}"
        draft = f"{folder}/timing.cache"
        if known := inputs.get("timing_cache") or (kept and os.path.exists(kept) and kept):
            shutil.copyfile(known, draft)
        engine, signature = tensorrt.compile_engine(inputs["graph"], settings, draft)
        if kept and os.path.exists(draft):
            os.replace(draft, kept)
    signature |= {key: settings[key] for key in ("compiler", "precision")}
    if not rtx:
        signature["version_compatible"] = settings["version_compatible"]
    facts = hardware.host_fingerprint_rtx() if rtx else hardware.host_fingerprint()
    signature |= facts
    with open(outputs["engine"], "wb") as file:
        file.write(engine)
    for name, record in (("signature", signature), ("tools", {**versions(TOOLS), **facts})):
        write_json(outputs[name], record)
    batches = [settings[f"{point}_batch_size"] for point in ("min", "opt", "max")]
    return {"precision": settings["precision"], "batches": batches, "MB": f"{len(engine) / 1e6:.1f}"}


def targets(settings: Settings) -> list[str]:
    """The compute capabilities that the engine is for, as far as they are known."""
    if settings["compiler"] == "rtx":
        return list(settings["rtx_compute_capabilities"])
    return [hardware.host_fingerprint()["compute capability"]]


def check_precision(precision: str, capabilities: list[str]) -> None:
    """UserError where a GPU does not have the precision."""
    oldest = OLDEST.get(precision, (0, 0))
    for capability in capabilities:
        if tuple(map(int, capability.split("."))) < oldest:
            raise UserError(
                f"engine.precision: {precision} needs a GPU of compute capability {oldest[0]}.{oldest[1]} or newer, "
                f"and this engine is for {capability}; fp16 runs on all of them"
            )


def cache_name(facts: dict[str, str]) -> str:
    """A timing cache holds measurements of one GPU by one TensorRT."""
    return re.sub(r"[^\w.-]+", "_", f"{facts['TensorRT']}.{facts['GPU']}.cache")
