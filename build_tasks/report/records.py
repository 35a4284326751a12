"""The records that the report page consists of. The Jinja templates read their attributes.

ModelPage ─┬─ tasks        TaskRow         one box of the task graph; `graph` holds where it stands
           ├─ artifacts    ArtifactRow     one line of the overview
           ├─ gate_results GateRow         what the accuracy gate says of one artifact
           ├─ histograms   HistogramRow    the errors of its samples
           ├─ samples      SampleTable     the class of each sample
           ├─ node_errors  NodeErrors      the error after each node of a reduced-precision graph
           ├─ tensors, configs, durations
           └─ snapshot     ModelSnapshot   what the next report is compared with
"""

from typing import Any, NamedTuple

from msgspec import Struct, field

from build_tasks.bench.records import Run
from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.report import charts
from build_tasks.tensors import TensorSignature
from build_tasks.verification.judged_artifacts import JudgedOutput


class TaskRow(Struct):
    """One task of a model.

    Attributes:
        task: Name of the doit task.
        stage: The part of `task` before the colon.
        title: Short name for a box of the graph.
        band: The artifact that the task belongs to, by the name of its Triton model.
        reasons: Why the task would run, or cannot run.
        seconds: Duration of its last run, None if it never ran.
        file: Its first target.
        is_artifact: Whether that is an artifact, and not a record about one.
        size: Bytes of the target, None if it does not exist.
        sha256: Digest of the target, None if it does not exist.
        tools: Versions of the tools that built the target.
        missing: What this machine lacks to run the task, None if nothing.
        failure: Why the task failed when it ran last, and what to do; None if it did not fail.
        waits_for: The failed task that it depends on, None if there is none.
    """

    task: str
    stage: str
    title: str
    band: str
    state: TaskState
    reasons: list[str]
    seconds: float | None
    file: str
    is_artifact: bool
    size: int | None
    sha256: str | None
    tools: dict[str, str]
    missing: str | None
    failure: str | None = None
    waits_for: str | None = None


class Served(NamedTuple):
    """What the repository holds of a Triton model: its versions, and the release that they were checked for."""

    versions: list[int]
    release: str


class Speed(NamedTuple):
    """The figures of the last `doit bench` for one format.

    Attributes:
        images_per_s: The largest throughput.
        batch: The batch size of that throughput.
        p50_ms: The median latency at the smallest batch size that was measured.
        smallest_batch: That batch size.
        is_current: Whether the artifact is still the one that was measured; also where that is not known.
    """

    images_per_s: float
    batch: int
    p50_ms: float
    smallest_batch: int
    is_current: bool


class GateRow(Struct):
    """The measured figures of an artifact with the gate result for the limits of the current spec.

    Attributes:
        status: "ok", "refused" or "not testable".
        reason: Why it is not ok.
        outputs: The figures of each output.
        tie_tolerances: For each output that is measured, how far two classes may be apart in a near tie.
        error: The relative L2 error that is nearest to its limit, formatted. None if an output has no figures.
        limit: The limit of that error, formatted.
        device: "CPU", or the name of the GPU that ran it.
        traced_away: The lines of the user's code whose decisions it leaves out. None if there are none.
    """

    artifact: str
    file: str
    status: str
    reason: str | None
    outputs: dict[str, JudgedOutput]
    tie_tolerances: dict[str, float]
    error: str | None
    limit: str | None
    device: str
    traced_away: str | None


class ArtifactRow(Struct):
    """A Triton model, or a graph, in one line of the overview.

    Attributes:
        format: The format that Triton serves; None for a graph that it does not serve.
        state: The worst state of its tasks, in the order of `model_page.STATES`.
        size: Bytes of its artifacts, None if there are none.
        served: What the repository holds of it; None if it is not published.
        speed: None if it was not measured.
    """

    name: str
    format: str | None
    files: list[str]
    state: TaskState
    size: int | None
    gate_results: list[GateRow]
    served: Served | None
    speed: Speed | None


