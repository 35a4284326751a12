"""repair: the fewest nodes to exclude from a precision so that the gate holds -> models/<model>/keep_fp32.lock

    effect of halves, quarters, … of the nodes ─► nodes in order of effect ─► the first nodes that are enough
                                                                                └► without unnecessary nodes

Excluded nodes stay in fp32 in fp16 and bf16 graphs, and are not quantized in int8 and fp8 graphs. The lock file is a
part of the spec: the precision stage reads it, and it should be committed. If the nodes in an existing lock file are
still enough, it stays as it is.
"""

import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from build_tasks.errors import UserError
from build_tasks.formats import lock_file, reduced_precision
from build_tasks.formats.declarations import ONNX_MODULES
from build_tasks.json_files import read_json, write_json
from build_tasks.runtime import atomic_files, progress
from build_tasks.runtime.digests import digest
from build_tasks.runtime.distributions import installed_version
from build_tasks.runtime.fingerprint import imported_digests
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec import overrides
from build_tasks.spec.model import Model
from build_tasks.tensors import resize, take
from build_tasks.verification import gate, metrics, reference_outputs
from build_tasks.verification.class_outputs import class_outputs

if TYPE_CHECKING:
    import onnx

MAX_STEPS = 48  # conversions of the graph in one search
EFFECT_SAMPLES = 4  # number of samples on which the effect of nodes is measured

# The modules that affect the measured figures.
MEASURE_MODULES = (
    "build_tasks.formats.node_precision",
    "build_tasks.formats.reduced_precision",
    "build_tasks.verification.metrics",
    "build_tasks.verification.node_sensitivity",
    "build_tasks.verification.reference_outputs",
    "build_tasks.verification.sample_groups",
    "build_tasks.verification.tolerance",
    *ONNX_MODULES,
)


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
        outputs={"lock": model.source(lock_file.LOCK_FILE)},
        peak_batch=reference_outputs.BATCH,
        settings={
            **reduced_precision.settings_of(model, engine.precision),
            **gate.settings_of(model, "graph", engine.precision),
            "top_k": model.spec.output.top_k,
            "class_outputs": class_outputs(model),
            "lock": model.source(lock_file.LOCK_FILE),
            "cache": model.artifact("repair"),
        },
        tools=(*reduced_precision.tools_of(model, engine.precision), "polygraphy"),
        modules=(
            __name__,
            "build_tasks.formats.lock_file",
            *MEASURE_MODULES,
            *gate.GATE_MODULES,
            *reduced_precision.source_modules(model, engine.precision),
        ),
        source_files=reduced_precision.user_source_files(model, engine.precision),
        names_model=True,
    )
    doc = f"{lock_file.LOCK_FILE}: the fewest nodes to exclude from {engine.precision} so that the gate holds"
    task = stage.task(doc=doc, params=overrides.params("repair"))
    task["clean"] = []  # the lock file is the user's, like the spec
    if not engine.repair:
        task["targets"] = []  # on demand only: the precision stage reads the lock file, and must not start this task
    return task


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import onnx

    from build_tasks.formats.onnx_files import onnx_file
    from build_tasks.verification import node_sensitivity
    from build_tasks.verification.tolerance import tolerance

    tables, lock = lock_file.read_lock(settings["lock"]), settings["lock"]
    source = onnx.load(onnx_file(inputs["model.onnx"]))
    trial = Trial(inputs, settings, source, os.path.dirname(outputs["lock"]))
    locked = locked_nodes(settings, source)
    nodes = [node.name for node in source.graph.node if node.op_type != "Constant"]
    if trial(locked) is None:
        excluded = locked
    elif locked and trial([]) is None:
        excluded = []
    else:
        if error := lock_file.overwrite_error(lock):
            raise UserError(error)
        if reason := gate.untestable_reason(trial.measured, settings):
            raise UserError(f"the samples cannot show which nodes to exclude: {reason}")
        limit = tolerance(settings["precision"], max(sensitivities(trial.measured)))
        excluded = fewest_nodes(trial, node_sensitivity.rank_nodes(trial.effect_of_nodes(), nodes, limit, log))
    if trial.leaves_nothing(excluded):
        raise UserError(
            f"engine.precision: the gate holds only if no node is {settings['precision']}; choose another precision"
        )
    tables[settings["precision"]] = lock_file.LockedNodes(sorted(excluded))
    if excluded == locked and lock_file.overwrite_error(lock):
        atomic_files.copy(lock, outputs["lock"])
    elif error := lock_file.overwrite_error(lock):
        raise UserError(error)
    else:
        lock_file.write_lock(outputs["lock"], settings["model"], tables)
    share = len(excluded) / len(nodes)
    limited = ", the limit: delete the lock file and repeat to continue" if trial.steps >= MAX_STEPS else ""
    return {
        settings["precision"]: (
            f"{len(excluded)} of {len(nodes)} nodes excluded ({share:.1%}), {trial.steps} steps{limited}"
        ),
        "error": max(output["relative_l2"] for output in trial.measured["outputs"].values()),
        "table": "\n".join(f"    {name}" for name in excluded) or "    the gate holds as it is: no node is excluded",
    }


