"""Values of [triton] that contradict the rest of the spec or each other.

A server would reject some of them, and ignore others without a message. Some end the server: for example, a model that
has only passive instances ends it at the first request.

A new check of ModelConfig belongs to one of five places:

    fields of the ModelConfig with each other   scheduler_checks.py, sequence_checks.py, batch_tensor_checks.py,
                                                warm_up_checks.py (they see only the ModelConfig)
    a field with the rest of the spec           _model_mistakes and the checks that it calls
    `optimization` with what a backend reads    optimization_checks.py
    `parameters` with what a backend reads      parameter_checks.py
    a field with the artifact                   derived_config.py, derived_tensors.py

Sources: the core's model_config_utils.cc, backend_model_instance.cc and sequence_batch_scheduler.cc; the backends'
own checks (onnxruntime.cc, libtorch.cc, instance_state.cc); trials with the server of release 24.10.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

from build_tasks.errors import listed, with_suggestion
from build_tasks.tensors import IMAGE
from build_tasks.triton import (
    batch_tensor_checks,
    derived_tensors,
    newer_fields,
    optimization_checks,
    parameter_checks,
    releases,
    scheduler_checks,
    sequence_checks,
    warm_up_checks,
)
from build_tasks.triton.model_config import (
    SCHEDULERS,
    Mistake,
    field_mistakes,
    fields_of_format,
    protobuf,
    shorten,
    to_message,
)
from build_tasks.triton.optimization_profiles import find_uncovered, format_box
from build_tasks.triton.platforms import ENSEMBLE_MODELS, FORMATS, TRITON_MODELS
from build_tasks.triton.serving_facts import ServingFacts

RUNTIMES = {
    "torchscript": "libtriton_pytorch.so", "onnx": "libtriton_onnxruntime.so", "tensorrt": "libtriton_tensorrt.so",
    "aoti": "libtriton_pytorch.so", "preprocess": "libtriton_python.so",
}  # fmt: skip
RESERVED_TAGS = ("model", "version", "gpu_uuid", "namespace")  # Source: the core's constants.h
NOT_OF_AN_ENSEMBLE = ("instance_group", "optimization", "model_warmup", *sorted(SCHEDULERS))


def mistakes(facts: ServingFacts) -> Iterator[Mistake]:
    """Yield what is wrong with [triton], as far as the spec shows it."""
    tables: dict[str, dict[str, Any]] = {"": {}}
    all_tables = True
    for key, value in facts.config_fields.items():
        if key not in TRITON_MODELS:
            tables[""][key] = value
        elif not isinstance(value, dict):
            yield key, "a table", shorten(value)
            all_tables = False
        elif key not in facts.model_formats:
            reason = "there is no ensemble" if key in ENSEMBLE_MODELS else f"formats does not contain {key}"
            yield key, f"nothing, since {reason}", shorten(value)
        else:
            tables[key] = value
    wrong_fields = [
        (f"{model_format}.{key}".strip("."), expected, found)
        for model_format, table in tables.items()
        for key, expected, found in field_mistakes(table, model_format, () if model_format else facts.own_keys)
    ]
    yield from wrong_fields
    if wrong_fields or not all_tables or not any(tables.values()):
        return
    reported = set()
    for model_format in facts.model_formats:
        own = tables.get(model_format, {})
        fields = fields_of_format(facts.config_fields, model_format)
        values = {field: value for field, value in fields.items() if value is not False and field != "max_batch_size"}
        if values.keys() >= SCHEDULERS:
            key = model_format if SCHEDULERS & own.keys() else ""
            yield key, f"one of {' and '.join(sorted(SCHEDULERS))}", "both"
            return
        try:
            config = to_message(values)
        except ValueError as error:  # a rule of the protobuf that the types of the fields do not show
            yield model_format if model_format in tables else "", "what Triton's protobuf accepts", str(error)
            return
        for key, expected, found in _model_mistakes(facts, model_format, config, fields):
            field = key.partition(".")[0].partition("[")[0]
            mistake = (f"{model_format}.{key}" if field in own else key, expected, found)
            if mistake not in reported:  # a field of [triton] is checked once for each format
                reported.add(mistake)
                yield mistake


def _model_mistakes(facts: ServingFacts, model_format: str, config: Any, fields: dict[str, Any]) -> Iterator[Mistake]:
    """Yield what is wrong with the fields of one Triton model.

    Args:
        config: The ModelConfig of the fields; its max_batch_size is set here.
        fields: The fields as the spec has them.
    """
    if model_format == "ensemble":
        for field in NOT_OF_AN_ENSEMBLE:
            if field in fields:
                yield field, "nothing, since an ensemble has none of its own", shorten(fields[field])
        yield from _other_fields(facts, model_format, config)
        yield from parameter_checks.mistakes(facts, model_format, config)
        yield from newer_fields.mistakes(config, facts.release)
        return
    config.max_batch_size = facts.largest_batches[model_format]
    yield from _max_batch_size(facts, model_format, config, fields)
    fixed = config.max_batch_size == 0 and fields.get("max_batch_size") != 0
    if fixed and fields.get("sequence_batching", False) is not False:
        expected = f"false in [triton.{model_format}], since onnx.dynamic_axes = false fixes the batch"
        yield "sequence_batching", expected, shorten(fields["sequence_batching"])
        return
    yield from _instances(facts, model_format, config, fields)
    yield from _single_requests(facts, model_format, config, fields)
    yield from _versions(facts, config, fields)
    yield from optimization_checks.mistakes(facts, model_format, config, fields)
    yield from _other_fields(facts, model_format, config)
    yield from parameter_checks.mistakes(facts, model_format, config)
    yield from newer_fields.mistakes(config, facts.release)
    yield from warm_up_checks.file_mistakes(config, facts.warm_up_folder, of_pictures=model_format == "preprocess")
    yield from sequence_checks.file_mistakes(config, facts.initial_state_folder)
    inputs = (IMAGE,) if model_format == "preprocess" else facts.inputs
    contradictions = list(config_mistakes(config, model_format, inputs))
    yield from contradictions or _filled_inputs(inputs, config)


def _max_batch_size(facts: ServingFacts, model_format: str, config: Any, fields: dict[str, Any]) -> Iterator[Mistake]:
    key = "max_batch_size"
    size, limit = fields.get(key), facts.max_batch_size
    smallest, _, largest = facts.profile
    if not size:  # 0: dims contain the batch
        return
    if model_format == "tensorrt" and size < smallest:
        yield key, f"at least {smallest}, the smallest batch of the engine's profile", repr(size)
    elif model_format == "tensorrt" and size > largest:
        yield key, f"at most {largest}, the largest batch of the engine's profile", repr(size)
    elif config.max_batch_size == 0:
        yield key, "nothing, since onnx.dynamic_axes = false fixes the batch", repr(size)
    elif size > limit:
        yield key, f"at most {limit}, the max_batch_size above the tables", repr(size)


def config_mistakes(config: Any, model_format: str, inputs: Collection[str]) -> Iterator[Mistake]:
    """Yield contradictions within a ModelConfig whose max_batch_size is set.

    Args:
        inputs: The names of the model's inputs; empty if they are not known yet.
    """
    yield from scheduler_checks.mistakes(config)
    yield from sequence_checks.mistakes(config)
    yield from batch_tensor_checks.mistakes(config, model_format, inputs)
    yield from warm_up_checks.mistakes(config)


def _instances(facts: ServingFacts, model_format: str, config: Any, fields: dict[str, Any]) -> Iterator[Mistake]:
    name_of = protobuf().ModelInstanceGroup.Kind.Name
    for index, (group, table) in enumerate(zip(config.instance_group, fields.get("instance_group") or (), strict=True)):
        key = f"instance_group[{index}]"
        on_cpu = model_format == "preprocess" and "kind" not in table  # the default of derived_config.py
        kind = "KIND_CPU" if on_cpu else name_of(group.kind)
        if "count" in table and group.count < 1:
            yield f"{key}.count", "int >= 1", repr(group.count)
        if model_format == "tensorrt" and kind in ("KIND_CPU", "KIND_MODEL"):
            yield f"{key}.kind", "KIND_GPU, since a plan runs on a GPU", repr(kind)
        elif facts.device == "cpu" and kind in ("KIND_GPU", "KIND_MODEL"):
            yield f"{key}.kind", 'KIND_CPU, since triton.device = "cpu"', repr(kind)
        elif facts.device == "gpu" and kind == "KIND_CPU" and model_format in FORMATS:
            yield f"{key}.kind", 'KIND_GPU, since triton.device = "gpu"', repr(kind)
        gpus = list(group.gpus)
        if gpus and kind in ("KIND_CPU", "KIND_MODEL"):
            yield f"{key}.gpus", f"nothing, since kind = {kind}", repr(gpus)
        elif gpus and facts.device == "cpu":
            yield f"{key}.gpus", 'nothing, since triton.device = "cpu"', repr(gpus)
        if len(set(gpus)) != len(gpus) or any(gpu < 0 for gpu in gpus):
            yield f"{key}.gpus", "numbers of GPUs, each once", repr(gpus)
        if group.profile:
            yield from _profiles(facts, model_format, f"{key}.profile", list(group.profile), group.passive)
        for resource in group.rate_limiter.resources:
            if not resource.name or resource.count < 1:
                found = f"{resource.name!r}, {resource.count}"
                yield f"{key}.rate_limiter.resources", "resources with a name and a count >= 1", found
    if fields.get("instance_group") == []:
        yield "instance_group", "at least one group", "[]"
    elif config.instance_group and all(group.passive for group in config.instance_group):
        yield "instance_group", "a group that is not passive, to answer requests", "only passive groups"
    scopes: dict[str, bool] = {}
    for group in config.instance_group:
        for resource in group.rate_limiter.resources:
            if scopes.setdefault(resource.name, getattr(resource, "global")) != getattr(resource, "global"):
                yield "instance_group", f"the resource {resource.name!r} with one value of global", "both"


def _profiles(facts: ServingFacts, model_format: str, key: str, names: list[str], passive: bool) -> Iterator[Mistake]:
    """Yield what is wrong with the optimization profiles of an instance group.

    Triton gives a request to any instance that is free, so that the profiles of each group must take all requests.
    """
    count = len(facts.profiles)
    valid = [str(index) for index in range(max(count, 1))]
    if model_format != "tensorrt":
        yield key, "nothing, since only plans have profiles", repr(names)
    elif not count and set(names) - {"0"}:
        yield key, '["0"], since the engine has one profile (engine.profiles)', repr(names)
    elif unknown := [name for name in names if name not in valid]:
        yield key, f"indices of engine.profiles, {', '.join(valid)}", repr(unknown[0])
    elif len(set(names)) != len(names):
        yield key, "each profile once", repr(names)
    elif count and not passive and (left := find_uncovered(facts.promised, [facts.profiles[int(n)] for n in names])):
        expected = "profiles that take all that clients may send, since a request goes to any free instance"
        yield key, expected, f"{names!r}, none for {format_box(left)}"


def _single_requests(facts: ServingFacts, model_format: str, config: Any, fields: dict[str, Any]) -> Iterator[Mistake]:
    """Yield schedulers and instances that a release cannot serve right, because it runs one request at a time."""
    error = releases.batching_error(facts.release, model_format)
    if error is None:
        return
    for field in sorted(SCHEDULERS):
        if fields.get(field, False) is not False:
            yield field, f"false in [triton.{model_format}], since {error}", shorten(fields[field])
    count = sum(max(group.count, 1) * max(len(group.gpus), 1) for group in config.instance_group)
    if count > 1:
        expected = f"one instance in [triton.{model_format}], since Triton {facts.release} does not load a second one"
        yield "instance_group", expected, str(count)


def _versions(facts: ServingFacts, config: Any, fields: dict[str, Any]) -> Iterator[Mistake]:
    policy, kept = config.version_policy, facts.keep_versions
    choice = policy.WhichOneof("policy_choice")
    if "version_policy" in fields and choice is None:
        yield "version_policy", "one of latest, all, specific", "{}"
    elif choice == "latest" and not 1 <= policy.latest.num_versions <= kept:
        expected = f"1 to triton.keep_versions, {kept}"
        yield "version_policy.latest.num_versions", expected, repr(policy.latest.num_versions)
    elif choice == "specific":
        versions = list(policy.specific.versions)
        if not versions or len(set(versions)) != len(versions) or min(versions) < 1:
            yield "version_policy.specific.versions", "versions, each once", repr(versions)
        elif len(versions) > kept:
            expected = f"at most triton.keep_versions, {kept}"
            yield "version_policy.specific.versions", expected, f"{len(versions)}, {versions}"


def _other_fields(facts: ServingFacts, model_format: str, config: Any) -> Iterator[Mistake]:
    if config.model_transaction_policy.decoupled:
        yield "model_transaction_policy.decoupled", "false, since each image has one answer", "true"
    if config.runtime and (library := RUNTIMES.get(model_format)) != config.runtime:
        expected = (
            f"{library!r}, the backend of {model_format}" if library else "nothing, since an ensemble has no backend"
        )
        yield "runtime", expected, repr(config.runtime)
    if config.HasField("model_operations") and model_format != "onnx":
        expected = f"nothing in {model_format}, since only ONNX Runtime's backend reads it"
        yield "model_operations", expected, shorten(list(config.model_operations.op_library_filename))
    for name in sorted(config.metric_tags):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name.startswith("__"):
            yield "metric_tags", "names of letters, digits and _, since any other name ends the server", repr(name)
        elif name in RESERVED_TAGS:
            yield "metric_tags", f"names besides Triton's own, {', '.join(RESERVED_TAGS)}", repr(name)


def _filled_inputs(names: Collection[str], config: Any) -> Iterator[Mistake]:
    """Yield the inputs that Triton itself would fill, and that the model does not have."""
    filled = derived_tensors.filled_inputs(config)
    for name, tensor in filled.items() if names else ():
        if name not in names:
            yield tensor.key, f"an input of the model, {listed(names)}", with_suggestion(name, names)
    if names and filled.keys() >= set(names):
        key = next(iter(filled.values())).key.partition(".")[0]
        yield key, "an input that clients send", f"Triton itself fills {listed(names)}"
