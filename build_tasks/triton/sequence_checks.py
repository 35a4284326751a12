"""Checks of ModelConfig's sequence_batching: its controls, which Triton writes, and its states, which Triton keeps.

Sources: GetBooleanSequenceControlProperties and GetTypedSequenceControlProperties in the core's model_config_utils.cc,
GenerateInitialStateData in its sequence_batch_scheduler.cc, and SequenceStates in its sequence_state.cc.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from build_tasks.triton.model_config import Mistake, enum, protobuf
from build_tasks.triton.warm_up_checks import byte_size

FLAGS = {"int32_false_true": "TYPE_INT32", "fp32_false_true": "TYPE_FP32", "bool_false_true": "TYPE_BOOL"}
CORRELATION_ID = "CONTROL_SEQUENCE_CORRID"
ID_TYPES = ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")


def mistakes(config: Any) -> Iterator[Mistake]:
    """Yield contradictions within the sequence batcher of a ModelConfig whose max_batch_size is set."""
    if not config.HasField("sequence_batching"):
        return
    batching, key = config.sequence_batching, "sequence_batching"
    for size in batching.oldest.preferred_batch_size:
        if not 1 <= size <= config.max_batch_size:
            yield f"{key}.oldest.preferred_batch_size", f"1 to max_batch_size, {config.max_batch_size}", repr(size)
    if not 0 <= batching.direct.minimum_slot_utilization <= 1:
        yield f"{key}.direct.minimum_slot_utilization", "0 to 1", repr(batching.direct.minimum_slot_utilization)
    yield from _controls(batching.control_input, f"{key}.control_input")
    yield from _states(batching.state, f"{key}.state")
    if config.response_cache.enable:
        yield "response_cache", "nothing, since Triton does not cache sequences", "enable = true"


def control_type(control: Any) -> str:
    """Return the data type of the tensor that a control is written to."""
    flags = (dtype for field, dtype in FLAGS.items() if getattr(control, field))
    return next(flags, "") or str(protobuf().DataType.Name(control.data_type))


def _controls(inputs: Iterable[Any], key: str) -> Iterator[Mistake]:
    names: set[str] = set()
    kinds: set[str] = set()
    for index, tensor in enumerate(inputs):
        path = f"{key}[{index}]"
        if not tensor.name or tensor.name in names:
            expected = "the name of an input of the network" + ", each once" * bool(tensor.name)
            yield f"{path}.name", expected, repr(tensor.name) if tensor.name else "nothing"
        names.add(tensor.name)
        if len(tensor.control) != 1:  # of several, the backend would write all into the same tensor
            yield f"{path}.control", "one control", f"{len(tensor.control)} of them" if tensor.control else "none"
        for control in tensor.control:
            kind = type(control).Kind.Name(control.kind)
            if kind in kinds:
                yield f"{path}.control", "each kind of control once", repr(kind)
            kinds.add(kind)
            yield from _control(control, kind, f"{path}.control")


def _control(control: Any, kind: str, path: str) -> Iterator[Mistake]:
    flags = [field for field in FLAGS if getattr(control, field)]
    if kind == CORRELATION_ID:
        dtype = protobuf().DataType.Name(control.data_type)
        if flags:
            yield f"{path}.{flags[0]}", f"data_type instead, since {kind} is no flag", "values"
        elif dtype not in ID_TYPES:
            yield f"{path}.data_type", f"one of {', '.join(ID_TYPES)}", repr(dtype)
    elif len(flags) != 1:
        yield path, f"one of {', '.join(FLAGS)} for {kind}", " and ".join(flags) or "none of them"
    elif len(values := list(getattr(control, flags[0]))) != 2:
        yield f"{path}.{flags[0]}", "two values, for false and for true", repr(values)


def _states(states: Iterable[Any], key: str) -> Iterator[Mistake]:
    names: dict[str, list[str]] = {"input_name": [], "output_name": []}
    for index, state in enumerate(states):
        path = f"{key}[{index}]"
        for field, before in names.items():
            name = getattr(state, field)
            if not name or name in before:
                kind = field.partition("_")[0]
                expected = f"the name of an {kind} of the network" + ", each once" * bool(name)
                yield f"{path}.{field}", expected, repr(name) if name else "nothing"
            before.append(name)
        if state.data_type == enum("DataType", "TYPE_INVALID"):
            yield f"{path}.data_type", "the type of the network's tensor", "nothing"
        if not state.dims or any(dim < 1 and dim != -1 for dim in state.dims):
            yield f"{path}.dims", "dims >= 1, or -1 for an open dimension", repr(list(state.dims))
        if len(state.initial_state) > 1:
            yield f"{path}.initial_state", "at most one", f"{len(state.initial_state)} of them"
        for initial in state.initial_state:
            yield from _initial_state(initial, state, f"{path}.initial_state")
        if state.use_growable_memory and not state.use_same_buffer_for_input_output:
            yield f"{path}.use_growable_memory", "use_same_buffer_for_input_output = true as well", "false"
    # SequenceStates::OutputState pairs the two names by their positions in two sorted maps.
    order = [
        sorted(range(len(before)), key=lambda each, before=before: before[each])  # type: ignore[misc]
        for before in names.values()
    ]
    if order[0] != order[1]:
        expected = "output names in the alphabetical order of the input names, since Triton pairs them by that order"
        yield key, expected, ", ".join(f"{a} and {b}" for a, b in zip(*names.values(), strict=True))


def _initial_state(initial: Any, state: Any, path: str) -> Iterator[Mistake]:
    name_of = protobuf().DataType.Name
    if not initial.name:
        yield f"{path}.name", "a name", "nothing"
    if initial.data_type != state.data_type:
        yield f"{path}.data_type", name_of(state.data_type), repr(name_of(initial.data_type))
    dims, expected = list(initial.dims), list(state.dims)
    fits = len(dims) == len(expected) and all(a > 0 and b in (a, -1) for a, b in zip(dims, expected, strict=True))
    if not fits:
        yield f"{path}.dims", f"fixed dims that fit those of the state, {expected}", repr(dims)
    if initial.WhichOneof("state_data") is None:
        yield path, "zero_data or data_file", "none of them"


def file_mistakes(config: Any, folder: str) -> Iterator[Mistake]:
    """Yield files of initial states that are missing, or of another size.

    Args:
        folder: The folder that holds the files.
    """
    for index, state in enumerate(config.sequence_batching.state):
        for initial in state.initial_state:
            if initial.WhichOneof("state_data") != "data_file":
                continue
            key, path = f"sequence_batching.state[{index}].initial_state.data_file", f"{folder}/{initial.data_file}"
            needed = byte_size(initial)
            if not os.path.isfile(path):
                yield key, f"a file in {folder}/", repr(initial.data_file)
            elif needed is not None and os.path.getsize(path) != needed:
                found = f"{os.path.getsize(path)} bytes in {path}"
                yield key, f"{needed} bytes, as dims and data_type say", found
