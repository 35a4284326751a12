"""Requests to a running Triton server over HTTP and gRPC, by Triton's own client library."""

import contextlib
import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from build_tasks.errors import UserError, first_lines
from build_tasks.tensors import Feed, reshape_dims

if TYPE_CHECKING:
    import numpy as np

PROTOCOLS = ("HTTP", "gRPC")

CONNECTION_TIMEOUT = 10.0  # seconds, of HTTP
NETWORK_TIMEOUT = 600.0  # seconds until a request must be answered
PROBE_TIMEOUT = 10.0  # seconds until a server must say whether it is live

# The header that carries the key of a server's restricted protocols. Triton adds the prefix for gRPC.
KEY_NAME = "doit-key"
KEY_HEADERS = {"HTTP": KEY_NAME, "gRPC": f"triton-grpc-protocol-{KEY_NAME}"}


class Tensors(NamedTuple):
    """The tensors of a model.

    input_types: The types of its inputs as Triton calls them, "FP32", by name.
    output_names: The names of its outputs.
    reshapes: The tensors that clients see in other dims than the network, by name: the dims that an array has here, and
        those that it gets. -1 is an open dimension. Inputs get the dims of clients, and outputs those of the network.
    ranks: The number of dimensions of its inputs with the batch, by name.
    """

    input_types: dict[str, str]
    output_names: list[str]
    reshapes: Mapping[str, tuple[list[int], list[int]]] = MappingProxyType({})
    ranks: Mapping[str, int] = MappingProxyType({})


