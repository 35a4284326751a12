"""The spec of a model that exists in a repository of another origin, as far as a spec can describe it.

    ModelConfig, tensors of the artifact ─► document ─► without what the checks of specs refuse ─► AdoptedSpec
                                                                    └─► remarks, by field

The document turns off what this project would add, such as warm-up requests, so that the config stays as it was.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from msgspec import ValidationError, convert

from build_tasks.errors import UserError
from build_tasks.spec import validation
from build_tasks.spec.model import Model, Spec
from build_tasks.triton import config_fields, warm_up_checks
from build_tasks.triton.existing_repository import ExistingModel
from build_tasks.triton.model_config import DERIVED, SCHEDULERS, protobuf
from build_tasks.triton.platforms import FORMATS

CHECKED_BATCH = 8  # the largest batch that is checked if only clients form batches
PICTURE_WORDS = {"FORMAT_NCHW": ("", "height", "width"), "FORMAT_NHWC": ("height", "width", "")}
LAYOUTS = {"FORMAT_NCHW": "nchw", "FORMAT_NHWC": "nhwc"}
PICTURE_RANGE = {"min": 64, "opt": 224, "max": 320}  # pixels
OTHER_RANGE = {"min": 1, "opt": 16, "max": 64}
MAX_REMOVED = 40  # values that the checks of specs refuse


class FileTensor(NamedTuple):
    """An input or output as the artifact has it. The shape begins with the batch; an open dimension is its name."""

    name: str
    dtype: str
    shape: list[int | str]


class AdoptedSpec(NamedTuple):
    """The spec of an existing model.

    Attributes:
        document: The content of model.toml.
        model: The same as the project reads it.
        files: The files that the spec names, by their path in the model's folder.
        remarks: (field, why the spec cannot express it).
    """

    document: dict[str, Any]
    model: Model
    files: dict[str, str]
    remarks: list[tuple[str, str]]


def describe(name: str, existing: ExistingModel, inputs: list[FileTensor], outputs: list[FileTensor]) -> AdoptedSpec:
    """Return the spec of an existing model.

    Args:
        name: Of the model in models/.
        inputs, outputs: Of its artifact, in the order of the file.
    Raises:
        UserError: If no spec can describe the model.
    """
    config, model_format = existing.config, existing.model_format
    for kind, declared, tensors in (("input", config.input, inputs), ("output", config.output, outputs)):
        names = [tensor.name for tensor in tensors]
        if unknown := [tensor.name for tensor in declared if tensor.name not in names]:
            raise UserError(
                f"{kind}: the file has no {unknown[0]!r}, only {', '.join(names)}; Triton refuses the config"
            )
    if texts := [tensor.name for tensor in outputs if tensor.dtype == "string"]:
        raise UserError(f"output.{texts[0]}: it holds strings, which the accuracy gate cannot compare")
    document: dict[str, Any] = {"formats": [model_format], **_batch(existing, [*inputs, *outputs])}
    document["weights"] = {"source": FORMATS[model_format].file}
    document |= _tensors(config, inputs, outputs)
    document["triton"], remarks = _triton(existing)
    document["triton"].setdefault(model_format, {})["name"] = existing.name
    if document.pop("clients form batches", False):
        document["triton"][model_format]["max_batch_size"] = 0
    files = {FORMATS[model_format].file: existing.artifact}
    for index, output in enumerate(config.output):
        file = output.label_filename
        if file and os.path.basename(file) == file and os.path.isfile(f"{existing.folder}/{file}"):
            files[file] = f"{existing.folder}/{file}"
            holder = document if index == 0 else _named(document["outputs"], output.name)
            holder["labels"] = file
        elif file:
            remarks.append((f"output.{output.name}.label_filename", f"there is no file {file!r} in {existing.folder}/"))
    for folder in ("warmup", "initial_state"):
        path = f"{existing.folder}/{folder}"
        names = sorted(os.listdir(path)) if os.path.isdir(path) else []
        files |= {f"{folder}/{file}": f"{path}/{file}" for file in names}
    warm_up = list(warm_up_checks.file_mistakes(config, f"{existing.folder}/warmup", of_pictures=False))
    for key, expected, found in warm_up[::-1]:  # from the last one, so that the indices hold
        sample = key.partition(".")[0]
        if _remove(document, f"triton.{sample}"):
            remarks.append((sample, f"expected {expected}, found {found}"))
    model, removed = _without_mistakes(name, document, files)
    return AdoptedSpec(document, model, files, remarks + removed)


def checked(spec: AdoptedSpec) -> AdoptedSpec:
    """Return a spec whose document has grown, without what the checks of specs refuse.

    Raises:
        UserError: If no value could be removed that is wrong.
    """
    model, removed = _without_mistakes(spec.model.name, spec.document, spec.files)
    return spec._replace(model=model, remarks=spec.remarks + removed)


def _batch(existing: ExistingModel, tensors: list[FileTensor]) -> dict[str, Any]:
    """Return the keys about the batch."""
    largest = existing.config.max_batch_size
    for tensor in existing.config.input:
        if tensor.allow_ragged_batch:
            key = f"input.{tensor.name}.allow_ragged_batch"
            raise UserError(f"{key}: write the spec by hand (docs/how-to/tensors.md#ragged-batches)")
    if largest > 0:
        return {"max_batch_size": largest}
    first = {tensor.shape[0] if tensor.shape else None for tensor in tensors}
    if all(isinstance(length, str) for length in first):
        return {"max_batch_size": CHECKED_BATCH, "clients form batches": True}
    batch = first.pop()
    if not first and isinstance(batch, int) and existing.model_format == "onnx":
        return {"max_batch_size": batch, "onnx": {"dynamic_axes": False, "batch_size": batch}}
    raise UserError("max_batch_size: 0, and the tensors have no common first dimension, which would be the batch")


def _tensors(config: Any, inputs: list[FileTensor], outputs: list[FileTensor]) -> dict[str, Any]:
    """Return [[inputs]], [dimensions] and [[outputs]]."""
    first = 0 if config.max_batch_size else 1  # of the dims that are no batch
    formats = {tensor.name: protobuf().ModelInput.Format.Name(tensor.format) for tensor in config.input}
    tables: list[dict[str, Any]] = []
    lengths: dict[str, list[int]] = {}  # by the word of the dimension
    for tensor in inputs:
        data_format = formats.get(tensor.name, "") if len(tensor.shape) == 4 else ""
        shape = [
            dim if isinstance(dim, int) else _word(tensor.name, axis, dim, data_format)
            for axis, dim in enumerate(tensor.shape[1:])
        ]
        table: dict[str, Any] = {"name": tensor.name, "dtype": tensor.dtype, "shape": shape}
        if data_format in LAYOUTS:
            table["layout"] = LAYOUTS[data_format]
        if tensor.dtype == "uint8":
            table |= {"low": 0, "high": 255}
        words = [dim for dim in shape if isinstance(dim, str)]
        tables.append(table | _client_dims(config.input, tensor.name, words, first))
        for axis, word in enumerate(shape):
            if isinstance(word, str):
                lengths.setdefault(word, []).extend(_lengths(config, tensor.name, axis))
    dimensions = {word: _range(word, known) for word, known in lengths.items()}
    labeled = {output.name for output in config.output if output.label_filename}
    answers = [
        {
            "name": tensor.name,
            **({"classes": True} if tensor.name in labeled else {}),
            **_client_dims(config.output, tensor.name, list(dimensions), first),
        }
        for tensor in outputs
    ]
    return {"inputs": tables, **({"dimensions": dimensions} if dimensions else {}), "outputs": answers}


def _lengths(config: Any, name: str, axis: int) -> list[int]:
    """Return the lengths of an open dimension of an input that a config names: its dims, warm-up, CUDA graphs.

    Args:
        axis: Of the dims without the batch.
    """
    first = 0 if config.max_batch_size else 1
    requests = [sample.inputs for sample in config.model_warmup]
    requests += [spec.input for spec in config.optimization.cuda.graph_spec]
    shapes = [tensor.dims for tensor in config.input if tensor.name == name and not tensor.HasField("reshape")]
    for request in requests:
        if name in request:
            shapes.append(getattr(request[name], "dims", None) or getattr(request[name], "dim", []))
    return [shape[first + axis] for shape in shapes if len(shape) > first + axis and shape[first + axis] > 0]


def _range(word: str, lengths: list[int]) -> dict[str, int]:
    """Return a guess of the range of a dimension, which holds the lengths that are known."""
    guess = PICTURE_RANGE if word in ("height", "width") else OTHER_RANGE
    if not lengths:
        return guess
    longest = max(lengths)
    return {"min": min(guess["min"], *lengths), "opt": longest, "max": max(guess["max"], longest)}


def _client_dims(tensors: Any, name: str, words: list[str], first: int) -> dict[str, list[int | str]]:
    """Return the key `dims` of a tensor that clients see in another shape than the network.

    Args:
        words: Of the open dimensions of the network's own shape, which are those of the clients'.
        first: Index of the first dim that is no batch.
    """
    tensor = next((tensor for tensor in tensors if tensor.name == name and tensor.reshape.shape), None)
    if tensor is None:  # a reshape to [] follows from the artifact
        return {}
    if tensor.reshape.shape[0] == 1:  # a batch of 1, which clients may leave out
        first = 0
    open_words = iter(words)
    return {"dims": [next(open_words, "open") if dim == -1 else dim for dim in tensor.dims[first:]]}


def _named(tables: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(table for table in tables if table["name"] == name)


def _word(name: str, axis: int, dim: str, data_format: str) -> str:
    """Return the word of an open dimension: the file's own, or one that says what it is."""
    if data_format in PICTURE_WORDS:
        return PICTURE_WORDS[data_format][axis] or f"channels_{name}"
    if re.fullmatch(r"[A-Za-z_]\w*", dim, re.ASCII) and dim != "batch":
        return dim
    return re.sub(r"\W", "_", f"{name}_{axis}", flags=re.ASCII)


