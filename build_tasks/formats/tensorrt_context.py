"""Execution contexts of a plan or of a TensorRT-RTX engine, timed by CUDA events.

Import this module only where an engine is loaded, after `polygraphy.config.USE_TENSORRT_RTX` says which library the
engine is for. PyTorch is not needed: streams, memory and the CUDA runtime come from Polygraphy.
"""

import ctypes
from typing import TYPE_CHECKING

from polygraphy import cuda
from polygraphy.backend.trt import EngineFromPath
from polygraphy.datatype import DataType
from polygraphy.exception import PolygraphyException

from build_tasks.errors import UserError, first_lines
from build_tasks.formats.tensorrt import library_name, trt
from build_tasks.formats.tensorrt_session import chosen_profile
from build_tasks.tensors import Feed, Signature, batch_of

if TYPE_CHECKING:
    from collections.abc import Callable


class ExecutionContext:
    """One instance of an engine, on a CUDA stream of its own.

    Each instance loads the engine again, because not every TensorRT lets two contexts of one engine use the same
    optimization profile.

    Raises:
        UserError: If the engine cannot be loaded on this machine.
    """

    def __init__(self, path: str, signature: Signature):
        self.profiles = signature.get("profiles", [])
        try:
            self.engine: trt.ICudaEngine = EngineFromPath(path)()
            self.stream = cuda.Stream()
        except (PolygraphyException, RuntimeError) as error:  # RuntimeError if there is no CUDA
            raise UserError(f"{library_name()} cannot load {path} on this machine: {first_lines(error)}") from error
        self.context = self.engine.create_execution_context()
        self.start_event, self.end_event = (ctypes.c_void_p() for _ in range(2))
        for event in (self.start_event, self.end_event):
            self.call("cudaEventCreate", ctypes.byref(event))

    def call(self, function: str, *arguments: object) -> None:
        """Call a function of the CUDA runtime, and raise an error if it fails."""
        cuda.wrapper().check(getattr(cuda.wrapper().handle, function)(*arguments))

    def prepare_request(self, feed: Feed) -> "Callable[[], float]":
        """Copy a batch to the GPU, and return the function that runs it and returns the seconds on the GPU."""
        if len(self.profiles) > 1:
            self.context.set_optimization_profile_async(chosen_profile(self.profiles, feed), self.stream.ptr)
        for name, array in feed.items():
            self.context.set_input_shape(name, array.shape)
        arrays = []
        for index in range(self.engine.num_io_tensors):
            tensor = self.engine.get_tensor_name(index)
            dtype = DataType.from_dtype(self.engine.get_tensor_dtype(tensor))
            array = cuda.DeviceArray(tuple(self.context.get_tensor_shape(tensor)), dtype)
            if tensor in feed:
                array.copy_from(feed[tensor])
            self.context.set_tensor_address(tensor, array.ptr)
            arrays.append(array)
        stream, milliseconds = ctypes.c_void_p(self.stream.ptr), ctypes.c_float()

        def request() -> float:
            self.call("cudaEventRecord", self.start_event, stream)
            if not self.context.execute_async_v3(self.stream.ptr):
                raise RuntimeError(f"{library_name()} could not run a batch of {batch_of(feed)}")
            self.call("cudaEventRecord", self.end_event, stream)
            self.call("cudaEventSynchronize", self.end_event)
            self.call("cudaEventElapsedTime", ctypes.byref(milliseconds), self.start_event, self.end_event)
            return milliseconds.value / 1e3

        request.arrays = arrays  # type: ignore[attr-defined]  # keeps the memory, which the context only refers to
        return request
