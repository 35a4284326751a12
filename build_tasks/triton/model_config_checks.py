"""What in [triton] contradicts the spec, or itself: told before a server refuses it, or, worse, passes over it.

Sources: the core's model_config_utils.cc, backend_model_instance.cc and sequence_batch_scheduler.cc, the backends' own
checks (onnxruntime.cc, libtorch.cc, instance_state.cc), and trials with the server of release 24.10. Some of what is
refused here ends that server: only passive instances, say, at the first request.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from build_tasks.spec.model import TRITON_KEYS, Model
from build_tasks.tensors import INPUT
from build_tasks.triton import optimization_checks
from build_tasks.triton.model_config import (
    SCHEDULERS,
    Mistake,
    enum,
    fields,
    message,
    protobuf,
    short,
    structural,
    warm_up_file,
)
from build_tasks.triton.platforms import ENSEMBLE_MODELS, FORMATS

NOT_OF_AN_ENSEMBLE = ("instance_group", "optimization", "model_warmup", *sorted(SCHEDULERS))


def mistakes(model: Model) -> Iterator[Mistake]:
    """What is wrong with [triton], as far as the spec tells; config.py tells what the artifact contradicts."""
    triton = model.spec.triton
    tables: dict[str, dict[str, Any]] = {"": {}}
    for key, value in triton.items():
        if key in FORMATS or key in ENSEMBLE_MODELS:
            if not isinstance(value, dict):
                yield key, "a table", repr(value)
            elif key not in (*model.served_formats, *model.ensemble_parts):
                yield key, f"nothing, since {_why_not(key)}", short(value)
            else:
                tables[key] = value
        elif key not in TRITON_KEYS:
            tables[""][key] = value
    found = []
    for model_format, table in tables.items():
        prefix = f"{model_format}." if model_format else ""
        found += [
            (f"{prefix}{path}".rstrip("."), expected, wrong)
            for path, expected, wrong in structural(table, bool(model_format))
        ]
    yield from found
    if found or not any(tables.values()):
        return
    told = set()
    for model_format in (*model.served_formats, *model.ensemble_parts):
        given = fields(model, model_format)
        parsed = {field: value for field, value in given.items() if value is not False and field != "max_batch_size"}
        if parsed.keys() >= SCHEDULERS:
            yield model_format if SCHEDULERS & triton.get(model_format, {}).keys() else "", f"one of {_both()}", "both"
            return
        try:
            config = message(parsed)
        except ValueError as error:  # what the fields' types do not tell
            yield model_format if model_format in triton else "", "what Triton's protobuf takes", str(error)
            return
        for path, expected, wrong in _of_a_model(model, model_format, config, given):
            field = path.partition(".")[0].partition("[")[0]
            mistake = (f"{model_format}.{path}" if field in triton.get(model_format, {}) else path, expected, wrong)
            if mistake not in told:
                told.add(mistake)
                yield mistake


def _both() -> str:
    return " and ".join(sorted(SCHEDULERS))


def _why_not(model_format: str) -> str:
    return "there is no ensemble" if model_format in ENSEMBLE_MODELS else "formats leave it out"


def _of_a_model(model: Model, model_format: str, config: Any, given: dict[str, Any]) -> Iterator[Mistake]:
    """What contradicts the spec, or itself, in the fields of one model of Triton's."""
    if model_format == "ensemble":
        for field in NOT_OF_AN_ENSEMBLE:
            if field in given:
                yield field, "nothing, since an ensemble has none of its own", short(given[field])
        return
    config.max_batch_size = model.largest_batch(model_format)
    asked, most = given.get("max_batch_size"), model.spec.max_batch_size
    smallest, _, largest = model.spec.profile
    if asked is not None and model_format == "tensorrt" and not smallest <= asked <= largest:
        expected = f"at most {largest}, the largest batch of the engine's profile"
        if asked < smallest:
            expected = f"at least {smallest}, the smallest batch of the engine's profile"
        yield "max_batch_size", expected, repr(asked)
    elif asked is not None and config.max_batch_size == 0:
        yield "max_batch_size", "nothing, since onnx.dynamic_axes = false fixes the batch", repr(asked)
    elif asked is not None and asked > most:
        yield "max_batch_size", f"at most {most}, the max_batch_size that is checked", repr(asked)
    for scheduler in SCHEDULERS & given.keys():
        if config.max_batch_size == 0 and given[scheduler] is not False:
            expected = f"false in [triton.{model_format}], since onnx.dynamic_axes = false fixes the batch"
            yield scheduler, expected, short(given[scheduler])
            return
    yield from _instances(model, model_format, config, given)
    yield from _versions(model, config, given)
    yield from optimization_checks.mistakes(model, model_format, config, given)
    yield from _others(model, model_format, config, given)
    yield from within(config)


def within(config: Any) -> Iterator[Mistake]:
    """What contradicts itself within a ModelConfig that has its maximal batch: schedulers and warm-ups."""
    yield from _dynamic(config)
    yield from _sequences(config)
    yield from _warm_ups(config)


