"""What `doit adopt` finds out about a repository of another origin, without changing anything.

PATH ─► existing_repository ─► tensors ─► adopted_spec ─► config.pbtxt as doit would derive it
            └─► left alone, with the reason                  └─► differences, field by field
"""

import difflib
import re
from typing import Any, NamedTuple

import msgspec

from build_tasks.doit_plugin.reserved_names import RESERVED
from build_tasks.errors import UserError
from build_tasks.formats import artifact_tensors
from build_tasks.formats.label_file import read_labels
from build_tasks.spec import adopted_spec
from build_tasks.spec.adopted_spec import AdoptedSpec, FileTensor
from build_tasks.spec.interface import label_files
from build_tasks.stages import config as config_stage
from build_tasks.tensors import TensorSignature
from build_tasks.triton import config_fields, derived_config
from build_tasks.triton.existing_repository import ExistingModel, read_repository
from build_tasks.triton.repository import PROVENANCE_PREFIX

Tensors = tuple[list[FileTensor], list[FileTensor]]  # inputs and outputs

DEFAULT_BATCH = 4  # max_batch_size of a model without a config; source: the server's option default-max-batch-size
# Why artifacts of these formats are left alone.
COMPILED = {
    "tensorrt": "a plan belongs to one type of GPU and one TensorRT, and is compiled anew",
    "aoti": "a package of AOTInductor is compiled for one machine, and is compiled anew",
}


class Adoption(NamedTuple):
    """One model of the repository.

    Attributes:
        existing: What was found.
        spec: The spec; None for a model that is left alone.
        before, after: The ModelConfig of the repository and the one of the spec, with what Triton fills in.
        reason: Why the model is left alone; "" otherwise.
        host: For an ensemble: the model whose spec describes it. It has no spec of its own.
        new_version: The version that the ensemble gets, which is that of its host.
    """

    existing: ExistingModel
    spec: AdoptedSpec | None
    before: Any
    after: Any
    reason: str
    host: str = ""
    new_version: int = 0

    @property
    def differences(self) -> list[tuple[str, str, str]]:
        """The fields with another value: (path, before, after)."""
        return [row for row in config_fields.differences(self.before, self.after) if row[1] != row[2]]


def adopt(path: str) -> list[Adoption]:
    """Return what can be taken over of a repository, or of the folder of one model. Ensembles are left alone.

    Raises:
        UserError: If there is no model.
    """
    models = read_repository(path)
    tensors: dict[str, Tensors] = {}
    adoptions = []
    for existing in sorted(models, key=lambda model: model.model_format in COMPILED):  # after their sources
        try:
            adoptions.append(_adopt(existing, tensors))
        except UserError as error:
            adoptions.append(Adoption(existing, None, None, None, str(error)))
    return sorted(adoptions, key=lambda adoption: adoption.existing.name)


def _adopt(existing: ExistingModel, seen: dict[str, Tensors]) -> Adoption:
    """Return what can be taken over of one model.

    Args:
        seen: The tensors of the models that were looked at before, by name. Those of this one are added.
    Raises:
        UserError: If the model is left alone.
    """
    if existing.reason:
        raise UserError(existing.reason)
    if existing.model_format in COMPILED:
        raise UserError(_compiled_reason(existing, seen))
    inputs, outputs = artifact_tensors.read_tensors(existing)
    seen[existing.name] = inputs, outputs
    existing = existing._replace(config=completed(existing.config, inputs, outputs))
    spec = adopted_spec.describe(_model_name(existing.name), existing, inputs, outputs)
    before = config_fields.normalized(existing.config, existing.name, existing.model_format)
    after = config_fields.normalized(
        expected_config(existing, spec, inputs, outputs), existing.name, existing.model_format
    )
    return Adoption(existing, spec, before, after, "")


def _model_name(name: str) -> str:
    """Return the name in models/ of a model with this name in Triton, which may have other characters."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    return f"{name}_model" if name in RESERVED else name


def _compiled_reason(existing: ExistingModel, seen: dict[str, Tensors]) -> str:
    """Return why a compiled artifact is left alone, and what it would be built from."""
    why = COMPILED[existing.model_format]
    try:
        shapes = _shapes(artifact_tensors.read_tensors(existing))
    except UserError:  # its config does not say them
        shapes = []
    same = [other for other, found in seen.items() if _shapes(found) == shapes]
    if source := next(iter(difflib.get_close_matches(existing.name, same, n=1, cutoff=0)), None):
        added = f"add {existing.model_format} to the formats of its spec"
        return f"{why}: from {source}, which has the same tensors; {added}"
    return f"{why}: from the file or network that it was compiled from, see `doit help new`"


def _shapes(tensors: Tensors) -> list[list[tuple[str, list[int]]]]:
    return [[(tensor.name, _signature(tensor)["shape"]) for tensor in each] for each in tensors]


def completed(config: Any, inputs: list[FileTensor], outputs: list[FileTensor]) -> Any:
    """Return a copy of a ModelConfig with the tensors that Triton would read from the file.

    Source: AutoCompleteConfig in onnxruntime.cc of the backend of ONNX Runtime.
    """
    copy = type(config)()
    copy.CopyFrom(config)
    for key in [key for key in copy.parameters if key.startswith(PROVENANCE_PREFIX)]:
        del copy.parameters[key]  # of a model that this project built elsewhere: `publish` writes them anew
    says_nothing = not config.input and not config.output and not config.max_batch_size
    if says_nothing and all(isinstance(dim, str) for each in (*inputs, *outputs) for dim in each.shape[:1]):
        copy.max_batch_size = DEFAULT_BATCH
        if not config.HasField("sequence_batching"):
            copy.dynamic_batching.SetInParent()
    first = 1 if copy.max_batch_size else 0
    for field, tensors in ((copy.input, inputs), (copy.output, outputs)):
        if not field:
            for tensor in tensors:
                field.add(name=tensor.name)
        known = {tensor.name: tensor for tensor in tensors}
        for entry in field:
            if entry.name in known and not entry.data_type:
                entry.data_type = derived_config.DTYPES[known[entry.name].dtype]
            if entry.name in known and not entry.dims:
                entry.dims.extend(_signature(known[entry.name])["shape"][first:])
    return copy


def expected_config(
    existing: ExistingModel, spec: AdoptedSpec, inputs: list[FileTensor], outputs: list[FileTensor]
) -> Any:
    """Return the ModelConfig that the stage `config` would derive from an artifact with these tensors."""
    model, model_format = spec.model, existing.model_format
    stage = config_stage.stage(model, model_format, model.files(model_format))
    settings = msgspec.convert(stage.settings, derived_config.ConfigSettings)
    signature: derived_config.CommonSignature = {
        "inputs": [_signature(tensor) for tensor in inputs],
        "outputs": [_signature(tensor) for tensor in outputs],
        "smallest_batch": 1,
        "largest_batch": None,
    }
    sources = {file: spec.files[source] for file, source in label_files(model.spec).values()}
    classes = {file: len(read_labels(path)) for file, path in sources.items()}
    return derived_config.derive(signature, classes, settings)


def _signature(tensor: FileTensor) -> TensorSignature:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": [dim if isinstance(dim, int) else -1 for dim in tensor.shape],
    }
