"""Python models of Triton's, run without a server: as much of `triton_python_backend_utils` as they use in `execute`.

Source of the interface: the Python backend's README and src/resources/triton_python_backend_utils.py, release 24.10.
"""

import json
import logging
import os
import sys
import types
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, first_lines
from build_tasks.formats.user_code import import_sources_only, user_error

if TYPE_CHECKING:
    import numpy as np

UTILITIES = "triton_python_backend_utils"

# NumPy's name of each of Triton's types.
NUMPY_TYPES = {
    "TYPE_BOOL": "bool", "TYPE_STRING": "object", "TYPE_FP16": "float16", "TYPE_FP32": "float32",
    "TYPE_FP64": "float64", **{f"TYPE_{k}{b}": f"{k.lower()}{b}" for k in ("INT", "UINT") for b in (8, 16, 32, 64)},
}  # fmt: skip


class TritonError(Exception):
    """The reason why a Python model refuses a request."""

    def message(self) -> str:
        return str(self)


class Tensor:
    """A named array."""

    def __init__(self, name: str, array: "np.ndarray"):
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> "np.ndarray":
        return self._array


class InferenceResponse:
    """The answer to a request: its outputs, or an error."""

    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None):
        self._tensors, self._error = output_tensors or [], error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class InferenceRequest:
    """A request with its inputs."""

    def __init__(self, inputs: list[Tensor], requested_output_names: list[str]):
        self._inputs, self._names = inputs, requested_output_names

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def requested_output_names(self) -> list[str]:
        return self._names

    def correlation_id(self) -> int:
        return 0

    def request_id(self) -> str:
        return ""


class PythonModel:
    """A Python model as a function from the inputs of a request to its outputs, by name.

    Args:
        folder: The folder with model.py, in build/.
        config: Its ModelConfig, as a message.
        path: What to call it in messages.

    Raises:
        UserError: If it raises an error, or has no such class.
    """

    def __init__(self, folder: str, config: Any, path: str):
        from google.protobuf import json_format

        self.path, self.outputs = path, [tensor.name for tensor in config.output]
        fields = json_format.MessageToDict(config, preserving_proto_field_name=True)
        repository, version = os.path.split(folder)
        sys.modules[UTILITIES] = utilities()
        module = types.ModuleType("model")
        module.__file__ = f"{folder}/model.py"
        before = {*sys.modules}
        import_sources_only(os.path.abspath(folder))  # bytecode in the folder would change an input of the stage
        sys.path.insert(0, os.path.abspath(folder))
        try:
            with open(module.__file__, "rb") as source:
                exec(compile(source.read(), module.__file__, "exec"), module.__dict__)
            self.model = module.TritonPythonModel()
            if hasattr(self.model, "initialize"):
                self.model.initialize(
                    {
                        "model_config": json.dumps(fields),
                        "model_name": config.name,
                        "model_repository": repository,
                        "model_version": version,
                        "model_instance_kind": "CPU",
                        "model_instance_name": config.name,
                        "model_instance_device_id": "0",
                    }
                )
        except Exception as error:
            raise user_error(path, error) from error
        finally:
            sys.path.remove(os.path.abspath(folder))
            for name in {*sys.modules} - before:  # another step may have files of the same names
                if (getattr(sys.modules[name], "__file__", None) or "").startswith(os.path.abspath(folder)):
                    del sys.modules[name]

    def __call__(self, inputs: "dict[str, np.ndarray]") -> "dict[str, np.ndarray]":
        request = InferenceRequest([Tensor(name, array) for name, array in inputs.items()], self.outputs)
        try:
            (response,) = self.model.execute([request])
        except Exception as error:
            raise user_error(self.path, error) from error
        if response.has_error():
            raise UserError(f"{self.path}: {first_lines(response.error())}")
        answers = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        if missing := [name for name in self.outputs if name not in answers]:
            raise UserError(f"{self.path}: expected an answer with {', '.join(missing)}, found {', '.join(answers)}")
        return answers


def utilities() -> types.ModuleType:
    """Return the module that Python models import."""
    module: Any = types.ModuleType(UTILITIES)
    module.Tensor, module.InferenceRequest, module.InferenceResponse = Tensor, InferenceRequest, InferenceResponse
    module.TritonError = module.TritonModelException = TritonError
    module.Logger = types.SimpleNamespace(
        log_info=logging.info, log_warn=logging.warning, log_error=logging.error, log_verbose=logging.debug,
        log=logging.info,
    )  # fmt: skip
    module.get_input_tensor_by_name = lambda request, name: _named(request.inputs(), name)
    module.get_output_tensor_by_name = lambda response, name: _named(response.output_tensors(), name)
    module.get_input_config_by_name = lambda config, name: _entry(config, "input", name)
    module.get_output_config_by_name = lambda config, name: _entry(config, "output", name)
    module.triton_string_to_numpy = _numpy_type
    named: types.ModuleType = module
    return named


def _named(tensors: list[Tensor], name: str) -> Tensor | None:
    return next((tensor for tensor in tensors if tensor.name() == name), None)


def _entry(config: dict[str, Any], kind: str, name: str) -> dict[str, Any] | None:
    return next((entry for entry in config.get(kind, ()) if entry["name"] == name), None)


def _numpy_type(name: str) -> Any:
    import numpy as np

    return np.dtype(NUMPY_TYPES[name]).type