def _dynamic(config: Any) -> Iterator[Mistake]:
    if not config.HasField("dynamic_batching"):
        return
    batching, at, largest = config.dynamic_batching, "dynamic_batching", config.max_batch_size
    if largest == 1:
        yield at, "nothing, since max_batch_size = 1 leaves nothing to batch", "a table"
    yield from _preferred(batching.preferred_batch_size, f"{at}.preferred_batch_size", largest)
    levels = batching.priority_levels
    if levels and not 1 <= batching.default_priority_level <= levels:
        yield f"{at}.default_priority_level", f"1 to priority_levels, {levels}", repr(batching.default_priority_level)
    for key, value in (
        ("default_priority_level", batching.default_priority_level),
        ("priority_queue_policy", sorted(batching.priority_queue_policy)),
    ):
        if not levels and value:
            yield f"{at}.{key}", "nothing, since there are no priority_levels", repr(value)
    for level in sorted(batching.priority_queue_policy):
        if levels and not 1 <= level <= levels:
            yield f"{at}.priority_queue_policy", f"levels from 1 to priority_levels, {levels}", repr(level)
    policies = {"default_queue_policy": batching.default_queue_policy}
    policies |= {f"priority_queue_policy.{n}": policy for n, policy in sorted(batching.priority_queue_policy.items())}
    delay = batching.max_queue_delay_microseconds
    for name, policy in policies.items():
        timeout = policy.default_timeout_microseconds
        delays = policy.timeout_action == enum("ModelQueuePolicy.TimeoutAction", "DELAY")
        if batching.preserve_ordering and delays:
            yield f"{at}.{name}.timeout_action", "REJECT, since preserve_ordering = true", "'DELAY'"
        if 0 < timeout <= delay and not delays:
            expected = f"more than max_queue_delay_microseconds, {delay}, which a lone request waits"
            yield f"{at}.{name}.default_timeout_microseconds", expected, repr(timeout)
    if batching.preserve_ordering and levels > 1:
        yield f"{at}.preserve_ordering", f"false, since there are {levels} priority_levels", "true"


def _preferred(sizes: Iterable[int], at: str, largest: int) -> Iterator[Mistake]:
    for size in sizes:
        if not 1 <= size <= largest:
            yield at, f"1 to max_batch_size, {largest}", repr(size)


def _sequences(config: Any) -> Iterator[Mistake]:
    if not config.HasField("sequence_batching"):
        return
    batching, at = config.sequence_batching, "sequence_batching"
    yield from _preferred(
        batching.oldest.preferred_batch_size, f"{at}.oldest.preferred_batch_size", config.max_batch_size
    )
    if not 0 <= batching.direct.minimum_slot_utilization <= 1:
        yield f"{at}.direct.minimum_slot_utilization", "0 to 1", repr(batching.direct.minimum_slot_utilization)
    for key in ("control_input", "state"):  # tensors that the network would have besides its images
        if getattr(batching, key):
            names = ", ".join(part.name or "''" for part in batching.control_input) if key == "control_input" else key
            yield f"{at}.{key}", f"nothing, since the network takes {INPUT} alone", repr(names)
    if config.response_cache.enable:
        yield "response_cache", "nothing, since Triton does not cache sequences", "enable = true"


def _warm_ups(config: Any) -> Iterator[Mistake]:
    """Samples that Triton skips, or that keep the model from being loaded. Where the inputs are known, against them."""
    largest = config.max_batch_size
    names = [sample.name for sample in config.model_warmup]
    for index, sample in enumerate(config.model_warmup):
        at = f"model_warmup[{index}]"
        if names.index(sample.name) != index:
            yield f"{at}.name", "another than of the one before", repr(sample.name)
        if not 1 <= sample.batch_size <= max(largest, 1):
            what = f"1 to max_batch_size, {largest}" if largest else "1, since the batch is fixed and stands in dims"
            yield f"{at}.batch_size", what, repr(sample.batch_size)
        for name, tensor in sorted(sample.inputs.items()):
            if tensor.WhichOneof("input_data_type") is None:
                yield f"{at}.inputs.{name}", "one of zero_data, random_data, input_data_file", "none of them"
        inputs = {tensor.name: tensor for tensor in config.input}
        if not inputs:
            continue
        if sorted(sample.inputs) != sorted(inputs):
            yield f"{at}.inputs", f"the model's inputs, {', '.join(inputs)}", repr(", ".join(sorted(sample.inputs)))
            continue
        for name, tensor in sorted(sample.inputs.items()):
            model, types = inputs[name], protobuf().DataType
            if tensor.data_type != model.data_type:
                yield f"{at}.inputs.{name}.data_type", types.Name(model.data_type), types.Name(tensor.data_type)
            dims, wanted = list(tensor.dims), list(model.dims)
            fits = len(dims) == len(wanted) and all(
                a == b or (b == -1 and a > 0) for a, b in zip(dims, wanted, strict=True)
            )
            if not fits:
                yield f"{at}.inputs.{name}.dims", f"{wanted}, as the model's", repr(dims)


