"""repair: the fewest nodes to leave out of a precision so that the gate holds -> models/<model>/keep_fp32.lock

    effect of halves, quarters, … of the nodes ─► nodes in order of effect ─► fewest of the first that suffice
                                                                               └► each of them tried without

In fp16 and bf16 graphs such nodes stay in fp32; in int8 and fp8 graphs they are not quantised. The lock file belongs to
the spec: the precision stage reads it, and it is worth a commit. A locked set that still suffices stays as it is.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError
from build_tasks.formats import node_precision, reduced_precision
from build_tasks.formats.onnx_files import onnx_file, save_onnx
from build_tasks.formats.onnx_runtime import ONNX_MODULES, reduced_session, session_without_optimizations
from build_tasks.json_files import read_json, write_json
from build_tasks.runtime import atomic_files, progress
from build_tasks.runtime.digests import digest
from build_tasks.runtime.distributions import installed_version
from build_tasks.runtime.fingerprint import imported_digests
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec import overrides
from build_tasks.spec.model import Model
from build_tasks.verification import gate, node_sensitivity, reference_outputs
from build_tasks.verification.tolerance import float_outputs, max_relative_error, tolerance

if TYPE_CHECKING:
    import onnx

STEPS = 48  # conversions that are judged, at most
PROBED = 4  # samples, for an effect

# The modules that decide what is measured.
MEASURING = (
    "build_tasks.formats.node_precision",
    "build_tasks.formats.reduced_precision",
    "build_tasks.verification.metrics",
    "build_tasks.verification.node_sensitivity",
    "build_tasks.verification.reference_outputs",
    "build_tasks.verification.tolerance",
    *ONNX_MODULES,
)

HEADER = """\
# Nodes that are left out of a precision so that the accuracy gate holds: fp32 in fp16 and bf16 graphs, not quantised in
# int8 and fp8 graphs. Found by `doit repair:{}`. It belongs to the spec; delete it to look for another set.
"""


def task(model: Model) -> dict[str, Any]:
    engine = model.spec.engine
    stage = Stage(
        name=f"repair:{model.name}",
        model=model,
        build=build,
        inputs={
            **reduced_precision.inputs_of(model, engine.precision),
            "samples": model.artifact("samples.json"),
            "names": model.artifact("samples.txt"),
            "reference": model.artifact("reference.json"),
            "signature": model.artifact("model.onnx.signature.json"),
        },
        outputs={"lock": model.source(reduced_precision.LOCK_FILE)},
        peak_batch=reference_outputs.BATCH,
        settings={
            **reduced_precision.settings_of(model, engine.precision),
            **gate.settings_of(model, "graph", engine.precision),
            "top_k": model.spec.output.top_k,
            "lock": model.source(reduced_precision.LOCK_FILE),
            "cache": model.artifact("repair"),
        },
        tools=(*reduced_precision.tools_of(model, engine.precision), "polygraphy"),
        modules=(
            __name__,
            *MEASURING,
            *gate.GATE_MODULES,
            *reduced_precision.source_modules(model, engine.precision),
        ),
        source_files=reduced_precision.user_source_files(model, engine.precision),
    )
    doc = f"{reduced_precision.LOCK_FILE}: the fewest nodes to leave out of {engine.precision} so that the gate holds"
    task = stage.task(doc=doc, params=overrides.params("repair"))
    task["clean"] = []  # it is the user's, as the spec is
    if not engine.repair:
        task["targets"] = []  # on demand: what reads the lock file must not bring about that it is made
    return task


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import onnx

    tables = reduced_precision.read_lock(settings["lock"])
    source = onnx.load(onnx_file(inputs["model.onnx"]))
    trial = Trial(inputs, settings, source, os.path.dirname(outputs["lock"]))
    before = starting_point(settings, source)
    nodes = [node.name for node in source.graph.node if node.op_type != "Constant"]
    refusal = trial(before)
    if refusal is None:
        spared = before
    elif before and trial([]) is None:
        spared = []
    else:
        if doubt := gate.untestable_reason(trial.measured, settings):
            raise UserError(f"samples that prove nothing repair nothing: {doubt}")
        limit = tolerance(settings["precision"], max(sensitivities(trial.measured)))
        spared = fewest(trial, node_sensitivity.rank_nodes(trial.probe(), nodes, limit, tell))
    if trial.nothing_left(spared):
        raise UserError(f"the gate holds only where nothing is {settings['precision']}: choose another precision")
    tables[settings["precision"]] = reduced_precision.LockedNodes(sorted(spared))
    write(outputs["lock"], settings["model"], tables)
    share = len(spared) / len(nodes)
    cut = ", the bound: delete the lock file and repeat, to go on" if trial.steps >= STEPS else ""
    return {
        settings["precision"]: f"{len(spared)} of {len(nodes)} nodes spared ({share:.1%}), {trial.steps} steps{cut}",
        "error": max(output["relative_l2"] for output in trial.measured["outputs"].values()),
        "table": "\n".join(f"    {name}" for name in spared) or "    the gate holds as it is: nothing to spare",
    }


def sensitivities(measured: dict[str, Any]) -> list[float]:
    return [output.get("sensitivity", 0.0) for output in measured["outputs"].values()]


def starting_point(settings: Settings, source: "onnx.ModelProto") -> list[str]:
    """What is locked already, if the graph still has those nodes."""
    try:
        return reduced_precision.locked_nodes(settings["lock"], settings["precision"], source)
    except UserError:
        return []


class Trial:
    """Whether the gate holds for a set of spared nodes: a real conversion, all samples, the gate itself.

    A conversion is a step; one that was made before is none.

    What is measured is kept in build/<model>/repair/, by what it depends on, so that a search that was cut goes on, and
    another gate measures nothing anew.
    """

    def __init__(self, inputs: Paths, settings: Settings, source: "onnx.ModelProto", folder: str):
        self.batches = reference_outputs.batch_sizes(read_json(inputs["signature"]))
        self.settings, self.source, self.folder = settings, source, folder
        self.known = reference_outputs.Reference(inputs)
        self.calibration = reduced_precision.calibration_samples(inputs, settings)
        self.steps = 0
        self.vain: set[tuple[str, ...]] = set()  # the sets that leave nothing in the precision
        self.measured: dict[str, Any] = {}  # of the last set that held, or of the first that did not
        judged = ("gate", "allow_untestable", "random_weights", "format", "cache", "lock")
        recipe = {key: value for key, value in settings.items() if key not in judged}
        tools = {tool: installed_version(tool) for tool in ("nvidia-modelopt", "onnx", "onnxruntime", "polygraphy")}
        digests = [[digest(path) for path in inputs.values()], imported_digests(MEASURING)]
        self.recipe = json.dumps([recipe, tools, digests], sort_keys=True)

    def __call__(self, spared: Iterable[str]) -> str | None:
        """Why the gate refuses the graph with these nodes spared; None if it holds."""
        names, before = sorted(spared), self.steps
        measured = self._kept("step", names, self._measured)
        refusal: str | None
        if "wrong" in measured:
            refusal = said = measured["wrong"]
        elif "vain" in measured:  # as accurate as can be, and not what was asked for
            self.vain.add(tuple(names))
            refusal, said = None, "nothing is left in this precision"
        else:
            refusal = gate.gate_error(measured, self.settings, advice="")
            said = refusal.partition(" (and ")[0] if refusal else "the gate holds"
            if refusal is None or not self.measured:
                self.measured = measured
        step = f"step {self.steps} of at most {STEPS}" if self.steps > before else "known from before"
        tell(f"{step}, nodes spared: {len(names)}: {said}")
        return refusal

    def _kept(self, kind: str, names: list[str], measure: Callable[[list[str]], Any]) -> Any:
        """`measure(names)`, or what it said before."""
        key = hashlib.sha256(f"{self.recipe}{names}".encode()).hexdigest()[:24]
        path = f"{self.settings['cache']}/{self.settings['precision']}.{kind}.{key}.json"
        try:
            return read_json(path)
        except (OSError, ValueError):
            value = measure(names)
        with atomic_files.scratch_dir() as folder:
            write_json(f"{folder}/kept.json", value)
            atomic_files.replace(f"{folder}/kept.json", path)
        return value

    def nothing_left(self, spared: Iterable[str]) -> bool:
        return tuple(sorted(spared)) in self.vain

    def _measured(self, spared: list[str]) -> dict[str, Any]:
        self.steps += 1
        try:
            graph = reduced_precision.convert_graph(self.source, self.calibration, self.settings, spared, self.folder)
        except UserError as error:
            if not spared:
                raise  # it is not the set that is wrong
            return {"vain" if isinstance(error, reduced_precision.NothingToQuantizeError) else "wrong": str(error)}
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            save_onnx(graph, f"{folder}/model.onnx", external_data=False)
            run = reduced_session(f"{folder}/model.onnx")
        return self.known.measure(run, *self.batches, self.settings["top_k"])

    def probe(self) -> "Callable[[Iterable[str]], float]":
        """The function from some nodes to how far the outputs move when only those are in the precision.

        It emulates the precision on a few samples, and so is faster than a conversion.
        """
        import numpy as np

        batch = self.known.samples[:PROBED]
        if fixed := self.source.graph.input[0].type.tensor_type.shape.dim[0].dim_value:
            batch = np.resize(batch, (fixed, *batch.shape[1:]))
        if self.calibration is None:
            reduced = node_precision.emulate_nodes(self.source, self.settings["precision"])
        else:
            whole = reduced_precision.convert_graph(
                self.source, self.calibration, self.settings, [], self.folder, rest="fp32"
            )
            reduced = functools.partial(node_precision.keep_qdq_for, whole)
        expected = float_outputs(session_without_optimizations(self.source)(batch))

        def effect(nodes: list[str]) -> float:
            return max_relative_error(
                float_outputs(session_without_optimizations(reduced(set(nodes)))(batch)), expected
            )

        return lambda nodes: float(self._kept("effect", sorted(nodes), effect))


def fewest(trial: Trial, ordered: list[str]) -> list[str]:
    """A set of nodes without which the gate holds. UserError where there is none.

    None of them can be left out, unless the steps ran out before that was known.
    """
    fails, holds = 0, 1
    while trial(ordered[:holds]) is not None:
        if holds == len(ordered):
            raise UserError(
                f"even with every node spared the gate fails: {trial(ordered)}; what fails is not the precision"
            )
        fails, holds = holds, min(4 * holds, len(ordered))
    while holds - fails > 1:
        middle = (fails + holds) // 2
        fails, holds = (fails, middle) if trial(ordered[:middle]) is None else (middle, holds)
    spared = ordered[:holds]
    size = len(spared) // 2
    while size and trial.steps < STEPS:  # the last node that was added is needed, but not every one before it
        for start in range(len(spared) - size, -1, -size):
            fewer = spared[:start] + spared[start + size :]
            if len(spared) > 1 and trial.steps < STEPS and trial(fewer) is None:
                spared = fewer
        size //= 2
    return spared


def write(path: str, model: str, tables: dict[str, reduced_precision.LockedNodes]) -> None:
    """The lock file; a precision that spares nothing is not in it."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(HEADER.format(model))
        for name, table in sorted(tables.items()):
            if table.keep_fp32:
                lines = "".join(f"    {json.dumps(node)},\n" for node in table.keep_fp32)
                file.write(f"\n[{name}]\nkeep_fp32 = [\n{lines}]\n")


def tell(line: str) -> None:
    """Progress, for whoever is watching."""
    print(line, flush=True)
    progress.emit(f"    {line}")
