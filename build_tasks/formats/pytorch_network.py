"""The network that a spec describes.

architecture, weights ─► create_network ─► serving_interface.wrap_for_serving
"""

import copy
import inspect
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError
from build_tasks.formats.onnx_files import fixed_batch, tensor_names
from build_tasks.formats.onnx_runtime import onnx_session, perturbed_session
from build_tasks.formats.picture_transform import set_channels
from build_tasks.formats.user_code import network_of_function, user_function
from build_tasks.paths import MODELS
from build_tasks.runtime.stage import Settings
from build_tasks.tensors import misplaced_batch

if TYPE_CHECKING:
    import torch


def create_network(settings: Settings, weights: str | None = None, exportable: bool = False) -> "torch.nn.Module":
    """Return the network in inference mode.

    Args:
        settings: Those of `settings_of`. Without an architecture the weights are a file that contains the network.
        weights: A safetensors file. Without it the architecture initializes the weights.
        exportable: Whether timm uses variants of layers that old opsets can express.
    Raises:
        UserError: If the architecture does not exist, does not take the arguments, or is not in fp32.
    """
    import timm
    from safetensors.torch import load_file

    from build_tasks.formats.torch_program import load_program

    architecture = settings["architecture"]
    if architecture["timm"] is None and architecture["network"] is None:
        if weights and not weights.endswith(".onnx"):
            return load_program(weights)
        return onnx_module(weights, settings.get("batch"))
    if architecture["network"] is not None:
        build = user_function(settings["model"], architecture["network"])
        where = f"{MODELS}/{settings['model']}/{architecture['network']}"
        module: torch.nn.Module = network_of_function(build, where, architecture["arguments"])
    else:
        try:
            module = timm.create_model(architecture["timm"], exportable=exportable, **architecture["arguments"])
            if channels := architecture["arguments"].get("in_chans"):
                set_channels(module, channels)
        except Exception as error:  # an unknown model, or an argument that it does not take, which timm does not check
            reason = str(error) or type(error).__name__
            raise UserError(f"{MODELS}/{settings['model']}/model.toml: architecture: {reason}") from error
    if weights is not None:
        module.load_state_dict(load_file(weights))
    return module.eval().requires_grad_(False)


def half_precision(network: "torch.nn.Module") -> str | None:
    """Return "float16" or "bfloat16" if the weights of a network have that type, so that its answers have it too."""
    dtypes = {str(each.dtype).removeprefix("torch.") for each in network.parameters() if each.is_floating_point()}
    return None if "float32" in dtypes else next(iter(dtypes & {"float16", "bfloat16"}), None)


def takes_any_number(network: "torch.nn.Module") -> bool:
    """Return whether a network takes its inputs as *inputs, as those of files do."""
    kinds = [each.kind for each in inspect.signature(network.forward).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


def onnx_module(path: str | None, batch: int | None = None) -> "torch.nn.Module":
    """Return an ONNX file as a network, which ONNX Runtime runs on the CPU in fp32. Without a file it cannot run.

    If the batch of the graph is fixed, batches of any size are cut to it, and the last one is filled with repeats.

    Args:
        path: The file.
        batch: The batch that the spec fixes, if that of the graph is open.
    """
    import numpy as np
    import torch

    class OnnxModule(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.run = onnx_session(path) if path else None
            self.inputs, self.outputs = tensor_names(path) if path else ([], [])
            self.batch = (fixed_batch(path) or batch) if path else None

        def forward(self, *inputs: Any) -> "dict[str, torch.Tensor]":
            assert self.run is not None
            parts = []
            size = self.batch or len(inputs[0])
            for start in range(0, len(inputs[0]), size):
                part = [np.asarray(each[start : start + size]) for each in inputs]
                filled = [np.resize(each, (size, *each.shape[1:])) for each in part]
                answer = dict(zip(self.outputs, self.run(dict(zip(self.inputs, filled, strict=True))), strict=True))
                if texts := [name for name, output in answer.items() if output.dtype.kind not in "fiub"]:
                    kind = {"object": "strings"}.get(name := str(answer[texts[0]].dtype), f"{name} values")
                    others = "name the others in [[outputs]]" if len(answer) > 1 else "the file has no other output"
                    raise UserError(f"the output {texts[0]} holds {kind}, which cannot be compared: {others}")
                outputs = [torch.from_numpy(output) for output in answer.values()]
                for name, output in zip(self.outputs, outputs, strict=True):
                    if output.ndim == 0 or output.shape[0] != size:
                        advice = "; to leave it out, name the others in [[outputs]]" if len(outputs) > 1 else ""
                        raise UserError(misplaced_batch(f"the output {name}", output.shape, size) + advice)
                parts.append([output[: len(part[0])] for output in outputs])
            answers = [torch.cat(outputs) for outputs in zip(*parts, strict=True)]
            return dict(zip(self.outputs, answers, strict=True))

        def perturbed(self, seed: int) -> torch.nn.Module:
            """Return the network with every fp32 weight replaced by the next larger or smaller value."""
            assert path is not None
            duplicate = copy.copy(self)
            duplicate.run = perturbed_session(path, seed)
            return duplicate

    return OnnxModule().eval()
