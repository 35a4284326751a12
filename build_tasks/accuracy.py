"""accuracy: an artifact on the accuracy samples, against the reference -> model.*.accuracy.json

samples.json ─► artifact ─► Polygraphy: relative L2 error of every output, and top-1 ─► ok | not testable | refused
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from build_tasks.compare import INPUT, OUTPUT, onnx_session
from build_tasks.digests import digest
from build_tasks.errors import UserError
from build_tasks.spec import FORMATS, Model
from build_tasks.stage import Notes, Paths, Settings, Stage, code_of

if TYPE_CHECKING:
    import numpy as np
    from polygraphy.comparator import IterationResult

BATCH = 8
DEGENERATE = 1e-3  # spread of an output over the samples, relative to its size, under which it says nothing

TOOLS = {"torchscript": ("torch", "polygraphy"), "onnx": ("onnxruntime", "polygraphy")}


def task(model: Model, format: str) -> dict[str, Any]:
    file = FORMATS[format].file
    accuracy = model.spec.accuracy
    stage = Stage(
        name=f"accuracy:{model.triton_name(format)}",
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
            "format": format,
            "tolerance": accuracy.tolerance,
            "top1": accuracy.top1,
            "allow_untestable": accuracy.allow_untestable,
            "random_weights": model.seed is not None,
        },
        tools=TOOLS[format],
        code=code_of("accuracy", "compare", "architecture", "digests"),
    )
    return stage.task(doc=f"{file} against PyTorch on the accuracy samples")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.json import load_json

    reference = next(iter(RunResults.load(inputs["reference"]).values()))[0]
    samples = load_json(inputs["samples"])[0][INPUT]
    with open(inputs["signature"], encoding="utf-8") as file:
        fixed_batch = json.load(file)["inputs"][0]["shape"][0]
    run = {"torchscript": torchscript, "onnx": onnx_session}[settings["format"]](inputs["model"])
    answers = answered(run, samples, fixed_batch if fixed_batch > 0 else None)
    found = IterationResult(
        {OUTPUT.format(index): answer for index, answer in enumerate(answers)}, runner_name=settings["format"]
    )
    measured = measure(found, reference, settings)
    doubt = doubts(reference, settings["random_weights"])
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


def answered(
    run: "Callable[[np.ndarray], list[np.ndarray]]", samples: "np.ndarray", fixed_batch: int | None
) -> "list[np.ndarray]":
    """The outputs for all samples; an artifact with a fixed batch sees the last ones filled up with repeats."""
    import numpy as np

    size = fixed_batch or BATCH
    parts = []
    for start in range(0, len(samples), size):
        batch = samples[start : start + size]
        filled = np.resize(batch, (size, *batch.shape[1:])) if fixed_batch else batch
        parts.append([answer[: len(batch)] for answer in run(np.ascontiguousarray(filled))])
    return [np.concatenate(answers) for answers in zip(*parts, strict=True)]


def exact(result: "IterationResult") -> "IterationResult":
    """The outputs as float64: a norm in fp16 overflows at 65504, and bool knows no difference."""
    import numpy as np
    from polygraphy.comparator import IterationResult

    outputs = {name: output.astype(np.float64) for name, output in result.items()}
    return IterationResult(outputs, runner_name=result.runner_name)


def measure(found: "IterationResult", reference: "IterationResult", settings: Settings) -> dict[str, dict[str, float]]:
    """Relative L2 error and top-1 agreement of each output. UserError where one is beyond its limit."""
    import numpy as np
    from polygraphy.comparator import L2CompareFunc

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
        if not results[name]:
            worst = int(np.argmax(np.abs(found[name] - expected).reshape(len(expected), -1).max(axis=1)))
            raise UserError(
                f"output {name}: relative L2 error {error:.1e}, limit {settings['tolerance']:.0e}, "
                f"worst at sample {worst}"
            )
        measured[name] = {"relative_l2": error}
        if expected.ndim == 2 and expected.shape[1] > 1:
            agreement = float((found[name].argmax(axis=1) == expected.argmax(axis=1)).mean())
            if agreement < settings["top1"]:
                raise UserError(
                    f"output {name}: top-1 agrees for {agreement:.0%} of the samples, limit {settings['top1']:.0%}"
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
