"""The class of each sample by the reference and by every artifact, with a small picture of the sample."""

import base64
import io

from build_tasks.report.records import GateRow, SampleCell, SampleRow, SampleTable
from build_tasks.spec.model import Model
from build_tasks.verification import accuracy_samples
from build_tasks.verification.judged_artifacts import JudgedOutput

MAX_SAMPLES = 24  # with a picture; together they take some dozens of kB
THUMBNAIL_PIXELS = 96  # the page shows 48, which a screen of double density draws with 96


def sample_table(model: Model, gate_results: list[GateRow]) -> SampleTable | None:
    """The class of each sample. Samples that any artifact puts into another class come first.

    None if no output names classes, or if the names of the samples are unknown.
    """
    columns = [
        (row, name, output) for row in gate_results for name, output in row.outputs.items() if "top1_changes" in output
    ]
    names, labels = read_lines(model.artifact("samples.txt")), read_lines(model.artifact("labels.txt"))
    if not columns or len(names) != columns[0][2]["samples"]:
        return None

    def label(index: int) -> str:
        return labels[index] if index < len(labels) else f"class {index}"

    def cell(row: GateRow, output_name: str, output: JudgedOutput, sample: int) -> SampleCell:
        changes = {change["sample"]: change for change in output["top1_changes"]}
        change = changes.get(names[sample])
        margin = change["margin"] if change else 0.0
        return SampleCell(
            label=label(change["artifact_class"]) if change else None,
            margin=margin,
            is_tie=margin <= row.tie_tolerances[output_name],
            error=output["errors"][sample],
        )

    rows = [
        SampleRow(names[sample], index, label(index), [cell(*column, sample) for column in columns])
        for sample, index in enumerate(columns[0][2]["classes"])
    ]
    rows.sort(key=lambda row: not row.changed)
    source = accuracy_samples.samples_source(model) or accuracy_samples.RANDOM_SAMPLES
    with_picture, others = rows[:MAX_SAMPLES], rows[MAX_SAMPLES:]
    for row in with_picture:
        if not source.endswith((*accuracy_samples.TENSOR_SUFFIXES, accuracy_samples.RANDOM_SAMPLES)):
            ending = "" if source == accuracy_samples.SHIPPED_PHOTOGRAPHS else (model.spec.input.files or [""])[0]
            row.picture = thumbnail(f"{source}/{row.name}{ending}")
    return SampleTable(
        artifacts=[row.artifact for row, *_ in columns],
        rows=with_picture,
        others=len(others),
        others_changed=sum(row.changed for row in others),
        changed=sum(row.changed for row in rows),
        total=len(rows),
        source=source,
    )


def thumbnail(path: str) -> str | None:
    """The middle of a picture, as a square in a data: URI; None without Pillow, or if the picture is refused."""
    try:
        from PIL import ImageOps

        from build_tasks.triton.preprocess_model.preprocessing import PictureError, decode
    except ImportError:
        return None
    try:
        picture = decode(path, formats=accuracy_samples.PICTURE_FORMATS)
    except PictureError:
        return None
    small = ImageOps.fit(picture, (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=70)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_lines(path: str) -> list[str]:
    """The lines of a text file below build/; none if there is no file, or a broken one."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().split("\n")[:-1]
    except (OSError, ValueError):
        return []
