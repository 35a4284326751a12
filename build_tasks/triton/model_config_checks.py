"""Values of [triton] that contradict the rest of the spec or each other.

A server would reject some of them, and ignore others without a message. Some end the server: for example, a model that
has only passive instances ends it at the first request.

A new check of ModelConfig belongs to one of four places:

    fields of the ModelConfig with each other   config_mistakes (it sees only the ModelConfig)
    a field with the rest of the spec           _model_mistakes and the checks that it calls
    `optimization` with what a backend reads    optimization_checks.py
    a field with the artifact                   derived_config.py

Sources: the core's model_config_utils.cc, backend_model_instance.cc and sequence_batch_scheduler.cc; the backends'
own checks (onnxruntime.cc, libtorch.cc, instance_state.cc); trials with the server of release 24.10.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from build_tasks.tensors import INPUT
from build_tasks.triton import optimization_checks
from build_tasks.triton.model_config import (
    SCHEDULERS,
    Mistake,
    enum,
    field_mistakes,
    fields_of_format,
    protobuf,
    shorten,
    to_message,
)
from build_tasks.triton.platforms import ENSEMBLE_MODELS, FORMATS, TRITON_MODELS
from build_tasks.triton.serving_facts import ServingFacts

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
        for key, expected, found in field_mistakes(table, bool(model_format))
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
        return
    config.max_batch_size = facts.largest_batches[model_format]
    yield from _max_batch_size(facts, model_format, config, fields)
    for scheduler in SCHEDULERS & fields.keys():
        if config.max_batch_size == 0 and fields[scheduler] is not False:
            expected = f"false in [triton.{model_format}], since onnx.dynamic_axes = false fixes the batch"
            yield scheduler, expected, shorten(fields[scheduler])
            return
    yield from _instances(facts, model_format, config, fields)
    yield from _versions(facts, config, fields)
    yield from optimization_checks.mistakes(facts, model_format, config, fields)
    yield from _other_fields(facts, model_format, config)
    yield from config_mistakes(config)


def _max_batch_size(facts: ServingFacts, model_format: str, config: Any, fields: dict[str, Any]) -> Iterator[Mistake]:
    key = "max_batch_size"
    size, limit = fields.get(key), facts.max_batch_size
    smallest, _, largest = facts.profile
    if size is None:
        return
    if model_format == "tensorrt" and size < smallest:
        yield key, f"at least {smallest}, the smallest batch of the engine's profile", repr(size)
    elif model_format == "tensorrt" and size > largest:
        yield key, f"at most {largest}, the largest batch of the engine's profile", repr(size)
    elif config.max_batch_size == 0:
        yield key, "nothing, since onnx.dynamic_axes = false fixes the batch", repr(size)
    elif size > limit:
        yield key, f"at most {limit}, the max_batch_size above the tables", repr(size)


def config_mistakes(config: Any) -> Iterator[Mistake]:
    """Yield contradictions within a ModelConfig whose max_batch_size is set: in its schedulers and warm-up requests."""
    yield from _dynamic_batching(config)
    yield from _sequence_batching(config)
    yield from _warm_up(config)


def _dynamic_batching(config: Any) -> Iterator[Mistake]:
    if not config.HasField("dynamic_batching"):
        return
    batching, key, largest = config.dynamic_batching, "dynamic_batching", config.max_batch_size
    if largest == 1:
        yield key, "nothing, since max_batch_size = 1 leaves nothing to batch", "a table"
    yield from _preferred_batch_sizes(batching.preferred_batch_size, key, largest)
    levels = batching.priority_levels
    if levels and not 1 <= batching.default_priority_level <= levels:
        yield f"{key}.default_priority_level", f"1 to priority_levels, {levels}", repr(batching.default_priority_level)
    for name, value in (
        ("default_priority_level", batching.default_priority_level),
        ("priority_queue_policy", sorted(batching.priority_queue_policy)),
    ):
        if not levels and value:
            yield f"{key}.{name}", "nothing, since there are no priority_levels", repr(value)
    for level in sorted(batching.priority_queue_policy):
        if levels and not 1 <= level <= levels:
            yield f"{key}.priority_queue_policy", f"levels from 1 to priority_levels, {levels}", repr(level)
    policies = {"default_queue_policy": batching.default_queue_policy}
    policies |= {f"priority_queue_policy.{n}": policy for n, policy in sorted(batching.priority_queue_policy.items())}
    delay = batching.max_queue_delay_microseconds
    for name, policy in policies.items():
        timeout = policy.default_timeout_microseconds
        delays = policy.timeout_action == enum("ModelQueuePolicy.TimeoutAction", "DELAY")
        if batching.preserve_ordering and delays:
            yield f"{key}.{name}.timeout_action", "REJECT, since preserve_ordering = true", "'DELAY'"
        if 0 < timeout <= delay and not delays:
            expected = f"more than max_queue_delay_microseconds, {delay}, since a single request waits that long"
            yield f"{key}.{name}.default_timeout_microseconds", expected, repr(timeout)
    if batching.preserve_ordering and levels > 1:
        yield f"{key}.preserve_ordering", f"false, since there are {levels} priority_levels", "true"


def _preferred_batch_sizes(sizes: Iterable[int], scheduler: str, largest: int) -> Iterator[Mistake]:
    for size in sizes:
        if not 1 <= size <= largest:
            yield f"{scheduler}.preferred_batch_size", f"1 to max_batch_size, {largest}", repr(size)


def _sequence_batching(config: Any) -> Iterator[Mistake]:
    if not config.HasField("sequence_batching"):
        return
    batching, key = config.sequence_batching, "sequence_batching"
    yield from _preferred_batch_sizes(batching.oldest.preferred_batch_size, f"{key}.oldest", config.max_batch_size)
    if not 0 <= batching.direct.minimum_slot_utilization <= 1:
        yield f"{key}.direct.minimum_slot_utilization", "0 to 1", repr(batching.direct.minimum_slot_utilization)
    for name in ("control_input", "state"):  # Triton would pass them as more inputs, which the network does not have
        if getattr(batching, name):
            found = ", ".join(part.name or "''" for part in batching.control_input) if name == "control_input" else name
            yield f"{key}.{name}", f"nothing, since the network has only the input {INPUT}", repr(found)
    if config.response_cache.enable:
        yield "response_cache", "nothing, since Triton does not cache sequences", "enable = true"


def _warm_up(config: Any) -> Iterator[Mistake]:
    """Yield samples that Triton skips, or that prevent the model from being loaded.

    Where the ModelConfig has its inputs, the tensors of the samples are compared with them.
    """
    largest = config.max_batch_size
    names = [sample.name for sample in config.model_warmup]
    inputs = {tensor.name: tensor for tensor in config.input}
    for index, sample in enumerate(config.model_warmup):
        key = f"model_warmup[{index}]"
        if names.index(sample.name) != index:
            yield f"{key}.name", "a name that no sample before has", repr(sample.name)
        if not 1 <= sample.batch_size <= max(largest, 1):
            expected = f"1 to max_batch_size, {largest}" if largest else "1, since dims contain the fixed batch"
            yield f"{key}.batch_size", expected, repr(sample.batch_size)
        for name, tensor in sorted(sample.inputs.items()):
            if tensor.WhichOneof("input_data_type") is None:
                yield f"{key}.inputs.{name}", "one of zero_data, random_data, input_data_file", "none of them"
        if inputs and sorted(sample.inputs) != sorted(inputs):
            yield f"{key}.inputs", f"the model's inputs, {', '.join(inputs)}", repr(", ".join(sorted(sample.inputs)))
        elif inputs:
            for name, tensor in sorted(sample.inputs.items()):
                yield from _warm_up_tensor(f"{key}.inputs.{name}", tensor, inputs[name])


def _warm_up_tensor(key: str, tensor: Any, model_input: Any) -> Iterator[Mistake]:
    name_of = protobuf().DataType.Name
    if tensor.data_type != model_input.data_type:
        yield f"{key}.data_type", name_of(model_input.data_type), name_of(tensor.data_type)
    dims, model_dims = list(tensor.dims), list(model_input.dims)
    if len(dims) != len(model_dims) or not all(
        a == b or (b == -1 and a > 0) for a, b in zip(dims, model_dims, strict=True)
    ):
        yield f"{key}.dims", f"{model_dims}, the dims of the model", repr(dims)


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
        if group.profile and model_format != "tensorrt":
            yield f"{key}.profile", "nothing, since only plans have profiles", repr(list(group.profile))
        elif set(group.profile) - {"0"}:
            yield (
                f"{key}.profile",
                '["0"], since every engine of this project has one profile',
                repr(list(group.profile)),
            )
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
    if config.model_transaction_policy.decoupled and model_format in FORMATS:
        yield "model_transaction_policy.decoupled", "false, since each image has one answer", "true"
    for name in sorted(config.parameters):
        if not name:
            yield "parameters", "parameters with a name", "''"
        elif name.startswith("provenance."):
            yield f"parameters.{name}", "another name, since publish writes parameters of this name", repr(name)
    for field in ("batch_input", "batch_output"):
        if count := len(getattr(config, field)) if model_format in FORMATS else 0:
            yield field, f"nothing, since the network has only the input {INPUT}", f"{count} of them"
    for index, sample in enumerate(config.model_warmup):
        for name, tensor in sorted(sample.inputs.items()):
            file = tensor.input_data_file
            from_file = tensor.WhichOneof("input_data_type") == "input_data_file"
            if from_file and not os.path.isfile(f"{facts.warm_up_folder}/{file}"):
                key = f"model_warmup[{index}].inputs.{name}.input_data_file"
                yield key, f"a file in {facts.warm_up_folder}/", repr(file)
