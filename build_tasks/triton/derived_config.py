"""The ModelConfig of an artifact, derived from its signature and from the fields that the spec sets."""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from build_tasks.errors import UserError
from build_tasks.json_files import read_json
from build_tasks.tensors import Signature, profile_batches
from build_tasks.triton import cpu_cores, derived_tensors, model_config, releases
from build_tasks.triton.derived_tensors import DTYPES, ClientView
from build_tasks.triton.platforms import FORMATS, TRITON_MODELS
from build_tasks.triton.warm_up_data import warm_up_input

LAYOUTS = {"nchw": "FORMAT_NCHW", "nhwc": "FORMAT_NHWC"}
KINDS = {"gpu": "KIND_GPU", "cpu": "KIND_CPU"}
WARM_UP_COUNTS = {"torchscript": 2}  # PyTorch's profiling executor compiles at the second request of a shape
PREPROCESS_INSTANCES = 2  # processes of the Python backend that decode pictures
# The modules that decide a config.pbtxt, for the stages that write one.
CONFIG_MODULES = (
    "build_tasks.tensors",
    "build_tasks.triton.batch_tensor_checks",
    "build_tasks.triton.cpu_cores",
    "build_tasks.triton.derived_config",
    "build_tasks.triton.derived_tensors",
    "build_tasks.triton.model_config",
    "build_tasks.triton.model_config_checks",
    "build_tasks.triton.newer_fields",
    "build_tasks.triton.optimization_checks",
    "build_tasks.triton.optimization_profiles",
    "build_tasks.triton.parameter_checks",
    "build_tasks.triton.platforms",
    "build_tasks.triton.release_table",
    "build_tasks.triton.releases",
    "build_tasks.triton.repository",
    "build_tasks.triton.scheduler_checks",
    "build_tasks.triton.sequence_checks",
    "build_tasks.triton.serving_facts",
    "build_tasks.triton.warm_up_checks",
    "build_tasks.triton.warm_up_data",
)


class InputLayout(Struct, frozen=True):
    """An input of the spec, as far as a config.pbtxt depends on it."""

    layout: str | None = None  # of a picture, "nchw" or "nhwc"
    tuned: list[int] | None = None  # the dims to tune for, without the batch, if some are open


class TunedPoint(Struct, frozen=True):
    """The batch and the dims of open inputs, as clients see them, that one optimization profile is tuned for."""

    batch: int
    dims: dict[str, list[int]]  # by the name of the input, without the batch


class ConfigSettings(Struct, frozen=True, kw_only=True):
    """The settings that affect a config.pbtxt. They are part of the fingerprint of the stage `config`."""

    name: str  # the Triton model's name
    model_format: str
    spec: str  # path of the spec, for messages
    triton: dict[str, Any]  # the fields that the spec sets for this Triton model
    release: str  # "26.08"
    device: str  # "auto", "gpu" or "cpu"
    cores: int | None = None  # of a CPU server
    keep_versions: int
    max_batch_size: int  # the largest batch of this Triton model; 0 if the batch is fixed
    warm_up: int | None = None  # one request for each batch up to this one
    warm_up_values: dict[str, int | float | bool | str] = {}  # of inputs that zeros are not valid for, by name
    files: list[str] = []  # the artifacts that are served
    capabilities: list[str | None] = []  # compute capability of each file; None for a file that is not bound to one
    inputs: dict[str, InputLayout] = {}  # by name
    profiles: list[TunedPoint] = []  # of a plan, if it has several
    ranked: bool = False  # outputs are the top_k values and classes, not one value for each class
    labels: dict[str, str] = {}  # files of labels by output; the key of those for the first output is empty
    views: dict[str, ClientView] = {}  # how clients see a tensor, where they see it otherwise than the network


class CommonSignature(Signature):
    """The signature that the artifacts of one Triton model share."""

    smallest_batch: int
    largest_batch: int | None  # None if the artifacts have no limit


def common_signature(paths: list[str], settings: ConfigSettings) -> CommonSignature:
    """Return the signature of an artifact, or of plans that are served as one model.

    Its batch range is the one that all of them support.

    Args:
        paths: The signature files, in the order of settings.files.

    Raises:
        UserError: If their tensors differ, or if the server's release cannot load one of them.
    """
    signatures: list[Signature] = []
    for path in paths:
        signatures.append(read_json(path))
        if reason := releases.load_error(settings.release, settings.model_format, signatures[-1]):
            raise UserError(f"{settings.spec}: triton.release: {reason}")
    first = signatures[0]
    for path, other in zip(paths, signatures, strict=True):
        if (other["inputs"], other["outputs"]) != (first["inputs"], first["outputs"]):
            raise UserError(f"{path} and {paths[0]} have different tensors and cannot be served as one model")
    batches = [profiles for signature in signatures if (profiles := profile_batches(signature))]
    return {
        **first,
        "smallest_batch": max((min(smallest for smallest, _, _ in profiles) for profiles in batches), default=1),
        "largest_batch": min((max(largest for _, _, largest in profiles) for profiles in batches), default=None),
    }