class HistogramRow(Struct):
    """The errors of all samples in one output of an artifact; `output` is None if the artifact has only one."""

    artifact: str
    output: str | None
    status: str
    errors: list[float]
    limit: float
    chart: charts.Histogram


class SampleCell(Struct):
    """The class that an artifact gives a sample.

    Attributes:
        label: The class, None if it is the one of the reference.
        margin: By how many RMS of the sample's outputs the reference prefers its own class.
        is_tie: Whether the gate ignores the change because the two classes are nearly equal.
        error: Relative L2 error of the sample.
    """

    label: str | None
    margin: float
    is_tie: bool
    error: float


class SampleRow(Struct):
    """One sample: its class by the reference, and a cell for each artifact; `picture` is a data: URI."""

    name: str
    class_index: int
    label: str
    cells: list[SampleCell]
    picture: str | None = None

    @property
    def changed(self) -> bool:
        return any(cell.label is not None for cell in self.cells)


class SampleTable(Struct):
    """The class of each sample.

    Attributes:
        artifacts: Titles of the columns.
        rows: The samples with a picture. Samples that change their class come first.
        others: Number of samples that the page only counts, and how many of these change their class.
        changed: Number of samples that change their class, of all samples.
        total: Number of all samples.
        source: Where the samples come from.
    """

    artifacts: list[str]
    rows: list[SampleRow]
    others: int
    others_changed: int
    changed: int
    total: int
    source: str


class NodeErrors(Struct):
    """The errors that `doit layers` measured; `worst` holds the nodes with the largest errors."""

    precision: str
    samples: int
    first_jump: str | None
    worst: list[dict[str, Any]]
    chart: charts.Curve


class TensorTable(Struct):
    """The tensors of an artifact; each row is ("input" or "output", the tensor)."""

    file: str
    rows: list[tuple[str, TensorSignature]]


class ConfigFile(Struct):
    """A config.pbtxt, by the name of its Triton model."""

    name: str
    text: str


class Durations(Struct):
    """The last run of each task. Tasks of less than `threshold` seconds are only counted."""

    tasks: list[TaskRow]
    others: int
    threshold: float
    total: float
    longest: float


class FileSnapshot(NamedTuple):
    sha256: str
    size: int | None  # bytes


class ModelSnapshot(Struct, forbid_unknown_fields=True):
    """The part of a report that the next report is compared with: the snapshot of one model.

    Attributes:
        files: By path.
        errors: The largest relative L2 error of each artifact's outputs, by file.
        statuses: The result of the gate, by file; `verdicts` in the JSON.
        tools: Versions, by distribution.
        seconds: Duration of the last run, by task.
    """

    files: dict[str, FileSnapshot]
    errors: dict[str, float]
    statuses: dict[str, str] = field(name="verdicts")
    tools: dict[str, str]
    seconds: dict[str, float]


class Snapshot(Struct):
    """The content of build/report.json: when the report was written (seconds since 1970), and its models."""

    written: float | None = None
    models: dict[str, ModelSnapshot] = {}  # a new one each, as msgspec has it


class Change(NamedTuple):
    """A difference from the last report; `subject` is a file, a tool or a task."""

    subject: str
    description: str


class ModelPage(Struct):
    """All that the page shows of one model.

    Attributes:
        random: Whether the weights are random.
        reference: What the artifacts are compared with.
        has_reduced_graph: Whether engines are compiled from a graph of reduced precision.
        bench: The last run of `doit bench`; None if there is none.
        missing: What this machine lacks to run tasks, each with the Triton models that need it.
        changes: Since the last report; None if this is the first one.
    """

    name: str
    spec: str
    formats: list[str]
    random: bool
    reference: str
    tasks: list[TaskRow]
    graph: charts.Graph
    artifacts: list[ArtifactRow]
    gate_results: list[GateRow]
    histograms: list[HistogramRow]
    samples: SampleTable | None
    has_reduced_graph: bool
    node_errors: NodeErrors | None
    tensors: list[TensorTable]
    configs: list[ConfigFile]
    bench: Run | None
    missing: dict[str, list[str]]
    durations: Durations
    snapshot: ModelSnapshot
    changes: list[Change] | None