def _triton(existing: ExistingModel) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return [triton], and remarks on fields that it cannot have.

    It has all fields that do not follow from the artifact, and `false` for defaults of this project.
    """
    remarks = []
    config = existing.config
    fields = {key: value for key, value in config_fields.to_fields(config).items() if key not in DERIVED}
    groups = config.instance_group
    kinds = {protobuf().ModelInstanceGroup.Kind.Name(group.kind) for group in groups}
    keys: dict[str, Any] = {"device": "cpu"} if kinds == {"KIND_CPU"} else {}
    if existing.version != 1:
        keys["first_version"] = existing.version
    policy = fields.get("version_policy", {})
    if "specific" in policy and policy["specific"].get("versions") != [existing.version]:
        policy = {}
        del fields["version_policy"]
        remarks.append(("version_policy", f"only version {existing.version} has an artifact that doit builds"))
    kept = policy.get("latest", {}).get("num_versions", 0) or len(existing.versions)
    if policy and kept > 1:
        keys["keep_versions"] = kept
    if "latest" in policy and kept > 1:
        del fields["version_policy"]  # it follows from keep_versions
    fields.setdefault("instance_group", False)
    fields.setdefault("model_warmup", False)
    if config.max_batch_size > 1 and not SCHEDULERS & fields.keys():
        fields["dynamic_batching"] = False
    return {**keys, "provenance": False, **fields}, remarks


def _without_mistakes(
    name: str, document: dict[str, Any], files: Mapping[str, str]
) -> tuple[Model, list[tuple[str, str]]]:
    """Return the model of a document, and the remarks on the values that had to be removed from it.

    Args:
        files: The files that will lie beside the spec. They need not be there yet.
    Raises:
        UserError: If no value could be removed that is wrong.
    """
    remarks: list[tuple[str, str]] = []
    for _ in range(MAX_REMOVED):
        found = _mistakes(name, document)
        mistake = next((each for each in found if not _names_file(each, files)), None)
        if mistake is None:
            return Model(name, convert(document, Spec)), remarks
        key, reason = mistake
        if not _remove(document, key):
            raise UserError(f"{key}: {reason}")
        remarks.append((key.removeprefix("triton."), reason))
    raise UserError(f"more than {MAX_REMOVED} values of its config cannot be said in a spec")


def _names_file(mistake: tuple[str, str], files: Mapping[str, str]) -> bool:
    """Return whether a mistake is that a file is missing which will be copied."""
    key, reason = mistake
    return key.endswith("data_file") and any(f"found {os.path.basename(path)!r}" in reason for path in files)


def _mistakes(name: str, document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, what was expected and found) of the mistakes in a document."""
    try:
        model = Model(name, convert(document, Spec))
    except ValidationError as error:
        key, _, reason = validation.type_mistake(error, document).partition(": ")
        yield key, reason
        return
    for key, expected, found in validation.mistakes(model, {}):
        yield key, f"expected {expected}, found {found}"


def _remove(document: dict[str, Any], key: str) -> bool:
    """Remove what a key names, or the nearest table that holds it. Return whether that is an optional value."""
    words = re.findall(r"[^.\[\]]+", key)
    if words[0] not in ("triton", "inputs", "outputs", "labels", "onnx") or words == ["triton"]:
        return False
    path: list[Any] = []
    holder: Any = document
    for word in words:
        index = int(word) if isinstance(holder, list) and word.isdecimal() else word
        if not (isinstance(holder, list) and isinstance(index, int) and index < len(holder)) and not (
            isinstance(holder, dict) and index in holder
        ):
            break
        path.append((holder, index))
        holder = holder[index]
    if len(path) < 2 and words[0] != "labels":
        return False
    holder, index = path[-1]
    if words[0] in ("inputs", "outputs") and index in ("name", "shape", "dtype"):
        return False
    del holder[index]
    return True
