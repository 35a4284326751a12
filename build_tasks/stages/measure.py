"""measure: the outputs of an artifact for the accuracy samples, against the reference -> model.*.measured.json

    samples.json ─► artifact, on the device that serves it ─► every output of every sample ─┐
    reference.json ───────────────────────────────────────────┴► Polygraphy ─► figures
    the same samples in batches of other sizes and orders ─► artifact ─► the answer that differs most ─► figures

The figures depend on no limit. The accuracy stage compares them with the gate.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError
from build_tasks.formats import serving_device
from build_tasks.formats.declarations import INTERFACE_MODULES, ONNX_MODULES, TRANSFORM_MODULES
from build_tasks.json_files import read_json, write_json
from build_tasks.runtime import machine_bound, threads
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage, nothing_missing
from build_tasks.spec.model import Model
from build_tasks.tensors import Feed, Signature
from build_tasks.verification import accuracy_samples, metrics
from build_tasks.verification.class_outputs import class_outputs
from build_tasks.verification.reference_outputs import BATCH, Batch, Reference, RunBatch, batch_sizes

if TYPE_CHECKING:
    pass

# The ways to run an artifact, and the distributions that each of them uses.
RUNNERS = {
    "torchscript": ("torch", "polygraphy"),
    "cast": ("torch", "polygraphy"),
    "onnx": ("onnxruntime", "onnxruntime-gpu", "polygraphy"),
    "graph": ("onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu", "polygraphy"),
    "tensorrt": ("polygraphy",),
    "aoti": ("torch", "polygraphy"),
}

# The modules that each of them uses.
RUNNER_MODULES = {
    "torchscript": ("build_tasks.formats.serving_device", *INTERFACE_MODULES, *TRANSFORM_MODULES),
    "cast": (
        "build_tasks.formats.serving_device",
        "build_tasks.formats.torchscript_graph",
        *INTERFACE_MODULES,
        *TRANSFORM_MODULES,
    ),
    "onnx": ("build_tasks.formats.serving_device", *ONNX_MODULES),
    "graph": ("build_tasks.formats.serving_device", *ONNX_MODULES),
    "tensorrt": (
        "build_tasks.formats.tensorrt",
        "build_tasks.formats.tensorrt_session",
        "build_tasks.triton.optimization_profiles",
    ),
    "aoti": (
        "build_tasks.formats.aoti_package",
        "build_tasks.formats.serving_device",
        *INTERFACE_MODULES,
        *TRANSFORM_MODULES,
    ),
}


def task(model: Model, model_format: str, file: str) -> dict[str, Any]:
    """The doit task of an artifact that Triton serves."""
    runner = "cast" if model_format == "torchscript" and model.is_cast else model_format
    runner = "graph" if runner == "onnx" and file != "model.onnx" else runner
    name = model.artifact_task_name(model_format, file)
    largest = model.spec.max_batch_size
    if model_format == "tensorrt" and model.spec.engine.profiles:  # they take no more than what Triton serves
        largest = model.largest_batch(model_format) or largest
    stage = _stage(model, name, runner, file, largest)
    return stage.task(doc=f"{file} against {model.reference} on the accuracy samples")


def task_of_graph(model: Model, precision: str) -> dict[str, Any]:
    """The doit task of a graph that engines are compiled from, if Triton does not serve it."""
    file = model.graph_file(precision)
    runner = "onnx" if file == "model.onnx" else "graph"
    stage = _stage(model, model.graph_name(precision), runner, file, largest_batch=None)
    return stage.task(doc=f"{file} against {model.reference} on the accuracy samples, in ONNX Runtime")


def _stage(model: Model, name: str, runner: str, file: str, largest_batch: int | None) -> Stage:
    """The stage of one artifact.

    Args:
        largest_batch: The largest batch that is served; None for an artifact that is not served.
    """
    machine, served_on = machine_bound.machine_of(model, file), model.triton_keys.device
    is_served = largest_batch is not None and machine is None
    may_use_gpu = is_served and "bf16" not in file and serving_device.gpu_of(runner) is not None
    truth = model.spec.accuracy.truth
    truth_inputs = {
        **({"truth": model.source(truth)} if truth and truth != accuracy_samples.FOLDERS else {}),
        **({"labels": model.artifact("labels.txt")} if truth and model.spec.labels else {}),
    }
    return Stage(
        name=f"measure:{name}",
        model=model,
        build=functools.partial(build, served_on=served_on) if may_use_gpu else build,
        inputs={
            "model": model.artifact(file),
            "signature": model.artifact(f"{file}.signature.json"),
            "samples": model.artifact("samples.json"),
            "names": model.artifact("samples.txt"),
            "reference": model.artifact("reference.json"),
            **truth_inputs,
        },
        outputs={"measured": model.artifact(f"{file}.measured.json")},
        peak_batch=2 * BATCH * threads.AT_ONCE,  # see _batches
        settings={
            "runner": runner,
            "truth": truth,
            "top_k": model.spec.output.top_k,
            "largest_batch": largest_batch,
            "class_outputs": class_outputs(model),
            "picture": not model.spec.inputs,
        },
        tools=RUNNERS[runner],
        modules=(
            __name__,
            "build_tasks.runtime.threads",
            "build_tasks.tensors",
            "build_tasks.verification.accuracy_samples",
            "build_tasks.verification.batch_check",
            "build_tasks.verification.metrics",
            "build_tasks.verification.profile_batches",
            "build_tasks.verification.reference_outputs",
            "build_tasks.verification.sample_groups",
            *RUNNER_MODULES[runner],
        ),
        missing_requirements=machine.missing_requirements if machine else nothing_missing,
        made_elsewhere=machine is None or machine.made_elsewhere,
        compute_capability=machine.compute_capability if machine else None,
        same_bytes=runner == "aoti" and machine_bound.package_device(model) == "cpu",
        host_fingerprint=machine.host_fingerprint
        if machine
        else functools.partial(serving_device.host_fingerprint, runner, served_on)
        if may_use_gpu
        else dict,
    )


def build(inputs: Paths, outputs: Paths, settings: Settings, served_on: str = "cpu") -> Notes:
    """Measure an artifact.

    Args:
        served_on: triton.device if the artifact may run on the GPU of this machine, else "cpu".
    """
    from build_tasks.verification import profile_batches

    signature = read_json(inputs["signature"])
    session = _open_session(inputs["model"], signature, settings["runner"], served_on)
    reference = Reference(inputs)
    smallest, largest = batch_sizes(signature)
    untried = profile_batches.untried_profiles(signature.get("profiles", []), reference.groups)
    if untried and not settings["picture"]:
        raise UserError(
            f"accuracy.samples has none for engine.profiles {', '.join(map(str, untried))}: add a sample whose lengths "
            "are in the ranges of each"
        )
    each = map if session.on_gpu else threads.each  # one batch at a time on a GPU
    measured: metrics.MeasuredFile = {
        "model": digest(inputs["model"]),  # every reader of the figures compares these digests
        "signature": digest(inputs["signature"]),
        "reference": digest(inputs["reference"]),
        "device": session.device,
        **reference.measure(
            session.run,
            smallest,
            min(largest, settings["largest_batch"] or largest),
            settings["top_k"],
            _truth(inputs, settings, reference.names),
            each,
            _batches(signature, settings, reference.groups, session),
            settings["class_outputs"],
        ),
    }
    if session.arithmetic:
        for output in measured["outputs"].values():
            output["arithmetic"] = session.arithmetic
    write_json(outputs["measured"], measured)
    served = {} if settings["largest_batch"] is None else {"device": session.device}
    if untried:  # pictures of all samples have one size
        served["not run"] = f"engine.profiles {', '.join(map(str, untried))}, since no sample has their lengths"
    return {**metrics.key_figures(measured), **served}


def _open_session(path: str, signature: Signature, runner: str, served_on: str) -> serving_device.Session:
    from build_tasks.formats.onnx_runtime import onnx_session, reduced_session

    if runner == "tensorrt":
        from build_tasks.formats.tensorrt_session import engine_session

        return serving_device.Session(engine_session(path, signature), signature["GPU"])
    names = [tensor["name"] for tensor in signature["inputs"]]
    if runner == "aoti":
        return serving_device.package_session(path, signature, names)
    runners: dict[str, Callable[[str], RunBatch]] = {
        "torchscript": lambda path: run_trace(path, names),
        "cast": lambda path: run_cast(path, names),
        "onnx": onnx_session,
        "graph": reduced_session,
    }
    if served_on == "cpu":
        return serving_device.Session(runners[runner](path), serving_device.CPU)
    return serving_device.open_session(runner, path, names, runners[runner])


def _batches(
    signature: Signature, settings: Settings, groups: Sequence[Feed], session: serving_device.Session
) -> list[Batch]:
    """The further batches in which an artifact that Triton serves is run. On a CPU they are smaller."""
    from build_tasks.verification import batch_check, profile_batches
    from build_tasks.verification.sample_groups import count_samples

    if settings["largest_batch"] is None:
        return []
    profiles = signature.get("profiles", [])
    if len(profiles) > 1:
        return profile_batches.batches_of_profiles(session.run, profiles, groups)
    samples = count_samples(groups)
    if session.on_gpu:
        sizes = batch_check.batches_of(signature, settings["largest_batch"])
        orders = batch_check.arrangements(samples, sizes, repeated=sizes)
    else:
        sizes = batch_check.batches_of(signature, min(settings["largest_batch"], batch_check.MAX_CPU_BATCH))
        orders = batch_check.arrangements(samples, sizes, repeated=[min(batch_check.TUNED, sizes[-1])])
    return [Batch(session.run, batch) for batch in orders]


def _truth(inputs: Paths, settings: Settings, names: list[str]) -> metrics.Truth | None:
    """The true classes of the samples, None if the spec has no accuracy.truth."""
    if settings["truth"] is None:
        return None
    labels = None
    if "labels" in inputs:
        with open(inputs["labels"], encoding="utf-8") as file:
            labels = file.read().split("\n")[:-1]
    return accuracy_samples.read_truth(inputs.get("truth", accuracy_samples.FOLDERS), names, labels)


def run_trace(path: str, names: list[str]) -> RunBatch:
    """model.pt as a function from a batch of its inputs, in the order of `names`, to its outputs."""
    import torch

    return _run_module(torch.jit.load(path), names)


def run_cast(path: str, names: list[str]) -> RunBatch:
    """A cast trace, model.fp16.pt for example, as such a function. It rounds as a GPU does."""
    import torch

    from build_tasks.formats import torchscript_graph

    return _run_module(functools.partial(torchscript_graph.run_with_gpu_rounding, torch.jit.load(path)), names)


def _run_module(module: Any, names: list[str]) -> RunBatch:
    import torch

    from build_tasks.formats.serving_interface import forward

    return lambda feed: [answer.numpy() for answer in forward(module, [torch.from_numpy(feed[n]) for n in names])]
