"""measure: an artifact on the accuracy samples, beside the reference -> model.*.measured.json

samples.json ─► artifact ─► Polygraphy: every output, every sample ─► figures, without a judgement (see accuracy.py)
"""

import functools
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from build_tasks import machine, metrics, pictures, threads
from build_tasks.compare import INPUT, OUTPUT, onnx_session, reduced_session
from build_tasks.digests import digest
from build_tasks.spec import Model
from build_tasks.stage import Notes, Paths, Settings, Stage, code_of, nothing

if TYPE_CHECKING:
    import numpy as np
    from polygraphy.comparator import IterationResult

BATCH = 8

Run = Callable[["np.ndarray"], "list[np.ndarray]"]
Each = Callable[[Run, "list[np.ndarray]"], Iterable["list[np.ndarray]"]]  # the answers to batches, in order

# How an artifact is run, and which distributions that takes.
RUNNERS = {
    "torchscript": ("torch", "polygraphy"),
    "cast": ("torch", "polygraphy"),
    "onnx": ("onnxruntime", "polygraphy"),
    "graph": ("onnx", "onnxruntime", "polygraphy"),
    "tensorrt": ("polygraphy",),
}


def task(model: Model, format: str, file: str) -> dict[str, Any]:
    """Of an artifact that is served."""
    runner = "cast" if format == "torchscript" and model.cast else format
    stage = _stage(model, model.served_as(format, file), runner, file)
    return stage.task(doc=f"{file} beside {model.reference} on the accuracy samples")


def task_of_graph(model: Model, precision: str) -> dict[str, Any]:
    """Of a graph that engines are compiled from, where it is no artifact that is served."""
    file = model.graph_in(precision)
    runner = "onnx" if file == "model.onnx" else "graph"
    stage = _stage(model, model.graph_name(precision), runner, file)
    return stage.task(doc=f"{file} beside {model.reference} on the accuracy samples, in ONNX Runtime")


def _stage(model: Model, name: str, runner: str, file: str) -> Stage:
    plan = runner == "tensorrt"
    truth = model.spec.accuracy.truth
    shown = {
        **({"truth": model.source(truth)} if truth and truth != pictures.FOLDERS else {}),
        **({"labels": model.artifact("labels.txt")} if truth and model.spec.labels else {}),
    }
    return Stage(
        name=f"measure:{name}",
        model=model,
        build=build,
        inputs={
            "model": model.artifact(file),
            "signature": model.artifact(f"{file}.signature.json"),
            "samples": model.artifact("samples.json"),
            "names": model.artifact("samples.txt"),
            "reference": model.artifact("reference.json"),
            **shown,
        },
        outputs={"measured": model.artifact(f"{file}.measured.json")},
        images=BATCH * threads.AT_ONCE,
        settings={"runner": runner, "truth": truth, "top_k": model.spec.output.top_k},
        tools=RUNNERS[runner],
        code=code_of(
            *("measure", "metrics", "pictures", "compare", "architecture", "digests", "threads"),
            *(("compiler",) if plan else ("script",) if runner == "cast" else ()),
        ),
        lacking=functools.partial(machine.lacking, model.plans[file]) if plan else nothing,
        facts=machine.facts if plan else dict,
    )


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    with open(inputs["signature"], encoding="utf-8") as file:
        signature = json.load(file)
    if settings["runner"] == "tensorrt":
        from build_tasks import compiler

        run = compiler.session(inputs["model"], signature)
    else:
        runners = {"torchscript": torchscript, "cast": cast, "onnx": onnx_session, "graph": reduced_session}
        run = runners[settings["runner"]](inputs["model"])
    known = Reference(inputs)
    each = map if settings["runner"] == "tensorrt" else threads.each  # a GPU is one
    measured = {
        "model": digest(inputs["model"]),  # what the figures are of: who reads them asks for it
        "signature": digest(inputs["signature"]),
        "reference": digest(inputs["reference"]),
        **known.measure(run, *batch_sizes(signature), settings["top_k"], _truth(inputs, settings, known.names), each),
    }
    with open(outputs["measured"], "w", encoding="utf-8") as file:
        json.dump(measured, file, indent=1, allow_nan=False)
    return told(measured)


