"""upgrade: what another release of Triton would mean for the models; it changes nothing

    specs, signatures in build/ ─┐
    releases.py, CHANGES        ─┴─► artifacts that stay, that are rebuilt, that cannot be loaded
                                     fields of config.pbtxt that mean another thing, keys that would be refused

It reads what is known about both releases (triton/release_table.py), and starts no server.
"""

import os
from collections.abc import Iterator
from typing import Any

from doit.exceptions import TaskFailed
from msgspec.structs import replace

from build_tasks.errors import UserError
from build_tasks.json_files import read_json
from build_tasks.spec.model import Model
from build_tasks.spec.serving_facts import facts_of
from build_tasks.spec.tables import RELEASE
from build_tasks.triton import releases
from build_tasks.triton.platforms import TRITON_MODELS
from build_tasks.triton.release_table import CHANGES, FIELDS_SINCE, RELEASES

LIBRARIES = {"tensorrt": "TensorRT", "onnxruntime": "ONNX Runtime", "pytorch": "PyTorch", "cuda": "CUDA"}
IN_FLIGHT_FIELD = "ModelEnsembling.max_inflight_requests"

# Results for an artifact.
STAYS, REBUILT, REFUSED, UNKNOWN, NOT_BUILT = "stays", "to rebuild", "cannot be loaded", "unknown", "not built"


def task(models: list[Model]) -> dict[str, Any]:
    """doit's task `upgrade`, as in `doit upgrade 26.11`."""
    return {
        "actions": [(upgrade, [models])],
        "pos_arg": "words",
        "io": {"capture": False},
        "doc": "On demand: what another release of Triton would mean, `doit upgrade 26.11`; changes nothing",
    }


def upgrade(models: list[Model], words: list[str]) -> TaskFailed | None:
    """doit's action: print what a release would mean. It fails if the release would not serve every model."""
    try:
        release = requested_release(words)
    except UserError as error:
        return TaskFailed(str(error))
    refused = []
    for current in sorted({model.release for model in models}):
        group = [model for model in models if model.release == current]
        print(f"\nTriton {current} -> {release}: {format_libraries(current, release)}", flush=True)
        if remark := releases.unknown(current):
            print(f"  {remark}")
        rows = [row for model in group for row in artifact_rows(model, release)]
        print(format_artifacts(rows))
        refused += [name for name, _, result, _ in rows if result == REFUSED]
        for line in changes(group, current, release):
            print(f"  {line}")
        for model in group:
            for line in new_mistakes(model, release):
                print(f"  {line}")
                refused.append(model.file)
    print(
        f'\nnothing was changed; `release = "{release}"` in the table [triton] of a spec, and `doit`, do it', flush=True
    )
    if refused:
        return TaskFailed(f"Triton {release} would not serve {', '.join(dict.fromkeys(refused))} as it is")
    return None


def requested_release(words: list[str]) -> str:
    """Return the release of the command line.

    Raises:
        UserError: If there is none, or if it is not in the table.
    """
    import re

    if len(words) != 1 or not re.fullmatch(RELEASE, words[0]):
        found = repr(" ".join(words)) if words else "nothing"
        raise UserError(
            f"upgrade: expected one release of Triton's containers, as in `doit upgrade 26.11`, found {found}"
        )
    if remark := releases.unknown(words[0]):
        raise UserError(f"upgrade: {remark}")
    return words[0]


def format_libraries(current: str, release: str) -> str:
    """Return the versions that both releases contain, "TensorRT 11.2.1.2 -> unknown, …"."""

    def version(name: str, library: str) -> str:
        return (getattr(RELEASES[name], library) if name in RELEASES else None) or "unknown"

    pairs = {label: (version(current, name), version(release, name)) for name, label in LIBRARIES.items()}
    return ", ".join(f"{label} {old if old == new else f'{old} -> {new}'}" for label, (old, new) in pairs.items())


def artifact_rows(model: Model, release: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield (Triton model, artifact, result, why) of each artifact."""
    for model_format in model.served_formats:
        for file in model.files(model_format):
            path = model.artifact(f"{file}.signature.json")
            result, why = judge(release, model_format, read_json(path)) if os.path.exists(path) else (NOT_BUILT, "")
            yield model.triton_name(model_format), file, result, why
    for model_format in model.ensemble_parts:
        yield model.triton_name(model_format), TRITON_MODELS[model_format].file, STAYS, ""


def judge(release: str, model_format: str, signature: Any) -> tuple[str, str]:
    """Return the result for an artifact, and why."""
    if reason := releases.load_error(release, model_format, signature):
        return (REBUILT if model_format == "tensorrt" else REFUSED), reason
    warning = releases.load_warning(release, model_format, signature)
    return (UNKNOWN, warning) if warning else (STAYS, "")


def format_artifacts(rows: list[tuple[str, str, str, str]]) -> str:
    """Return a line for each artifact."""
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return "\n".join(
        "  " + "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )


def changes(models: list[Model], current: str, release: str) -> Iterator[str]:
    """Yield a line for each change between two releases that concerns these models."""
    formats = {model_format for model in models for model_format in (*model.served_formats, *model.ensemble_parts)}
    older, newer = sorted((current, release))
    for change in CHANGES:
        if older < change.release <= newer and (not change.model_formats or formats.intersection(change.model_formats)):
            when = f"since {change.release}" if current < release else f"not before {change.release}"
            where = ", ".join(change.model_formats) or "server"
            yield f"{when}, {where}: {change.text} ({change.source})"
    if "ensemble" in formats and older < FIELDS_SINCE[IN_FLIGHT_FIELD] <= newer:
        verb = "gets" if current < release else "loses"
        yield f"config.pbtxt of each ensemble {verb} ensemble_scheduling.max_inflight_requests"


def new_mistakes(model: Model, release: str) -> Iterator[str]:
    """Yield a line for each key of the spec that the release would refuse, and that its own release does not."""
    from build_tasks.triton import model_config_checks

    facts = facts_of(model)
    if model.config_fields:
        for key, expected, found in model_config_checks.mistakes(replace(facts, release=release)):
            yield f"{model.file}: triton.{key}: expected {expected}, found {found}"
    support, opset = releases.onnx_support(release), model.spec.onnx.opset
    if "onnx" in facts.model_formats and support and opset != "auto" and opset > support.opset:
        yield f"{model.file}: onnx.opset: expected at most {support.opset}, found {opset}"
