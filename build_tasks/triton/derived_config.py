"""The ModelConfig of an artifact, derived from its signature and the fields that the spec sets."""

from typing import Any

from build_tasks.errors import UserError
from build_tasks.json_files import read_json
from build_tasks.runtime.stage import Settings
from build_tasks.tensors import INPUT, layout_dims
from build_tasks.triton import model_config as triton_config
from build_tasks.triton import releases
from build_tasks.triton.platforms import FORMATS, TRITON_MODELS

# NumPy's names, Triton's. Source: the server's docs, model_configuration.md, "Datatypes".
DTYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32",
    "int64": "TYPE_INT64", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64",
    "bytes": "TYPE_STRING",
}  # fmt: skip
LAYOUTS = {"fp32_nchw": "FORMAT_NCHW", "uint8_nhwc": "FORMAT_NHWC"}
KINDS = {"gpu": "KIND_GPU", "cpu": "KIND_CPU"}
# PyTorch's profiling executor compiles at the second request of a shape.
WARM_UPS = {"torchscript": 2}
DECODERS = 2  # processes of the Python backend that decode pictures


def common_signature(paths: list[str], settings: Settings) -> dict[str, Any]:
    """The signature of one artifact, or of plans that are to be served as one model: the largest batch is of them all.

    UserError where their tensors differ, or where the server's release cannot load one.
    """
    signatures: list[dict[str, Any]] = []
    for path in paths:
        signatures.append(read_json(path))
        if reason := releases.refusal(settings["release"], settings["format"], signatures[-1]):
            raise UserError(f"{settings['spec']}: triton.release: {reason}")
    first = signatures[0]
    for path, other in zip(paths, signatures, strict=True):
        if (other["inputs"], other["outputs"]) != (first["inputs"], first["outputs"]):
            raise UserError(f"{path} and {paths[0]} have different tensors, and cannot be served as one model")
    profiles = [signature["profile"][INPUT] for signature in signatures if signature.get("profile")]
    return first | {
        "smallest_batch": max((profile["min"][0] for profile in profiles), default=1),
        "largest_batch": min((profile["max"][0] for profile in profiles), default=None),
    }


def derive(signature: dict[str, Any], classes: int | None, settings: Settings) -> Any:
    """The ModelConfig of an artifact. UserError for what contradicts it.

    With an open batch dimension the dims leave it out; a fixed batch is served with max_batch_size 0 and full dims.
    Source: the server's docs, model_configuration.md, "Maximum Batch Size".
    """
    from build_tasks.triton import model_config_checks

    batched = all(t["shape"][0] == -1 for t in (*signature["inputs"], *signature["outputs"]))
    config = triton_config.message({})
    largest = signature["largest_batch"] or settings["max_batch_size"]
    config.max_batch_size = min(settings["max_batch_size"], largest) if batched else 0
    if any(settings["capabilities"]):
        # Source: common, protobuf/model_config.proto; where no capability fits, Triton takes the default.
        config.default_model_filename = settings["files"][0]
        for file, capability in zip(settings["files"], settings["capabilities"], strict=True):
            config.cc_model_filenames[capability] = file
    first = 1 if batched else 0
    for tensors, fields in ((signature["inputs"], config.input), (signature["outputs"], config.output)):
        for tensor in tensors:
            if tensor["dtype"] not in DTYPES:
                raise UserError(f"{tensor['name']} is {tensor['dtype']}, which Triton has no type for")
            dims = tensor["shape"][first:]
            field = fields.add(name=tensor["name"], data_type=DTYPES[tensor["dtype"]], dims=dims or [1])
            if not dims:  # one value per sample: Triton wants a dimension, and gives it by a reshape from none
                field.reshape.SetInParent()
            if tensor["name"] == INPUT and tensors is signature["inputs"] and len(dims) == 3:
                field.format = triton_config.enum("ModelInput.Format", LAYOUTS[settings["input"]["format"]])
    config.MergeFrom(triton_config.message({**defaults(config, signature, settings), **spec_fields(settings)}))
    if mistakes := list(model_config_checks.within(config)):
        raise UserError(
            "; ".join(
                f"{settings['spec']}: triton.{key}: expected {expected}, found {found}"
                for key, expected, found in mistakes
            )
        )
    if classes is not None and not settings["ranked"]:
        output = config.output[0]
        if list(output.dims)[-1:] != [classes]:
            raise UserError(
                f"{settings['spec']}: labels: {classes} of them for {list(output.dims)[-1]} classes of {output.name}"
            )
        output.label_filename = "labels.txt"
    return config


def spec_fields(settings: Settings) -> dict[str, Any]:
    """The spec's fields; `false` leaves a default out. Instances are where triton.device says, unless they say it."""
    fields = {field: value for field, value in settings["triton"].items() if value is not False}
    groups = [{**instance_kind(settings), **group} for group in fields.get("instance_group", ())]
    return {
        "name": settings["name"],
        **{key: value for key in ("platform", "backend") if (value := getattr(TRITON_MODELS[settings["format"]], key))},
        **{field: value for field, value in fields.items() if field != "max_batch_size"},
        **({"instance_group": groups} if groups else {}),
    }


def instance_kind(settings: Settings) -> dict[str, str]:
    """The kind of an instance group; none is KIND_AUTO, a GPU where there is one."""
    device = {"tensorrt": "gpu", "preprocess": "cpu"}.get(settings["format"], settings["device"])
    return {"kind": KINDS[device]} if device in KINDS else {}


def defaults(config: Any, signature: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """What a spec that says nothing gets."""
    model_format, given = settings["format"], settings["triton"].keys()
    chosen: dict[str, Any] = {}
    if settings["keep_versions"] > 1:
        chosen["version_policy"] = {"latest": {"num_versions": settings["keep_versions"]}}
    if model_format in FORMATS:
        chosen["instance_group"] = [{"count": 1, **instance_kind(settings)}]
        if config.max_batch_size > 1 and not triton_config.SCHEDULERS & given:
            chosen["dynamic_batching"] = {}
        chosen["model_warmup"] = warm_up(config, signature, settings)
    else:
        chosen["instance_group"] = [{"count": DECODERS, **instance_kind(settings)}]
    return {field: value for field, value in chosen.items() if field not in given}


def warm_up(config: Any, signature: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """Requests of the smallest and of the largest batch, and of those that triton.warm_up tells, before the model is
    called ready.

    Zeros: random data would be any bits, and so NaN and infinity, too.
    """
    largest = config.max_batch_size
    every = range(1, min(settings["warm_up"] or 0, largest) + 1)
    sizes = sorted({signature["smallest_batch"], largest, *every}) if largest else [1]
    tensors = {}
    for tensor in config.input:
        dims = list(tensor.dims)
        if -1 in dims:  # height and width; the spec has to say their best
            dims[-3:] = layout_dims(settings["input"]["shape"], settings["input"]["format"])
        name = triton_config.protobuf().DataType.Name(tensor.data_type)
        tensors[tensor.name] = {"data_type": name, "dims": dims, "zero_data": True}
    return [
        {
            "name": f"batch of {size}" if largest else "fixed batch",
            "batch_size": size,  # 1 where the batch is fixed, and stands in the dims
            **({"count": WARM_UPS[settings["format"]]} if settings["format"] in WARM_UPS else {}),
            "inputs": tensors,
        }
        for size in sizes
    ]


def to_text(config: Any) -> str:
    """The text of config.pbtxt."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config)
    if config.max_batch_size == 0:  # protobuf leaves a zero out, Triton wants it said
        text += "max_batch_size: 0\n"
    return text
