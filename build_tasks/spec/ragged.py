"""Tensors that clients see otherwise than the network, or not at all: ragged inputs, and what Triton fills itself."""

from collections.abc import Iterator
from typing import Any

from build_tasks.errors import listed
from build_tasks.spec.interface import ragged_inputs
from build_tasks.spec.model import Model, Spec
from build_tasks.spec.tensor_tables import TensorInput
from build_tasks.spec.value_checks import Mistake
from build_tasks.triton.model_config import fields_of_format

DTYPES = {"TYPE_INT32": "int32", "TYPE_FP32": "float32"}  # of batch_input


def ragged_settings(model: Model) -> dict[str, Any] | None:
    """Return what is ragged in the batches of a model, as plain data for a fingerprint; None without ragged inputs.

    Its keys: "inputs", the names of ragged inputs; "counts", the inputs that Triton fills by batch_input, each with
    its name, kind, dtype and source; "outputs", by name the input in whose shape Triton answers by batch_output.
    """
    names = ragged_inputs(model.spec)
    if not names:
        return None
    fields = fields_of_format(model.config_fields, "onnx")
    counts = [
        {
            "name": entry["target_name"][0],
            "kind": entry.get("kind", "BATCH_ELEMENT_COUNT"),
            "dtype": DTYPES[entry["data_type"]],
            "source": entry["source_input"][0],
        }
        for entry in fields.get("batch_input") or ()
    ]
    outputs = {
        name: entry["source_input"][0] for entry in fields.get("batch_output") or () for name in entry["target_name"]
    }
    return {"inputs": names, "counts": counts, "outputs": outputs}


def hidden_tensors(model: Model, model_format: str) -> list[str]:
    """Return the tensors of a network that clients neither send nor get: Triton fills them, or keeps them as states."""
    fields = fields_of_format(model.config_fields, model_format)
    batching = fields.get("sequence_batching") or {}
    names = [each["name"] for each in batching.get("control_input") or ()]
    names += [state[kind] for state in batching.get("state") or () for kind in ("input_name", "output_name")]
    return names + [name for each in fields.get("batch_input") or () for name in each["target_name"]]


def mistakes(spec: Spec, key: str, table: TensorInput) -> Iterator[Mistake]:
    """Yield what a ragged input cannot have."""
    if not spec.from_onnx or spec.formats != ["onnx"] or spec.onnx.precision != "fp32":
        expected = "false, since only an ONNX file that is served in this one format, in fp32, may be ragged"
        yield f"{key}.ragged", expected, f"true, formats = {listed(spec.formats)}"
    elif not spec.onnx.dynamic_axes:
        yield f"{key}.ragged", "false, since onnx.dynamic_axes = false fixes the batch", "true"
    for name, value in (("dims", table.dims), ("layout", table.layout), ("batch_dimension", table.batch_dimension)):
        if value:
            yield f"{key}.{name}", "nothing, since the input is ragged", repr(value)
    if not table.shape:
        yield f"{key}.shape", "a dimension, since the input is ragged", "[]"