def sensitivities(measured: metrics.Measurements) -> list[float]:
    return [output.get("sensitivity", 0.0) for output in measured["outputs"].values()]


def locked_nodes(settings: Settings, source: "onnx.ModelProto") -> list[str]:
    """The nodes in the existing lock file; none if the graph no longer has all of them."""
    try:
        return lock_file.locked_nodes(settings["lock"], settings["precision"], source)
    except UserError:
        return []


class Trial:
    """Tests whether the gate holds for a set of excluded nodes, by a real conversion on all samples.

    Every conversion is a step. Its figures are saved in build/<model>/repair/ under a digest of everything that they
    depend on, and are not measured again. So an interrupted search continues, and a changed gate needs no new
    conversions.

    Attributes:
        steps: Number of conversions so far.
        empty_sets: The sets of excluded nodes that leave no node in the precision.
        measured: The figures of the last set for which the gate held, otherwise of the first set.
    """

    def __init__(self, inputs: Paths, settings: Settings, source: "onnx.ModelProto", folder: str):
        self.batches = reference_outputs.batch_sizes(read_json(inputs["signature"]))
        self.settings, self.source, self.folder = settings, source, folder
        self.reference = reference_outputs.Reference(inputs)
        self.calibration = reduced_precision.calibration_samples(inputs, settings)
        self.steps = 0
        self.empty_sets: set[tuple[str, ...]] = set()
        self.measured = cast(metrics.Measurements, {})
        # These settings do not affect the measured figures.
        irrelevant = ("gate", "allow_untestable", "random_weights", "format", "cache", "lock")
        relevant = {key: value for key, value in settings.items() if key not in irrelevant}
        tools = {tool: installed_version(tool) for tool in ("nvidia-modelopt", "onnx", "onnxruntime", "polygraphy")}
        digests = [[digest(path) for path in inputs.values()], imported_digests(MEASURE_MODULES)]
        self.fingerprint = json.dumps([relevant, tools, digests], sort_keys=True)

    def __call__(self, excluded: Iterable[str]) -> str | None:
        """The reason why the gate refuses the graph with these nodes excluded; None if it passes."""
        names, steps_before = sorted(excluded), self.steps
        measured = self._cached("step", names, self._measure)
        error: str | None
        if "wrong" in measured:
            error = message = measured["wrong"]
        elif "empty" in measured:  # the outputs are exact, but no node has the precision any more
            self.empty_sets.add(tuple(names))
            error, message = None, "no node is left in this precision"
        else:
            error = gate.gate_error(measured, self.settings, advice="")
            message = error.partition(" (and ")[0] if error else "the gate holds"
            if error is None or not self.measured:
                self.measured = measured
        step = f"step {self.steps} of at most {MAX_STEPS}" if self.steps > steps_before else "measured before"
        log(f"{step}, nodes excluded: {len(names)}: {message}")
        return error

    def _cached(self, kind: str, names: list[str], measure: Callable[[list[str]], Any]) -> Any:
        """The result of `measure(names)`, from the file of an earlier call if there is one."""
        key = hashlib.sha256(f"{self.fingerprint}{names}".encode()).hexdigest()[:24]
        path = f"{self.settings['cache']}/{self.settings['precision']}.{kind}.{key}.json"
        try:
            return read_json(path)
        except (OSError, ValueError):
            value = measure(names)
        with atomic_files.scratch_dir() as folder:
            write_json(f"{folder}/value.json", value)
            atomic_files.replace(f"{folder}/value.json", path)
        return value

    def leaves_nothing(self, excluded: Iterable[str]) -> bool:
        """Whether no node has the precision any more. The result is known only for a set that was tested."""
        return tuple(sorted(excluded)) in self.empty_sets

    def _measure(self, excluded: list[str]) -> metrics.Measurements | dict[str, str]:
        """The figures of the converted graph, or {"empty": reason} or {"wrong": reason} if there are none."""
        from build_tasks.formats.onnx_files import save_onnx
        from build_tasks.formats.onnx_runtime import reduced_session

        self.steps += 1
        try:
            graph = reduced_precision.convert_graph(self.source, self.calibration, self.settings, excluded, self.folder)
        except UserError as error:
            if not excluded:
                raise  # the excluded nodes are not the cause
            return {"empty" if isinstance(error, reduced_precision.NothingToQuantizeError) else "wrong": str(error)}
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            save_onnx(graph, f"{folder}/model.onnx", external_data=False)
            run = reduced_session(f"{folder}/model.onnx")
        return self.reference.measure(
            run, *self.batches, self.settings["top_k"], class_names=self.settings["class_outputs"]
        )

    def effect_of_nodes(self) -> Callable[[Iterable[str]], float]:
        """A function from some nodes to the error of the outputs when only those nodes are in the precision.

        The error is infinite if an output is not finite. The function emulates the precision on a few samples. That
        is faster than a conversion.
        """
        from build_tasks.formats import node_precision
        from build_tasks.formats.onnx_runtime import session_without_optimizations
        from build_tasks.verification.tolerance import float_outputs, max_relative_error

        batch = take(self.reference.groups[0], slice(EFFECT_SAMPLES))
        if fixed := self.source.graph.input[0].type.tensor_type.shape.dim[0].dim_value:
            batch = resize(batch, fixed)
        if self.calibration is None:
            reduced = node_precision.emulate_nodes(self.source, self.settings["precision"])
        else:
            whole = reduced_precision.convert_graph(
                self.source, self.calibration, self.settings, [], self.folder, other_precision="fp32"
            )
            reduced = functools.partial(node_precision.keep_qdq_for, whole)
        expected = float_outputs(session_without_optimizations(self.source)(batch))

        def measure(nodes: list[str]) -> float | None:
            outputs = float_outputs(session_without_optimizations(reduced(set(nodes)))(batch))
            error = max_relative_error(outputs, expected)
            return error if math.isfinite(error) else None  # JSON has no infinity

        def effect(nodes: Iterable[str]) -> float:
            error = self._cached("effect", sorted(nodes), measure)
            return math.inf if error is None else float(error)

        return effect


