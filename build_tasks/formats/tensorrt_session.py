"""Runs plans: a function from a batch to its outputs, with the optimization profile that Triton uses.

Import this module only in the process of a stage, as tensorrt.py.
"""

from typing import TYPE_CHECKING

from polygraphy.exception import PolygraphyException

from build_tasks.errors import UserError, first_lines
from build_tasks.formats.tensorrt import library_name, tensor_signature, trt
from build_tasks.tensors import Feed, ProfileShapes, Signature
from build_tasks.triton.optimization_profiles import nearest_profile

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np


def engine_session(path: str, signature: Signature) -> "Callable[..., list[np.ndarray]]":
    """Load a plan on this machine's GPU and return the function from a batch to its outputs.

    The function has a second argument `profile`, the index of an optimization profile. Without it, the batch uses the
    profile that Triton uses for it.

    Raises:
        UserError: If the plan cannot be loaded, or has other tensors than its signature.
    """
    from polygraphy.backend.trt import EngineFromPath, TrtRunner

    try:
        engine: trt.ICudaEngine = EngineFromPath(path)()
        runner = TrtRunner(engine)
        runner.activate()  # until the process of the stage ends
    except (PolygraphyException, RuntimeError) as error:  # RuntimeError if there is no CUDA
        raise UserError(
            f"{library_name()} cannot run {path}, which TensorRT {signature['TensorRT']} built for "
            f"{signature['GPU']}: {first_lines(error)}"
        ) from error
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    expected = {tensor["name"]: tensor for tensor in (*signature["inputs"], *signature["outputs"])}
    found = {
        name: tensor_signature(name, engine.get_tensor_dtype(name), engine.get_tensor_shape(name)) for name in names
    }
    if found != expected:
        raise UserError(f"{path} has other tensors than its signature: {found}, not {expected}")
    dtypes = {tensor["name"]: tensor["dtype"] for tensor in signature["inputs"]}
    outputs = [tensor["name"] for tensor in signature["outputs"]]
    profiles = signature.get("profiles", [])

    def run(feed: Feed, profile: int | None = None) -> "list[np.ndarray]":
        if len(profiles) > 1:
            runner.set_profile(chosen_profile(profiles, feed) if profile is None else profile)
        results = runner.infer({name: feed[name].astype(dtype) for name, dtype in dtypes.items()})
        return [results[name].copy() for name in outputs]  # the next call writes to the same buffers

    return run


def chosen_profile(profiles: list[dict[str, ProfileShapes]], feed: Feed) -> int:
    """Return the index of the optimization profile that Triton uses for a feed.

    Raises:
        UserError: If no profile takes it.
    """
    shapes = {name: array.shape for name, array in feed.items()}
    index = nearest_profile(profiles, shapes)
    if index is None:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise UserError(f"no optimization profile of the engine takes {found} (engine.profiles)")
    return index
