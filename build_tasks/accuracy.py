"""accuracy: an artifact on the accuracy samples, against the reference -> model.*.accuracy.json

samples.json ─► artifact ─► Polygraphy: relative L2 error of every output, and top-1 ─► ok | not testable | refused
"""

import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from build_tasks import machine
from build_tasks.compare import INPUT, OUTPUT, onnx_session, reduced_session
from build_tasks.digests import digest
from build_tasks.errors import UserError
from build_tasks.spec import Model
from build_tasks.stage import Notes, Paths, Settings, Stage, code_of, nothing

if TYPE_CHECKING:
    import numpy as np
    from polygraphy.comparator import IterationResult

BATCH = 8
DEGENERATE = 1e-3  # spread of an output over the samples, relative to its size, under which it says nothing

# Relative L2 error that a precision may cost. Over 68 timm architectures fp16 costs 1.6e-3 at the median and 5e-2 at
# worst, by amplified rounding; bf16 has 3 bits less. Quantisation is judged by top-1, and by this only in the gross.
TOLERANCES = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 5e-2, "bf16": 0.2, "int8": 0.5, "fp8": 0.5}

ADVICE = (
    "; try engine.keep_fp32, another engine.precision, more pictures in engine.calibration, "
    "or set engine.tolerance or engine.top1"
)

# How an artifact is run, and which distributions that takes.
RUNNERS = {
    "torchscript": ("torch", "polygraphy"),
    "onnx": ("onnxruntime", "polygraphy"),
    "graph": ("onnx", "onnxruntime", "polygraphy"),
    "tensorrt": ("polygraphy",),
}


def task(model: Model, format: str, file: str) -> dict[str, Any]:
    """Of an artifact that is served."""
    stage = _stage(model, model.served_as(format, file), format, file, reduced=format == "tensorrt")
    return stage.task(doc=f"{file} against PyTorch on the accuracy samples")


def task_of_graph(model: Model) -> dict[str, Any]:
    """Of the graph that engines are compiled from, where it is no artifact that is served."""
    converted = model.graph != "model.onnx"
    stage = _stage(model, model.graph_name, "graph" if converted else "onnx", model.graph, reduced=converted)
    return stage.task(doc=f"{model.graph} against PyTorch, in ONNX Runtime, before it is compiled")


def _stage(model: Model, name: str, runner: str, file: str, reduced: bool) -> Stage:
    accuracy, engine = model.spec.accuracy, model.spec.engine
    tolerance, top1 = accuracy.tolerance, accuracy.top1
    if reduced:
        tolerance = engine.tolerance or max(TOLERANCES[engine.precision], tolerance)
        top1 = top1 if engine.top1 is None else engine.top1
    plan = runner == "tensorrt"
    return Stage(
        name=f"accuracy:{name}",
        model=model,
        build=build,
        inputs={
            "model": model.artifact(file),
            "signature": model.artifact(f"{file}.signature.json"),
            "samples": model.artifact("samples.json"),
            "reference": model.artifact("reference.json"),
        },
        outputs={"verdict": model.artifact(f"{file}.accuracy.json")},
        settings={
            "runner": runner,
            "tolerance": tolerance,
            "top1": top1,
            "reduced": reduced,
            "allow_untestable": accuracy.allow_untestable,
            "random_weights": model.seed is not None,
        },
        tools=RUNNERS[runner],
        code=code_of("accuracy", "compare", "architecture", "digests", *(("compiler",) if plan else ())),
        lacking=functools.partial(machine.lacking, model.plans[file]) if plan else nothing,
        facts=machine.facts if plan else dict,
    )


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.json import load_json

    reference = next(iter(RunResults.load(inputs["reference"]).values()))[0]
    samples = load_json(inputs["samples"])[0][INPUT]
    with open(inputs["signature"], encoding="utf-8") as file:
        signature = json.load(file)
    if settings["runner"] == "tensorrt":
        from build_tasks import compiler

        run = compiler.session(inputs["model"], signature)
    else:
        runners = {"torchscript": torchscript, "onnx": onnx_session, "graph": reduced_session}
        run = runners[settings["runner"]](inputs["model"])
    answers = answered(run, samples, *batch_sizes(signature))
    found = IterationResult(
        {OUTPUT.format(index): answer for index, answer in enumerate(answers)}, runner_name=settings["runner"]
    )
    doubt = doubts(reference, settings["random_weights"])
    measured = measure(found, reference, settings, judge=not (doubt and settings["reduced"]))
    if doubt and not (settings["random_weights"] or settings["allow_untestable"]):
        raise UserError(f"accuracy cannot be tested: {doubt}; choose other samples, or set accuracy.allow_untestable")
    verdict = {
        "model": digest(inputs["model"]),  # what was judged: publish asks for it
        "signature": digest(inputs["signature"]),
        "status": f"not testable: {doubt}" if doubt else "ok",
        "samples": len(samples),
        "outputs": measured,
    }
    with open(outputs["verdict"], "w", encoding="utf-8") as file:
        json.dump(verdict, file, indent=1)
    return {"accuracy": verdict["status"], "error": max(output["relative_l2"] for output in measured.values())}


