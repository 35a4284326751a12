"""The instances and threads with which a CPU server uses all of its cores: what follows from triton.cores.

An instance computes one batch at a time. By default a backend gives each instance a thread for every core. Such threads
wait for each other at every operator, and the operators that one thread computes leave the other cores idle. Instances
with one thread each do neither: on two cores, two of them served 1.96 times (TorchScript) and 1.2 times (ONNX) the
images of one instance with two threads, in a Triton server with both backends. So the default is one instance for each
core. A value that the spec sets stays, and the other one follows from it: instances x threads = cores.

`doit bench` proposes the same from its own measurements (bench/recommendation.py).
"""

from typing import Any

from msgspec import Struct

from build_tasks.triton.parameter_checks import PARAMETERS

# The backends' parameter for the threads of an instance. Sources: README.md of onnxruntime_backend and pytorch_backend.
# That of PyTorch is one value for the whole server: the first model with this parameter that is loaded decides.
THREAD_PARAMETERS = {"onnx": "intra_op_thread_count", "torchscript": "INTRA_OP_THREAD_COUNT"}

# One process that decodes and resizes pictures is enough for so many cores. Measured on one core: 6 to 9 ms for each of
# the shipped photographs (512 x 512), 22 ms for efficientnet_lite0, the fastest network that needs one, so 8 of 30 ms.
CORES_PER_PREPROCESS = 4


class CoreShare(Struct, frozen=True):
    """How the instances of a Triton model share the cores of a CPU server."""

    instances: int
    threads: int  # of each instance


def share_cores(cores: int, model_format: str, release: str, fields: dict[str, Any]) -> CoreShare | None:
    """Return the instances and threads of a Triton model. None if its backend takes no number of threads.

    Then several instances would compute with all cores each, and be slower than one.

    Args:
        cores: Number of cores of the server.
        model_format: A key of platforms.FORMATS.
        release: The server's release.
        fields: The fields of ModelConfig that the spec sets for this Triton model, with False for a field that only
            loses its default.
    """
    parameter = THREAD_PARAMETERS.get(model_format)
    if parameter is None or without_threads(cores, model_format, release):
        return None
    groups, parameters = fields.get("instance_group"), fields.get("parameters") or {}
    if groups is False or fields.get("parameters") is False:
        return None
    own = parameters.get(parameter)
    threads = int(own["string_value"] if isinstance(own, dict) else own) if own is not None else None
    if groups:
        count = sum(group.get("count", 1) for group in groups if not group.get("passive"))
        return CoreShare(count, threads if threads is not None else max(cores // max(count, 1), 1))
    if threads is None:
        return CoreShare(cores, 1)
    return CoreShare(max(cores // threads, 1) if threads else 1, threads)  # 0 threads: ONNX Runtime takes all cores


def without_threads(cores: int | None, model_format: str, release: str) -> str | None:
    """Return why nothing follows from the cores for a backend that takes a number of threads in newer releases only."""
    parameter = THREAD_PARAMETERS.get(model_format)
    if not cores or parameter is None or release >= (since := PARAMETERS[model_format][parameter].since):
        return None
    return f"triton.cores has no effect, since Triton {release} does not read {parameter} ({since} and newer do)"


def thread_parameters(cores: int | None, model_format: str, release: str, fields: dict[str, Any]) -> dict[str, str]:
    """Return the parameter that limits the threads of each instance; empty if nothing follows from the cores."""
    share = share_cores(cores, model_format, release, fields) if cores else None
    return {THREAD_PARAMETERS[model_format]: str(share.threads)} if share else {}