def fewest_nodes(trial: Trial, ordered: list[str]) -> list[str]:
    """A set of nodes that is enough to exclude, and in which each node is needed.

    If the steps run out, the set is enough, but may hold nodes that are not needed.

    Args:
        ordered: All nodes, those with the largest effect first.
    Raises:
        UserError: If the gate fails even with all nodes excluded.
    """
    fails, holds = 0, 1  # the gate fails with this many of the first nodes excluded, and holds with that many
    while trial(ordered[:holds]) is not None:
        if holds == len(ordered):
            raise UserError(
                f"the gate fails even with every node excluded, so the precision is not the cause: {trial(ordered)}",
                limit=None,
            )
        fails, holds = holds, min(4 * holds, len(ordered))
    while holds - fails > 1:
        middle = (fails + holds) // 2
        fails, holds = (fails, middle) if trial(ordered[:middle]) is None else (middle, holds)
    excluded = ordered[:holds]
    size = len(excluded) // 2
    while size and trial.steps < MAX_STEPS:  # the last of these nodes is needed, but perhaps not all before it
        for start in range(len(excluded) - size, -1, -size):
            fewer = excluded[:start] + excluded[start + size :]
            if len(excluded) > 1 and trial.steps < MAX_STEPS and trial(fewer) is None:
                excluded = fewer
        size //= 2
    return excluded


def log(line: str) -> None:
    """Print a line of progress to the log of the stage, and show it on the terminal."""
    print(line, flush=True)
    progress.emit(f"    {line}")
