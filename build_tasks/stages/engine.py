"""engine: model.<precision>.onnx -> model.plan (TensorRT) or model.rtx (TensorRT-RTX), and its signature

    verdict ok? ─► parse ─► profiles ─► build ─► model.plan
                               timing cache ┘    model.plan.signature.json

A plan must be built on the kind of GPU that it will run on, and runs only with the TensorRT version that built it.
TensorRT-RTX builds without a GPU. Its engines are for GeForce and RTX GPUs, and Triton does not serve them.
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
from build_tasks.spec.engine_profiles import profiles_of
from build_tasks.spec.interface import open_inputs
from build_tasks.spec.model import Model, table_settings
from build_tasks.tensors import OptimizationProfile

TOOLS = ("polygraphy",)
TIMING_CACHES = f"{BUILD}/.timing"

# The oldest compute capability that has a precision in hardware.
# Source: the TensorRT support matrix, "Hardware and Precision".
OLDEST_CAPABILITY = {"tf32": (8, 0), "bf16": (8, 0), "int8": (6, 1), "fp8": (8, 9)}

# Keys of [engine] that affect only the graph, and keys that only one of the two compilers has.
GRAPH_ONLY = {"keep_fp32", "keep_io_types", "calibration", "repair"}
PLANS_ONLY = {"compute_capabilities", "hardware_compatibility", "version_compatible", "timing_cache"}
RTX_ONLY = {"rtx_compute_capabilities"}
BATCH_KEYS = {"min_batch_size", "opt_batch_size", "max_batch_size"}  # the profiles have them


def task(model: Model, file: str) -> dict[str, Any]:
    """The doit task.

    Args:
        file: "model.rtx", or one of the model's plans.
    """
    engine, rtx = model.spec.engine, file == "model.rtx"
    profiles = profiles_of(model.spec)
    capability = None if rtx else model.plans[file]
    cache = model.source(engine.timing_cache) if engine.timing_cache and not rtx else None
    stage = Stage(
        name=f"rtx:{model.name}" if rtx else f"engine:{model.name}{model.capability_suffix(file)}",
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
                for key, value in table_settings(engine).items()
                if key not in GRAPH_ONLY | BATCH_KEYS | (PLANS_ONLY if rtx else RTX_ONLY)
            },
            **({} if rtx else {"compute_capabilities": capability and [capability]}),
            "compiler": "rtx" if rtx else "tensorrt",
            "profiles": profiles,
            "open_inputs": open_inputs(model.spec),
        },
        tools=TOOLS,
        modules=(__name__, "build_tasks.formats.tensorrt", "build_tasks.runtime.hardware", "build_tasks.tensors"),
        missing_requirements=hardware.missing_requirements_rtx
        if rtx
        else functools.partial(hardware.missing_requirements, capability),
        made_elsewhere=rtx or capability is not None,
        compute_capability=capability,
        host_fingerprint=hardware.host_fingerprint_rtx if rtx else hardware.host_fingerprint,
    )
    doc = f"{file}: {engine.precision}, batches {format_batches(profiles)}"
    return stage.task(doc=doc, params=overrides.params("rtx" if rtx else "engine"))


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import polygraphy.config

    # Polygraphy uses one of the two in a process. This process compiles one engine.
    polygraphy.config.USE_TENSORRT_RTX = rtx = settings["compiler"] == "rtx"
    from build_tasks.formats import tensorrt

    if read_json(inputs["verdict"])["model"] != digest(inputs["graph"]):  # `doit -s` skips the accuracy task
        raise UserError(
            f"{inputs['verdict']} is the gate result of another file than {inputs['graph']}; nothing was compiled"
        )
    check_precision(settings["precision"], target_capabilities(settings))
    with contextlib.ExitStack() as stack:
        if not rtx:  # TensorRT times its tactics on the GPU; two builds at once would falsify each other's times
            atomic_files.make_folder(hardware.GPU_LOCK)
            stack.enter_context(atomic_files.locked(hardware.GPU_LOCK))
        folder = stack.enter_context(atomic_files.scratch_dir(TIMING_CACHES, prefix="draft-"))
        draft = f"{folder}/timing.cache"
        # The spec's timing cache is never written. Without one, build/ keeps a cache for each GPU and TensorRT.
        own = None if rtx or "timing_cache" in inputs else f"{TIMING_CACHES}/{cache_name(hardware.host_fingerprint())}"
        if existing := inputs.get("timing_cache") or (own and os.path.exists(own) and own):
            shutil.copyfile(existing, draft)
        engine, signature = tensorrt.compile_engine(inputs["graph"], settings, draft)
        if own and os.path.exists(draft):
            os.replace(draft, own)
    signature["compiler"], signature["precision"] = settings["compiler"], settings["precision"]
    if not rtx:
        signature["version_compatible"] = settings["version_compatible"]
    host = hardware.host_fingerprint_rtx() if rtx else hardware.host_fingerprint()
    with open(outputs["engine"], "wb") as file:
        file.write(engine)
    for name, record in (("signature", {**signature, **host}), ("tools", {**versions(TOOLS), **host})):
        write_json(outputs[name], record)
    batches = format_batches(settings["profiles"])
    return {"precision": settings["precision"], "batches": batches, "MB": f"{len(engine) / 1e6:.1f}"}


def format_batches(profiles: list[OptimizationProfile]) -> str:
    """Return the smallest, the tuned and the largest batch of each profile, "1, 1, 1; 1, 8, 32"."""
    batches = [profile["batch"] for profile in profiles]
    return "; ".join(f"{batch['min']}, {batch['opt']}, {batch['max']}" for batch in batches)


def target_capabilities(settings: Settings) -> list[str]:
    """The compute capabilities that the engine is for; empty where TensorRT-RTX compiles for all that it supports."""
    if settings["compiler"] == "rtx":
        return list(settings["rtx_compute_capabilities"])
    return [hardware.host_fingerprint()["compute capability"]]


def check_precision(precision: str, capabilities: list[str]) -> None:
    """Raise a UserError if a GPU of one of the compute capabilities does not have the precision."""
    oldest = OLDEST_CAPABILITY.get(precision, (0, 0))
    for capability in capabilities:
        if tuple(map(int, capability.split("."))) < oldest:
            raise UserError(
                f"engine.precision: {precision} needs a GPU of compute capability {oldest[0]}.{oldest[1]} or newer, "
                f"and this engine is for {capability}; fp16 runs on all of them"
            )


def cache_name(host: dict[str, str]) -> str:
    """The file name of the timing cache, which holds times of one GPU and one TensorRT version."""
    return re.sub(r"[^\w.-]+", "_", f"{host['TensorRT']}.{host['GPU']}.cache")