def derive(signature: CommonSignature, classes: Mapping[str, int], settings: ConfigSettings) -> Any:
    """Return the ModelConfig of an artifact.

    If the batch dimension is open, dims do not contain it. A fixed batch is served with max_batch_size 0 and full dims.
    Source: the server's docs, model_configuration.md, "Maximum Batch Size".

    Args:
        classes: Number of labels in each file of labels.

    Raises:
        UserError: If the spec contradicts the artifact.
    """
    from build_tasks.triton import model_config_checks

    own = model_config.to_message(spec_fields(settings))
    config = model_config.to_message({})
    if derived_tensors.has_open_batch(signature, own, settings.views):
        config.max_batch_size = min(settings.max_batch_size, signature["largest_batch"] or settings.max_batch_size)
    if any(settings.capabilities):
        # Source: common, protobuf/model_config.proto. Triton loads the default file if no capability fits.
        config.default_model_filename = settings.files[0]
        for file, capability in zip(settings.files, settings.capabilities, strict=True):
            config.cc_model_filenames[capability] = file
    elif settings.model_format == "aoti":  # Triton 26.03 would look for model.pt (core: model_config_utils.cc)
        config.default_model_filename = TRITON_MODELS["aoti"].file
    for tensor in (*signature["inputs"], *signature["outputs"]):
        if tensor["dtype"] not in DTYPES:
            raise UserError(f"{tensor['name']} has the dtype {tensor['dtype']}, for which Triton has no type")
    mistakes = list(derived_tensors.add_tensors(config, signature, own, settings.views))
    for tensor in config.input:
        layout = settings.inputs.get(tensor.name, InputLayout()).layout
        is_picture = len(tensor.dims) == 3 and list(tensor.reshape.shape)[-3:] in ([], list(tensor.dims))
        if layout and is_picture:
            tensor.format = model_config.enum("ModelInput.Format", LAYOUTS[layout])
    fields = {**default_fields(config, signature, settings), **spec_fields(settings)}
    threads = cpu_cores.thread_parameters(settings.cores, settings.model_format, settings.release, settings.triton)
    if threads:  # beside the parameters of the spec, which win
        fields["parameters"] = {**threads, **fields.get("parameters", {})}
    config.MergeFrom(model_config.to_message(fields))
    mistakes += _other_devices(config, settings) if "device" in signature else []
    mistakes += model_config_checks.config_mistakes(
        config, settings.model_format, [tensor.name for tensor in config.input]
    )
    if mistakes:
        raise UserError(
            "; ".join(
                f"{settings.spec}: {f'triton.{key}: ' if key else ''}expected {expected}, found {found}"
                for key, expected, found in mistakes
            )
        )
    for name, file in () if settings.ranked else settings.labels.items():
        _label_output(config, name, file, classes[file], settings)
    return config


def _other_devices(config: Any, settings: ConfigSettings) -> list[model_config.Mistake]:
    """Return the instance groups on another device than the one that a package was compiled for, settings.device."""
    kinds = [model_config.protobuf().ModelInstanceGroup.Kind.Name(group.kind) for group in config.instance_group]
    expected = f"{KINDS[settings.device]}, since the package was compiled for it"
    return [
        (f"instance_group[{index}].kind", expected, repr(kind))
        for index, kind in enumerate(kinds)
        if kind != KINDS[settings.device]
    ]


def _label_output(config: Any, name: str, file: str, count: int, settings: ConfigSettings) -> None:
    """Give an output of a ModelConfig its labels.

    Raises:
        UserError: If it has another number of classes, or if there is no such output.
    """
    names = [output.name for output in config.output]
    if name and name not in names:
        raise UserError(f"{settings.spec}: outputs: {name} has labels, and clients get only {', '.join(names)}")
    output = config.output[names.index(name) if name else 0]
    if list(output.dims)[-1:] != [count]:
        raise UserError(
            f"{settings.spec}: labels: expected one label for each of the {list(output.dims)[-1]} classes of "
            f"{output.name}, found {count} labels"
        )
    output.label_filename = file