def _instances(model: Model, model_format: str, config: Any, given: dict[str, Any]) -> Iterator[Mistake]:
    device = model.triton("device")
    kind_of = protobuf().ModelInstanceGroup.Kind.Name
    for index, (group, raw) in enumerate(zip(config.instance_group, given.get("instance_group") or (), strict=True)):
        at = f"instance_group[{index}]"
        kind = (
            "KIND_CPU" if model_format == "preprocess" and "kind" not in raw else kind_of(group.kind)
        )  # as config.py has it
        if "count" in raw and group.count < 1:
            yield f"{at}.count", "int >= 1", repr(group.count)
        if model_format == "tensorrt" and kind in ("KIND_CPU", "KIND_MODEL"):
            yield f"{at}.kind", "KIND_GPU, since a plan runs on a GPU", repr(kind)
        elif device == "cpu" and kind in ("KIND_GPU", "KIND_MODEL"):
            yield f"{at}.kind", 'KIND_CPU, since triton.device = "cpu"', repr(kind)
        elif device == "gpu" and kind == "KIND_CPU" and model_format in FORMATS:
            yield f"{at}.kind", 'KIND_GPU, since triton.device = "gpu"', repr(kind)
        gpus = list(group.gpus)
        if gpus and kind in ("KIND_CPU", "KIND_MODEL"):
            yield f"{at}.gpus", f"nothing, since kind = {kind}", repr(gpus)
        elif gpus and device == "cpu":
            yield f"{at}.gpus", 'nothing, since triton.device = "cpu"', repr(gpus)
        if len(set(gpus)) != len(gpus) or any(gpu < 0 for gpu in gpus):
            yield f"{at}.gpus", "numbers of GPUs, each once", repr(gpus)
        if group.profile and model_format != "tensorrt":
            yield f"{at}.profile", "nothing, since only plans have profiles", repr(list(group.profile))
        elif set(group.profile) - {"0"}:
            yield f"{at}.profile", '["0"], since an engine has one profile here', repr(list(group.profile))
        for resource in group.rate_limiter.resources:
            if not resource.name or resource.count < 1:
                found = f"{resource.name!r}, {resource.count}"
                yield f"{at}.rate_limiter.resources", "resources with a name and a count >= 1", found
    if given.get("instance_group") == []:
        yield "instance_group", "at least one group", "[]"
    elif config.instance_group and all(group.passive for group in config.instance_group):
        yield "instance_group", "a group that is not passive, to answer requests", "only passive ones"
    everywhere: dict[str, bool] = {}
    for group in config.instance_group:
        for resource in group.rate_limiter.resources:
            if everywhere.setdefault(resource.name, getattr(resource, "global")) != getattr(resource, "global"):
                yield "instance_group", f"the resource {resource.name!r} with one value of global", "both"


def _versions(model: Model, config: Any, given: dict[str, Any]) -> Iterator[Mistake]:
    policy, kept = config.version_policy, model.triton("keep_versions")
    choice = policy.WhichOneof("policy_choice")
    if "version_policy" in given and choice is None:
        yield "version_policy", "one of latest, all, specific", "{}"
    elif choice == "latest" and not 1 <= policy.latest.num_versions <= kept:
        yield (
            "version_policy.latest.num_versions",
            f"1 to triton.keep_versions, {kept}",
            repr(policy.latest.num_versions),
        )
    elif choice == "specific":
        versions = list(policy.specific.versions)
        if not versions or len(set(versions)) != len(versions) or min(versions) < 1:
            yield "version_policy.specific.versions", "versions, each once", repr(versions)
        elif len(versions) > kept:
            expected = f"at most {kept}, the triton.keep_versions"
            yield "version_policy.specific.versions", expected, f"{len(versions)}, {versions}"


def _others(model: Model, model_format: str, config: Any, given: dict[str, Any]) -> Iterator[Mistake]:
    if config.model_transaction_policy.decoupled and model_format in FORMATS:
        yield "model_transaction_policy.decoupled", "false, since an image is answered once", "true"
    for name in sorted(config.parameters):
        if not name:
            yield "parameters", "parameters with a name", "''"
        elif name.startswith("provenance."):
            yield f"parameters.{name}", "another name, since the build writes its own there", repr(name)
    for key in ("batch_input", "batch_output"):
        if getattr(config, key) and model_format in FORMATS:
            yield key, f"nothing, since the network takes {INPUT} alone", f"{len(getattr(config, key))} of them"
    for index, sample in enumerate(config.model_warmup):
        for name, tensor in sorted(sample.inputs.items()):
            file = tensor.input_data_file
            if tensor.WhichOneof("input_data_type") == "input_data_file" and not os.path.isfile(
                warm_up_file(model, file)
            ):
                expected = f"a file in {os.path.dirname(warm_up_file(model, 'x'))}/"
                yield f"model_warmup[{index}].inputs.{name}.input_data_file", expected, repr(file)