class Client:
    """A client of one server, over one protocol.

    Every method raises UserError if the server refuses the request, or does not answer.

    Args:
        protocol: One of PROTOCOLS.
        url: host:port of that protocol.
        timeout: Seconds for an answer.
        key: Key of the restricted protocols, which loading a model needs; empty for a server that restricts none.
    """

    def __init__(self, protocol: str, url: str, timeout: float = NETWORK_TIMEOUT, key: str = ""):
        self.protocol, self.url = protocol, url
        self.key_header = {KEY_HEADERS[protocol]: key} if key else None
        try:
            self.library: Any = importlib.import_module(f"tritonclient.{protocol.lower()}")
        except (ModuleNotFoundError, RuntimeError) as error:  # the second where the extra of tritonclient is missing
            package = f"tritonclient[{protocol.lower()}]"
            raise UserError(f"the package {package} is not installed here: pip install -r requirements.txt") from error
        is_http = protocol == "HTTP"
        timeouts = {"network_timeout": timeout, "connection_timeout": CONNECTION_TIMEOUT} if is_http else {}
        self.client: Any = self.library.InferenceServerClient(url, **timeouts)
        self.timeout = timeout
        self.call_options = {} if is_http else {"client_timeout": timeout}
        self.as_json = {} if is_http else {"as_json": True}

    def close(self) -> None:
        """Close the connections, in the thread that has used the client.

        Otherwise Python does that when it collects garbage. In another thread, gevent then fails over HTTP.
        """
        self.client.close()

    def _timeout_error(self) -> UserError:
        return UserError(
            f"{self.url} does not answer {self.protocol} within {self.timeout:g} s; is it Triton's port, and is the "
            "server overloaded?"
        )

    def live(self) -> bool:
        """Whether the server answers, and is live."""
        try:
            return bool(self._call("is_server_live"))
        except UserError:
            return False

    def ready(self, model: str) -> bool:
        """Whether a model is loaded and can answer."""
        return bool(self._call("is_model_ready", model))

    def load(self, model: str, config: str | None = None) -> str | None:
        """Load a model, or load it again. Returns the server's reason if it cannot, and None if it is loaded.

        Args:
            config: A ModelConfig as JSON, in place of the model's config.pbtxt.
        """
        from tritonclient.utils import InferenceServerException

        try:
            self._send("load_model", model, headers=self.key_header, config=config)
        except InferenceServerException as error:
            return str(error.message())
        return None

    def server_version(self) -> str:
        """The server's version, "2.51.0"."""
        return str(self._call("get_server_metadata", **self.as_json)["version"])

    def tensors(self, model: str) -> Tensors:
        """The tensors of a model that is loaded."""
        metadata = self._call("get_model_metadata", model, **self.as_json)
        types = {tensor["name"]: tensor["datatype"] for tensor in metadata["inputs"]}
        ranks = {tensor["name"]: len(tensor["shape"]) for tensor in metadata["inputs"]}
        config, reshapes = self.config(model), {}
        for kind in ("input", "output"):
            for tensor in config.get(kind, ()):
                if "reshape" in tensor:
                    dims = [[int(dim) for dim in each] for each in (tensor["dims"], tensor["reshape"].get("shape", ()))]
                    reshapes[tensor["name"]] = (dims[1], dims[0]) if kind == "input" else (dims[0], dims[1])
        return Tensors(types, [output["name"] for output in metadata["outputs"]], reshapes, ranks)

    def config(self, model: str) -> dict[str, Any]:
        """The ModelConfig that the server uses for a model, as JSON."""
        answer: dict[str, Any] = self._call("get_model_config", model, **self.as_json)
        return dict(answer.get("config", answer))

    def infer(self, model: str, tensors: Tensors, feed: Feed, sequence: int = 0) -> "tuple[str, list[np.ndarray]]":
        """The version of the model that answers a batch, given by the names of the inputs, and its outputs.

        Args:
            sequence: A correlation ID, for a model with sequence_batching; the batch is a sequence of one request.
        """
        flags = {"sequence_id": sequence, "sequence_start": True, "sequence_end": True} if sequence else {}
        inputs = []
        for name, array in feed.items():
            inputs.append(self.library.InferInput(name, list(array.shape), tensors.input_types[name]))
            inputs[-1].set_data_from_numpy(array)
        result = self._call("infer", model, inputs, **flags)
        response = result.get_response()
        version = response["model_version"] if isinstance(response, dict) else response.model_version
        outputs = {name: result.as_numpy(name) for name in tensors.output_names}
        return version, [reshape_dims(array, *tensors.reshapes.get(name, ((), ()))) for name, array in outputs.items()]

    def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of Triton's client. Every failure is a UserError."""
        from tritonclient.utils import InferenceServerException

        try:
            return self._send(method, *arguments, **named)
        except InferenceServerException as error:
            if "DEADLINE_EXCEEDED" in str(error.status()):
                raise self._timeout_error() from error
            raise UserError(f"{self.protocol}: {error.message() or first_lines(error)}") from error

    def _send(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of Triton's client.

        Raises:
            UserError: If nothing answers.
            InferenceServerException: If the server refuses the request.
        """
        from http.client import HTTPException

        try:
            return getattr(self.client, method)(*arguments, **named, **self.call_options)
        except TimeoutError as error:
            raise self._timeout_error() from error
        except (OSError, HTTPException) as error:  # HTTPException: the server ended while it answered
            raise UserError(
                f"nothing answers {self.protocol} at {self.url} ({error}); `doit serve` starts a server"
            ) from error


def cast_to_input_types(feed: Feed, tensors: Tensors) -> Feed:
    """A batch in the types of the model's inputs, such as "FP16".

    One value per sample becomes (batch, 1), since Triton needs a dimension besides its batch. A feed of one array is
    for the only input.
    """
    from tritonclient.utils import triton_to_np_dtype

    if len(feed) == len(tensors.input_types) == 1:
        feed = dict(zip(tensors.input_types, feed.values(), strict=True))
    arrays = {}
    for name, triton_type in tensors.input_types.items():
        array = reshape_dims(feed[name], *tensors.reshapes.get(name, ((), ())))
        array = array[:, None] if array.ndim == 1 < tensors.ranks.get(name, 2) else array
        arrays[name] = array.astype(object if triton_type == "BYTES" else triton_to_np_dtype(triton_type))
    return arrays


def require_server(protocol: str, url: str) -> None:
    """Raise UserError if no server answers, before anything is sent that may take long.

    A program that accepts connections and never answers is found within PROBE_TIMEOUT.
    """
    with contextlib.closing(Client(protocol, url, timeout=PROBE_TIMEOUT)) as client:
        client.server_version()