def torchscript(path: str) -> "Callable[[np.ndarray], list[np.ndarray]]":
    """model.pt as a function from a batch to its outputs."""
    import torch

    from build_tasks import architecture

    module = torch.jit.load(path)
    return lambda batch: [answer.numpy() for answer in architecture.forward(module, torch.from_numpy(batch))]


def batch_sizes(signature: dict[str, Any]) -> tuple[int, int]:
    """The smallest and the largest batch of the samples that the artifact takes at once."""
    tensor = signature["inputs"][0]
    if profile := signature.get("profile"):
        return profile[tensor["name"]]["min"][0], profile[tensor["name"]]["max"][0]
    return (1, BATCH) if tensor["shape"][0] == -1 else (tensor["shape"][0], tensor["shape"][0])


def answered(
    run: "Callable[[np.ndarray], list[np.ndarray]]", samples: "np.ndarray", smallest: int, largest: int
) -> "list[np.ndarray]":
    """The outputs for all samples, in batches that the artifact takes; too small a last one is filled with repeats."""
    import numpy as np

    size = min(max(BATCH, smallest), largest)
    parts = []
    for start in range(0, len(samples), size):
        batch = samples[start : start + size]
        filled = np.resize(batch, (max(len(batch), smallest), *batch.shape[1:]))
        parts.append([answer[: len(batch)] for answer in run(np.ascontiguousarray(filled))])
    return [np.concatenate(answers) for answers in zip(*parts, strict=True)]


def exact(result: "IterationResult") -> "IterationResult":
    """The outputs as float64: a norm in fp16 overflows at 65504, and bool knows no difference."""
    import numpy as np
    from polygraphy.comparator import IterationResult

    outputs = {name: output.astype(np.float64) for name, output in result.items()}
    return IterationResult(outputs, runner_name=result.runner_name)


def measure(
    found: "IterationResult", reference: "IterationResult", settings: Settings, judge: bool = True
) -> dict[str, dict[str, float]]:
    """Relative L2 error and top-1 agreement of each output. UserError where one is beyond its limit.

    A sample agrees if the class that it names is the reference's strongest, or closer to it than the tolerance lets
    outputs move: which of two equals comes first is no matter of accuracy.

    judge: refuse by the limits, and not only what is no answer at all. Without it the samples prove nothing, and
        rounding alone may change random weights' outputs by any factor.
    """
    import numpy as np
    from polygraphy.comparator import L2CompareFunc

    advice = ADVICE if settings["reduced"] else ""
    found, reference = exact(found), exact(reference)
    for name, output in (*reference.items(), *found.items()):
        if not np.isfinite(output).all():
            raise UserError(f"output {name}: NaN or infinity on the accuracy samples")
    scale = {name: float(np.linalg.norm(output)) or 1.0 for name, output in reference.items()}
    compare = L2CompareFunc({name: settings["tolerance"] * norm for name, norm in scale.items()})
    results = compare(found, reference)
    measured = {}
    for name, expected in reference.items():
        if name not in results or isinstance(results[name], bool):  # Polygraphy's word for "shapes differ"
            raise UserError(f"output {name}: shape {list(expected.shape)} expected, and not found")
        error = results[name].l2_norm / scale[name]
        if judge and not results[name]:
            worst = int(np.argmax(np.abs(found[name] - expected).reshape(len(expected), -1).max(axis=1)))
            raise UserError(
                f"output {name}: relative L2 error {error:.1e}, limit {settings['tolerance']:.0e}, "
                f"worst at sample {worst}{advice}"
            )
        measured[name] = {"relative_l2": error}
        if expected.ndim == 2 and expected.shape[1] > 1:
            named = np.take_along_axis(expected, found[name].argmax(axis=1)[:, None], axis=1)[:, 0]
            lead = expected.max(axis=1) - named
            agreement = float((lead <= settings["tolerance"] * np.sqrt((expected**2).mean(axis=1))).mean())
            if judge and agreement < settings["top1"]:
                raise UserError(
                    f"output {name}: top-1 agrees for {agreement:.0%} of the samples, "
                    f"limit {settings['top1']:.0%}{advice}"
                )
            measured[name]["top1"] = agreement
    return measured


def doubts(reference: "IterationResult", random_weights: bool) -> str | None:
    """Why agreement with this reference proves nothing, None where it does prove something."""
    import numpy as np

    if random_weights:
        return "random weights"
    for name, output in exact(reference).items():
        if len(output) < 2:
            return "a single sample"
        spread = np.linalg.norm(output - output.mean(axis=0)) / max(float(np.linalg.norm(output)), 1e-30)
        if spread < DEGENERATE:
            return f"output {name} is the same for all samples (spread {spread:.0e})"
    return None