def spec_fields(settings: ConfigSettings) -> dict[str, Any]:
    """Return the spec's fields. `false` in the spec only removes a default.

    Instances without a kind run where triton.device says, and those without profiles have all of them.
    """
    fields = {field: value for field, value in settings.triton.items() if value is not False}
    groups = [{**instance_defaults(settings), **group} for group in fields.get("instance_group", ())]
    platform = TRITON_MODELS[settings.model_format]
    return {
        "name": settings.name,
        **{key: value for key in ("platform", "backend") if (value := getattr(platform, key))},
        **{field: value for field, value in fields.items() if field != "max_batch_size"},
        **({"instance_group": groups} if groups else {}),
    }


def instance_kind(settings: ConfigSettings) -> dict[str, str]:
    """Return the kind of an instance group. No kind means KIND_AUTO: a GPU if the server has one."""
    device = {"tensorrt": "gpu", "preprocess": "cpu"}.get(settings.model_format, settings.device)
    return {"kind": KINDS[device]} if device in KINDS else {}


def instance_defaults(settings: ConfigSettings) -> dict[str, Any]:
    """Return the kind and the profiles of an instance group. Without its profiles, Triton uses the first one alone."""
    profiles = [str(index) for index in range(len(settings.profiles))]
    return {**instance_kind(settings), **({"profile": profiles} if profiles else {})}


def default_fields(config: Any, signature: CommonSignature, settings: ConfigSettings) -> dict[str, Any]:
    """Return values for fields that the spec does not set."""
    defaults: dict[str, Any] = {}
    cores = settings.cores
    if settings.keep_versions > 1:
        defaults["version_policy"] = {"latest": {"num_versions": settings.keep_versions}}
    if settings.model_format in FORMATS:
        together = releases.batching_error(settings.release, settings.model_format) is None
        share = cores and cpu_cores.share_cores(cores, settings.model_format, settings.release, settings.triton)
        # Without a number of a GPU, there is an instance on each of them.
        one_gpu = {} if together or settings.device != "gpu" else {"gpus": [0]}
        count = share.instances if share and together else 1
        defaults["instance_group"] = [{"count": count, **instance_defaults(settings), **one_gpu}]
        if together and config.max_batch_size > 1 and not model_config.SCHEDULERS & settings.triton.keys():
            defaults["dynamic_batching"] = {}
        if "model_warmup" not in settings.triton:
            defaults["model_warmup"] = warm_up_samples(config, signature, settings)
    else:
        count = max(PREPROCESS_INSTANCES, (cores or 0) // cpu_cores.CORES_PER_PREPROCESS)
        defaults["instance_group"] = [{"count": count, **instance_kind(settings)}]
    return {field: value for field, value in defaults.items() if field not in settings.triton}


def warm_up_samples(config: Any, signature: CommonSignature, settings: ConfigSettings) -> list[dict[str, Any]]:
    """Return the requests that Triton runs before the model counts as ready.

    They have the largest batch, every batch up to triton.warm_up, and the smallest batch, in this order: PyTorch makes
    its best kernels for the first shapes that it sees (docs/how-to/torchscript-on-gpu.md). All values are zero, since
    random data may contain any bits and so NaN and infinity; a file has them where zero is not valid. Warm-up
    requests bypass the sequence batcher, so that they also hold the controls and states that it would fill in.
    """
    largest = config.max_batch_size
    frequent = range(1, min(settings.warm_up or 0, largest) + 1)
    sizes = sorted({signature["smallest_batch"], largest, *frequent}, reverse=True) if largest else [1]
    lengths = {name: each.tuned for name, each in settings.inputs.items() if each.tuned}
    points = [(f"batch of {size}" if largest else "fixed batch", size, lengths) for size in sizes]
    for index, point in enumerate(settings.profiles):
        size = min(point.batch, largest) if largest else 1
        if (size, point.dims) not in [(size, dims) for _, size, dims in points]:
            points.append((f"profile {index}", size, point.dims))
    filled = derived_tensors.filled_inputs(model_config.to_message(spec_fields(settings)))
    hidden = {
        name: {"data_type": tensor.dtype, "dims": [max(dim, 1) for dim in tensor.dims], "zero_data": True}
        for name, tensor in filled.items()
        if tensor.dims is not None
    }
    count = {"count": WARM_UP_COUNTS[settings.model_format]} if settings.model_format in WARM_UP_COUNTS else {}
    return [
        {
            "name": name,
            "batch_size": size,  # 1 if the batch is fixed, because dims contain it
            **count,
            "inputs": {
                **{
                    tensor.name: warm_up_input(
                        config, tensor, dims, signature["smallest_batch"], settings.warm_up_values
                    )
                    for tensor in config.input
                },
                **hidden,
            },
        }
        for name, size, dims in points
    ]


def to_text(config: Any) -> str:
    """Return the text of config.pbtxt."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config)
    if config.max_batch_size == 0:  # protobuf omits a zero, but Triton requires the line
        text += "max_batch_size: 0\n"
    return text
