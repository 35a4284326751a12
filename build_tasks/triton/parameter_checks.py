"""Checks of ModelConfig's `parameters`, which each backend reads for itself.

A backend ignores every name that it does not know, so that parameters may also hold notes of a user. A name that is
nearly one of its own, or that only another backend knows, is a mistake that Triton does not show. A wrong value
prevents the model from being loaded.

Sources: pytorch_backend, src/pt/model_state.cc; onnxruntime_backend, src/onnxruntime.cc; tensorrt_backend,
src/model_state.cc; python_backend, src/python_be.cc; ParseBoolValue and ParseIntValue of the repository `backend`, each
in the branches r23.10 to r26.06. ONNX Runtime's list of devices was tried with ONNX Runtime 1.32.
"""

import re
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from build_tasks.triton.model_config import Mistake
from build_tasks.triton.repository import PROVENANCE_PREFIX
from build_tasks.triton.serving_facts import ServingFacts

BOOLEAN = ("true", "false", "on", "off", "1", "0")  # in any case
COUNT = range(1, 2**31)  # 0 and negative numbers are ignored
COUNT_OR_DEFAULT = range(2**31)  # 0: the library decides
BYTES = range(1, 2**62)
TEXT = "a text that is not empty"
MANY = 1000  # a longer range of numbers is described by its first one


class Parameter(Struct, frozen=True):
    """A parameter that a backend reads."""

    values: str | range | tuple[str, ...]  # the accepted values; a text says what they are
    since: str = ""  # the first release that reads it
    until: str = "99.99"  # the first release that does not read it any more
    needs_gpu: bool = False


# fmt: off
PARAMETERS = {
    "torchscript": {
        "DISABLE_OPTIMIZED_EXECUTION": Parameter(BOOLEAN), "ENABLE_CACHE_CLEANING": Parameter(BOOLEAN),
        "INFERENCE_MODE": Parameter(BOOLEAN), "ENABLE_TENSOR_FUSER": Parameter(BOOLEAN),
        "ENABLE_WEIGHT_SHARING": Parameter(BOOLEAN), "ENABLE_JIT_PROFILING": Parameter(BOOLEAN),
        "ENABLE_JIT_EXECUTOR": Parameter(BOOLEAN), "ENABLE_NVFUSER": Parameter(BOOLEAN, until="23.12"),
        "DISABLE_CUDNN": Parameter(BOOLEAN, since="24.06"),
        "INTRA_OP_THREAD_COUNT": Parameter(COUNT, since="24.05"),
        "INTER_OP_THREAD_COUNT": Parameter(COUNT, since="24.05"),
    },
    "onnx": {
        "execution_mode": Parameter(("0", "1")), "intra_op_thread_count": Parameter(COUNT_OR_DEFAULT),
        "inter_op_thread_count": Parameter(COUNT_OR_DEFAULT), "enable_mem_arena": Parameter(BOOLEAN),
        "enable_mem_pattern": Parameter(BOOLEAN),
        "session.use_device_allocator_for_initializers": Parameter(("0", "1")),
        "memory.enable_memory_arena_shrinkage": Parameter("cpu:0, gpu:0 or both, with ; between them"),
        "cudnn_conv_algo_search": Parameter(("0", "1", "2"), needs_gpu=True),
        "gpu_mem_limit": Parameter(BYTES, needs_gpu=True),
        "arena_extend_strategy": Parameter(("0", "1"), needs_gpu=True),
        "do_copy_in_default_stream": Parameter(("0", "1"), needs_gpu=True),
    },
    "tensorrt": {
        "execution_context_allocation_strategy": Parameter(("STATIC", "ON_PROFILE_CHANGE"), since="25.05"),
        "enable_multi_device": Parameter("nothing, since a plan of this project runs on one GPU"),
        "multi_device_gpus": Parameter("nothing, since a plan of this project runs on one GPU"),
        "multi_device_per_rank_engines": Parameter("nothing, since a plan of this project runs on one GPU"),
    },
    # ParseParameters in src/pt2/model_state.cc of pytorch_backend, r26.05, reads none of them.
    "aoti": {},
    "preprocess": {
        "FORCE_CPU_ONLY_INPUT_TENSORS": Parameter(("yes", "no")),
        "EXECUTION_ENV_PATH": Parameter("nothing, since the published folder contains no environment"),
    },
    "ensemble": {},
}
# fmt: on

SHRINKAGE = "memory.enable_memory_arena_shrinkage"
SIMILAR = 0.85  # ratio of difflib: a few letters more, less or other in a name


