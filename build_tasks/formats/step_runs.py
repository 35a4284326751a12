"""The steps of an ensemble as functions by the names of their tensors, run without a server.

    feed ─► dims and texts as Triton has them ─► artifact, PyTorch network or Python model ─► likewise

Between steps, tensors have the dims of config.pbtxt, and texts are bytes, as Triton's Python backend has them.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from build_tasks.runtime.stage import Settings
from build_tasks.tensors import Feed, Signature, reshape_dims

if TYPE_CHECKING:
    import numpy as np

Run = Callable[[Feed], Feed]


def artifact_run(path: str, kind: str, signature: Signature, config: Any) -> Run:
    """Return the artifact of a network as a function.

    Args:
        path: The artifact.
        kind: Its format.
        signature: Its signature.
        config: Its ModelConfig, as a message.
    Raises:
        UserError: If this machine cannot run it.
    """
    inputs, outputs = _names(signature)
    if kind == "onnx":
        import onnxruntime

        from build_tasks.formats.onnx_runtime import onnx_file

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # sums in another order would differ in their last bits
        session = onnxruntime.InferenceSession(onnx_file(path), options, providers=["CPUExecutionProvider"])
        return _as_triton_calls(lambda feed: dict(zip(outputs, session.run(outputs, feed), strict=True)), config)
    if kind == "torchscript":
        import torch

        return _as_triton_calls(functools.partial(_run_module, torch.jit.load(path), inputs, outputs), config)
    if kind == "aoti":
        from build_tasks.formats.serving_device import package_session

        run = package_session(path, signature, inputs).run
    else:
        from build_tasks.formats.tensorrt_session import engine_session

        run = engine_session(path, signature)
    return _as_triton_calls(lambda feed: dict(zip(outputs, run(feed), strict=True)), config)


def reference_run(network: Settings, weights: str, signature: Signature, config: Any) -> Run:
    """Return the network of a step in PyTorch as such a function; for an ONNX file, the file itself.

    Args:
        network: The settings of the network, with its interface.
        weights: The artifact with the weights.
        signature: The signature of the artifact that is served.
        config: Its ModelConfig, as a message.
    """
    from build_tasks.formats import pytorch_network
    from build_tasks.formats.serving_interface import wrap_for_serving

    module = wrap_for_serving(pytorch_network.create_network(network, weights), network["interface"])
    return _as_triton_calls(functools.partial(_run_module, module, *_names(signature)), config)


def perturb_inputs(network: Run) -> Run:
    """Return a network whose floating-point inputs are perturbed by one ulp."""
    from build_tasks.verification.tolerance import perturb_one_ulp

    return lambda feed: network(
        {name: perturb_one_ulp(array) if array.dtype.kind == "f" else array for name, array in feed.items()}
    )


def as_clients_send(array: "np.ndarray", tensor: Any) -> "np.ndarray":
    """Return a batch of an input as clients send it: in the dims of config.pbtxt, and with texts as bytes.

    Args:
        array: As the network takes it.
        tensor: The input in the ModelConfig of the network.
    """
    return reshape_dims(encode_texts(array), network_dims(tensor), list(tensor.dims))


def network_dims(tensor: Any) -> list[int]:
    """Return the dims of a tensor of a ModelConfig in the network, into which Triton reshapes those of clients."""
    return list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)


def encode_texts(array: "np.ndarray") -> "np.ndarray":
    """Return an array whose texts are bytes, as clients send them and Triton's Python backend has them."""
    import numpy as np

    if array.dtype.kind not in "OSU":
        return array
    encoded = np.empty(array.shape, object)
    for index, text in np.ndenumerate(array):
        encoded[index] = text.encode() if isinstance(text, str) else bytes(text)
    return encoded


def _as_triton_calls(run: Run, config: Any) -> Run:
    """Return a network that takes and gives tensors in the dims of its config.pbtxt, which Triton reshapes."""
    tensors = {tensor.name: tensor for tensor in (*config.input, *config.output)}

    def called(feed: Feed) -> Feed:
        taken = {
            name: reshape_dims(_decode_texts(array), list(tensors[name].dims), network_dims(tensors[name]))
            for name, array in feed.items()
        }
        return {name: as_clients_send(array, tensors[name]) for name, array in run(taken).items()}

    return called


def _decode_texts(array: "np.ndarray") -> "np.ndarray":
    """Return an array of bytes as texts, which ONNX Runtime takes."""
    import numpy as np

    if array.dtype != object:
        return array
    decoded = np.empty(array.shape, object)
    for index, text in np.ndenumerate(array):
        decoded[index] = text.decode() if isinstance(text, bytes) else text
    return decoded


def _names(signature: Signature) -> tuple[list[str], list[str]]:
    inputs, outputs = ([tensor["name"] for tensor in signature[kind]] for kind in ("inputs", "outputs"))
    return inputs, outputs


def _run_module(module: Any, inputs: list[str], outputs: list[str], feed: Feed) -> Feed:
    import torch

    arrays = [feed[name] for name in inputs]
    with torch.inference_mode():
        answer = module(*(array if array.dtype == object else torch.from_numpy(array) for array in arrays))
    tensors = [answer] if isinstance(answer, torch.Tensor) else answer
    return {name: tensor.numpy() for name, tensor in zip(outputs, tensors, strict=True)}
