"""Requests to a running server, over HTTP and gRPC, by Triton's own client."""

from typing import TYPE_CHECKING, Any, NamedTuple

from build_tasks.errors import UserError, first_lines

if TYPE_CHECKING:
    import numpy as np

PROTOCOLS = ("HTTP", "gRPC")


class Tensors(NamedTuple):
    """What a model takes and gives, as the server says: names and Triton's types."""

    input: str
    type: str
    outputs: list[str]


class Client:
    """A server, by one of the protocols. Every method has UserError for what the server refuses, or does not answer."""

    def __init__(self, protocol: str, url: str):
        import tritonclient.grpc
        import tritonclient.http

        self.protocol, self.url = protocol, url
        self.library: Any = tritonclient.http if protocol == "HTTP" else tritonclient.grpc
        more = {"network_timeout": 600.0, "connection_timeout": 10.0} if protocol == "HTTP" else {}
        self.client: Any = self.library.InferenceServerClient(url, **more)
        self.as_json = {} if protocol == "HTTP" else {"as_json": True}

    def ready(self, model: str) -> bool:
        return bool(self._call("is_model_ready", model))

    def release(self) -> str:
        """The server's version, "2.51.0"."""
        return str(self._call("get_server_metadata", **self.as_json)["version"])

    def tensors(self, model: str) -> Tensors:
        said = self._call("get_model_metadata", model, **self.as_json)
        (tensor,) = said["inputs"]
        return Tensors(tensor["name"], tensor["datatype"], [output["name"] for output in said["outputs"]])

    def config(self, model: str) -> dict[str, Any]:
        """The ModelConfig that the server has of a model, as JSON."""
        said: dict[str, Any] = self._call("get_model_config", model, **self.as_json)
        return dict(said.get("config", said))

    def infer(self, model: str, tensors: Tensors, batch: "np.ndarray") -> "tuple[str, list[np.ndarray]]":
        """The version that answers, and its outputs."""
        tensor = self.library.InferInput(tensors.input, list(batch.shape), tensors.type)
        tensor.set_data_from_numpy(batch)
        answer = self._call("infer", model, [tensor])
        said = answer.get_response()
        version = said["model_version"] if isinstance(said, dict) else said.model_version
        return version, [answer.as_numpy(name) for name in tensors.outputs]

    def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        from tritonclient.utils import InferenceServerException

        try:
            return getattr(self.client, method)(*arguments, **named)
        except InferenceServerException as error:
            raise UserError(f"{self.protocol}: {error.message() or first_lines(error)}") from error
        except OSError as error:
            raise UserError(
                f"nothing answers {self.protocol} at {self.url} ({error}); `doit serve` starts a server"
            ) from error