class Reference:
    """The samples, and what PyTorch answers to them, as the reference stage keeps them."""

    def __init__(self, inputs: Paths):
        from polygraphy.comparator import RunResults
        from polygraphy.json import load_json

        self.samples: np.ndarray = load_json(inputs["samples"])[0][INPUT]
        with open(inputs["names"], encoding="utf-8") as file:
            self.names = file.read().split("\n")[:-1]  # and not at every character that Unicode calls a line's end
        results = RunResults.load(inputs["reference"])
        self.answers: IterationResult
        self.moved: IterationResult
        self.answers, self.moved = (results[index][1][0] for index in range(2))

    def measure(
        self,
        run: Run,
        smallest: int,
        largest: int,
        top_k: int | None,
        truth: metrics.Truth | None = None,
        each: Each = map,
    ) -> dict[str, Any]:
        """The figures of an artifact that is run, from a batch to its outputs, by batches of at least and at most."""
        from polygraphy.comparator import IterationResult

        answers = answered(run, self.samples, smallest, largest, each)
        found = IterationResult({OUTPUT.format(index): answer for index, answer in enumerate(answers)})
        best = (OUTPUT.format(0), OUTPUT.format(1)) if top_k else None
        return {
            "samples": len(self.samples),
            "distinct": metrics.distinct(self.samples),
            "outputs": metrics.measure(found, self.answers, self.moved, self.names, truth, best),
        }


def told(measured: dict[str, Any]) -> Notes:
    """What is worth a line: the largest error, and the classes that change."""
    outputs = measured["outputs"].values()
    if wrong := [output["wrong"] for output in outputs if "wrong" in output]:
        return {"wrong": wrong[0]}
    notes: Notes = {"error": max(output["relative_l2"] for output in outputs)}
    for output in outputs:
        if "turned" in output:
            notes.setdefault("top-1", f"{output['samples'] - len(output['turned'])} of {output['samples']}")
    return notes


def _truth(inputs: Paths, settings: Settings, names: list[str]) -> metrics.Truth | None:
    if settings["truth"] is None:
        return None
    labels = None
    if "labels" in inputs:
        with open(inputs["labels"], encoding="utf-8") as file:
            labels = file.read().splitlines()
    return pictures.truth(inputs.get("truth", pictures.FOLDERS), names, labels)


def torchscript(path: str) -> Run:
    """model.pt as a function from a batch to its outputs."""
    import torch

    from build_tasks import architecture

    module = torch.jit.load(path)
    return lambda batch: [answer.numpy() for answer in architecture.forward(module, torch.from_numpy(batch))]


def cast(path: str) -> Run:
    """model.fp16.pt, say, likewise; with the rounding that a GPU would do."""
    import torch

    from build_tasks import architecture, script

    module = functools.partial(script.rounding, torch.jit.load(path))
    return lambda batch: [answer.numpy() for answer in architecture.forward(module, torch.from_numpy(batch))]


def batch_sizes(signature: dict[str, Any]) -> tuple[int, int]:
    """The smallest and the largest batch of the samples that the artifact takes at once."""
    tensor = signature["inputs"][0]
    if profile := signature.get("profile"):
        return profile[tensor["name"]]["min"][0], profile[tensor["name"]]["max"][0]
    return (1, BATCH) if tensor["shape"][0] == -1 else (tensor["shape"][0], tensor["shape"][0])


def answered(run: Run, samples: "np.ndarray", smallest: int, largest: int, each: Each = map) -> "list[np.ndarray]":
    """The outputs for all samples, in batches that the artifact takes; too small a last one is filled with repeats."""
    import numpy as np

    size = min(max(BATCH, smallest), largest)

    def asked(batch: "np.ndarray") -> "list[np.ndarray]":
        filled = np.resize(batch, (max(len(batch), smallest), *batch.shape[1:]))
        return [answer[: len(batch)] for answer in run(np.ascontiguousarray(filled))]

    parts = each(asked, [samples[start : start + size] for start in range(0, len(samples), size)])
    return [np.concatenate(answers) for answers in zip(*parts, strict=True)]
