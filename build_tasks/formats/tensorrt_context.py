"""Execution contexts of a plan, or of an engine of TensorRT-RTX, timed by CUDA's events.

Imported where an engine is loaded, after `polygraphy.config.USE_TENSORRT_RTX` says which library it is of. PyTorch is
not needed, as where engines are built: streams, memory and CUDA's runtime are Polygraphy's.
"""

import ctypes
from typing import TYPE_CHECKING

from polygraphy import cuda
from polygraphy.backend.trt import EngineFromPath
from polygraphy.datatype import DataType
from polygraphy.exception import PolygraphyException

from build_tasks.errors import UserError, first_lines
from build_tasks.formats.tensorrt import library_name, trt
from build_tasks.tensors import INPUT

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np


class ExecutionContext:
    """One instance of an engine, on a stream of its own. UserError where it cannot be loaded here.

    Each has the engine to itself: two contexts of one may not share an optimisation profile in every TensorRT.
    """

    def __init__(self, path: str):
        try:
            self.engine: trt.ICudaEngine = EngineFromPath(path)()
            self.stream = cuda.Stream()
        except (PolygraphyException, RuntimeError) as error:  # the second where there is no CUDA
            raise UserError(f"{library_name()} cannot load {path} here: {first_lines(error)}") from error
        self.context = self.engine.create_execution_context()
        self.before, self.after = (ctypes.c_void_p() for _ in range(2))
        for event in (self.before, self.after):
            self.call("cudaEventCreate", ctypes.byref(event))

    def call(self, function: str, *arguments: object) -> None:
        """A function of CUDA's runtime."""
        cuda.wrapper().check(getattr(cuda.wrapper().handle, function)(*arguments))

    def prepare_request(self, batch: "np.ndarray") -> "Callable[[], float]":
        """Requests of a batch that lies on the GPU already; each returns the seconds that the GPU took."""
        self.context.set_input_shape(INPUT, batch.shape)
        memory = []
        for index in range(self.engine.num_io_tensors):
            tensor = self.engine.get_tensor_name(index)
            dtype = DataType.from_dtype(self.engine.get_tensor_dtype(tensor))
            array = cuda.DeviceArray(tuple(self.context.get_tensor_shape(tensor)), dtype)
            if tensor == INPUT:
                array.copy_from(batch)
            self.context.set_tensor_address(tensor, array.ptr)
            memory.append(array)
        stream, milliseconds = ctypes.c_void_p(self.stream.ptr), ctypes.c_float()

        def request() -> float:
            self.call("cudaEventRecord", self.before, stream)
            if not self.context.execute_async_v3(self.stream.ptr):
                raise RuntimeError(f"{library_name()} could not run a batch of {len(batch)}")
            self.call("cudaEventRecord", self.after, stream)
            self.call("cudaEventSynchronize", self.after)
            self.call("cudaEventElapsedTime", ctypes.byref(milliseconds), self.before, self.after)
            return milliseconds.value / 1e3

        request.memory = memory  # type: ignore[attr-defined]  # which the context only refers to
        return request
