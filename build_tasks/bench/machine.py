"""A benchmark on this machine: every format of a model, each in a process of its own.

    the plain trace, model.pt, model.onnx, … ─► workload.py ─► Points ─► a Run
    plans ─► trtexec, if it is on the PATH       ─────────────────┘

A process holds one format: it does not share memory or threads with another format, and a crash loses one format.
"""

import itertools

from build_tasks.bench import duration, instances, nvidia_tools, results, workload
from build_tasks.bench.records import COMPILED, FROM_NETWORK, TRACE, TRTEXEC, Options, Run, Timing
from build_tasks.bench.workload import Measurement, Sweep
from build_tasks.errors import UserError, first_lines
from build_tasks.formats import artifacts, declarations
from build_tasks.runtime import atomic_files, hardware, machine_bound, worker
from build_tasks.runtime.digests import digest
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import Paths, Settings, log_of
from build_tasks.spec.interface import interface_of
from build_tasks.spec.model import Model
from build_tasks.tensors import profile_batches, resize
from build_tasks.triton.optimization_profiles import nearest_profile


def formats_of(model: Model) -> list[str]:
    """The formats that some machine can measure. The plain trace comes first: others are compared with it."""
    return [*([] if model.spec.from_onnx else [TRACE]), *model.spec.formats]


def comparisons_of(model: Model) -> list[str]:
    """What can be measured on request, because it takes long: torch.compile, for a network that PyTorch builds."""
    return [] if model.spec.from_onnx or model.spec.program_suffix else [COMPILED]


def measurable_formats(model: Model) -> list[str]:
    """The formats that this machine can measure."""
    return [model_format for model_format in formats_of(model) if not missing_requirements(model, model_format)]


def missing_requirements(model: Model, model_format: str) -> str | None:
    """The missing requirement to run a format on this machine; None if nothing is missing."""
    by_pytorch = dict.fromkeys((*FROM_NETWORK, "torchscript", "aoti"), ("torch",))
    packages = {"onnx": results.ONNX_RUNTIME, **by_pytorch}.get(model_format)
    if packages and hardware.version(packages) is None:
        return f"the package {packages[0]} (pip install -r requirements.txt)"
    if model_format == COMPILED and not hardware.compiler():
        return hardware.NO_COMPILER
    if model_format in model.served_formats:
        return machine_bound.missing_requirements(model, served_file(model, model_format))
    if model_format == "rtx":
        gpu = hardware.gpu()
        return hardware.missing_requirements_rtx() or (gpu if isinstance(gpu, str) else None)
    return None


def served_file(model: Model, model_format: str) -> str:
    """The artifact of a format that is served; the one for this machine's GPU, if there are several."""
    files = model.files(model_format)
    for_this_machine = [file for file in files if not machine_bound.missing_requirements(model, file)]
    return (for_this_machine or artifacts.present_artifacts(model, model_format))[0]


def input_paths(model: Model, model_format: str) -> Paths:
    """The files that a format is measured with."""
    samples = {"samples": model.artifact("samples.json")}
    if model_format in FROM_NETWORK:
        return {**samples, "weights": model.weights}
    file = "model.rtx" if model_format == "rtx" else served_file(model, model_format)
    return {**samples, "model": model.artifact(file), "signature": model.artifact(f"{file}.signature.json")}


def measure(model: Model, options: Options) -> Run:
    """Measure the requested formats of a model on this machine."""
    run = Run(machine=results.this_machine(), tools=versions(results.TOOLS), date=results.now())
    sweeps = []
    for model_format in options.formats:
        if missing := missing_requirements(model, model_format):
            run.left_out.append(f"{model_format}: this machine lacks {missing}")
        elif batches := [batch for batch in options.batches if accepts_batch(model, model_format, batch)]:
            sweeps.append(Sweep(model_format, batches, options.concurrency, options.seconds))
        else:
            run.left_out.append(f"{model_format}: it takes none of the batches {', '.join(map(str, options.batches))}")
    task = f"bench:{model.name}"

    def pace_of(sweep: Sweep) -> duration.Pace | None:
        """None if the format cannot be loaded, which its own measurement will report."""
        paths, settings = input_paths(model, sweep.model_format), settings_of(model, sweep.model_format)
        log = log_of(model, f"{task}.{sweep.model_format}")
        try:
            pace: duration.Pace = worker.call(duration.pace_of_artifact, paths, sweep, settings, log=log, task=task)
        except (UserError, worker.CrashError):
            return None
        return pace

    if sweeps:
        results.log_line(model, duration.format_estimate(sweeps, options, pace_of))
    for sweep in sweeps:
        model_format = sweep.model_format
        paths = input_paths(model, model_format)
        log = log_of(model, f"{task}.{model_format}")
        try:
            measurement: Measurement = worker.call(
                workload.measure_artifact, paths, sweep, settings_of(model, model_format), log=log, task=task
            )
        except (UserError, worker.CrashError) as error:
            run.failed.append(f"{model_format}: {first_lines(error)} (log: {log})")
            continue
        run.points.extend(measurement.points)
        run.failed.extend(f"{model_format}: {reason}" for reason in measurement.failed)
        sha256 = digest(paths.get("model", model.weights))
        run.measured[model_format] = Timing(measurement.timed_by, measurement.device, sha256)
        if model_format == "tensorrt" and nvidia_tools.has_trtexec():
            measure_with_trtexec(model, paths, sweep, run)
    return run


def settings_of(model: Model, model_format: str) -> Settings:
    """The settings of `workload.measure_artifact`."""
    settings: Settings = {"device": model.triton_keys.device, "cores": results.cores()}
    if model_format in FROM_NETWORK:
        settings |= {
            "network": declarations.settings_of(model),
            "interface": interface_of(model.spec),
            "precision": model.torchscript.precision,
            "memory_format": model.torchscript.memory_format,
        }
    return settings


def accepts_batch(model: Model, model_format: str, batch: int) -> bool:
    """Whether an artifact takes a batch. If its batch is open, it also takes batches above the spec's largest."""
    if model_format in FROM_NETWORK:
        return True
    signature = artifacts.read_signature(input_paths(model, model_format))
    if profiles := profile_batches(signature):
        return any(smallest <= batch <= largest for smallest, _, largest in profiles)
    return signature["inputs"][0]["shape"][0] in (-1, batch)


def measure_with_trtexec(model: Model, paths: Paths, sweep: Sweep, run: Run) -> None:
    """Measure the plan again with NVIDIA's own tool, and append its points to the run."""
    signature = artifacts.read_signature(paths)
    profiles = signature.get("profiles", [])
    samples = workload.cast_samples(workload.read_samples(paths), instances.dtypes_of(signature["inputs"]))
    for concurrency, batch in itertools.product(sweep.concurrency, sweep.batches):
        feed = resize(samples, batch)
        shapes = nvidia_tools.batch_shapes(feed) if profiles else {}
        profile = nearest_profile(profiles, shapes) or 0
        with atomic_files.scratch_dir() as folder:
            files = {}
            for index, (name, array) in enumerate(feed.items() if model.spec.inputs else ()):
                files[name] = f"{folder}/{index}.bin"  # a name may contain what a path cannot
                array.tofile(files[name])
            try:
                point = nvidia_tools.trtexec_point(
                    paths["model"], shapes, batch, concurrency, sweep.seconds, profile, files
                )
            except UserError as error:
                run.failed.append(str(error))
                return
        run.points.append(point)
        results.log_line(model, workload.format_point(point))
    run.measured[TRTEXEC] = Timing(timed_by=TRTEXEC, device="cuda")