def mistakes(facts: ServingFacts, model_format: str, config: Any) -> Iterator[Mistake]:
    """Yield parameters that the backend does not read although they look so, and values that it refuses.

    A parameter of [triton] itself is for all formats, so that it is right if the backend of one of them reads it.
    """
    own = "parameters" in facts.config_fields.get(model_format, {})
    readers = [model_format] if own else [f for f in facts.model_formats if _reads_common_parameters(facts, f)]
    for name in sorted(config.parameters):
        key = f"parameters.{name}"
        if not name:
            yield "parameters", "parameters with a name", "''"
        elif name.startswith(PROVENANCE_PREFIX):
            yield key, "another name, since publish writes parameters of this name", repr(name)
        elif parameter := PARAMETERS[model_format].get(name):
            if expected := _expected(facts, config, name, parameter):
                yield key, expected, repr(config.parameters[name].string_value)
        elif not any(name in PARAMETERS[reader] for reader in readers) and (meant := _meant(name, readers)):
            known, where = meant
            yield "parameters", f"{known}, {where}, or a name unlike it, since Triton ignores this one", repr(name)


def _reads_common_parameters(facts: ServingFacts, model_format: str) -> bool:
    """Return whether a format uses the parameters of [triton] itself, and none of its own table."""
    parts_of_ensemble = model_format in ("preprocess", "ensemble")
    return not parts_of_ensemble and "parameters" not in facts.config_fields.get(model_format, {})


def _meant(name: str, readers: list[str]) -> tuple[str, str] | None:
    """Return the parameter that a name probably means, and which format reads it. None for a name of another kind."""
    import difflib

    def plain(text: str) -> str:  # "num_threads" is the name in the Python APIs of both libraries
        return re.sub(r"[^a-z0-9]", "", text.lower()).replace("numthreads", "threadcount")

    for formats in (readers, [model_format for model_format in PARAMETERS if model_format not in readers]):
        names = [(known, model_format) for model_format in formats for known in PARAMETERS[model_format]]
        ratios = [
            2.0 if known == name else difflib.SequenceMatcher(None, plain(known), plain(name)).ratio()
            for known, _ in names
        ]
        if (most := max(ratios, default=0)) >= SIMILAR:
            known, model_format = names[ratios.index(most)]
            return known, f"which {model_format} reads"
    return None


def _expected(facts: ServingFacts, config: Any, name: str, parameter: Parameter) -> str | None:
    """Return what is expected of a parameter. None if its value is right."""
    value = config.parameters[name].string_value
    if name.lower() == "intra_op_thread_count" and facts.cores and value.isdecimal() and int(value) > facts.cores:
        return f"int <= {facts.cores}, since triton.cores = {facts.cores}"
    if name == SHRINKAGE:
        return _expected_shrinkage(facts, config, value)
    return expected_value(facts, parameter, value)


def expected_value(facts: ServingFacts, parameter: Parameter, value: str) -> str | None:
    """Return what is expected of a parameter that a backend reads as text. None if its value is right."""
    if facts.release < parameter.since:
        return f"nothing, since Triton {facts.release} does not read it ({parameter.since} and newer do)"
    if facts.release >= parameter.until:
        return f"nothing, since Triton {parameter.until} and newer do not read it"
    if parameter.needs_gpu and facts.device == "cpu":
        return 'nothing, since triton.device = "cpu"'
    values = parameter.values
    if isinstance(values, range):
        is_int = re.fullmatch(r"-?\d{1,19}", value) is not None
        if is_int and int(value) in values:
            return None
        return f"int >= {values.start}" + (f" and <= {values[-1]}" if len(values) < MANY else "")
    if isinstance(values, tuple):
        known = value.lower() in values if values is BOOLEAN else value in values
        return None if known else f"one of {', '.join(values)}"
    return None if values == TEXT and value else values


def _expected_shrinkage(facts: ServingFacts, config: Any, value: str) -> str | None:
    """Return what is expected of ONNX Runtime's list of memory arenas that shrink after each request.

    A request fails if its session has no such arena. A session uses the arena of the CPU and that of its own GPU.
    """
    gpus = sorted({gpu for group in config.instance_group for gpu in group.gpus}) or [0]
    devices = (
        ["cpu:0"] if config.parameters["enable_mem_arena"].string_value.lower() not in ("false", "off", "0") else []
    )
    if facts.device != "cpu" and len(gpus) == 1:
        devices.append(f"gpu:{gpus[0]}")
    if value and all(device in devices for device in value.split(";")):
        return None
    return f"{' or '.join(devices) or 'nothing'}, the memory arenas that every instance has (; between them)"
