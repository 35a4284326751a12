"""The network that a spec describes, and how it is run.

architecture, weights ─► create_network ─► wrap_for_serving ─► forward
"""

from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError
from build_tasks.formats.onnx_files import fixed_batch
from build_tasks.formats.onnx_runtime import ONNX_MODULES, onnx_session
from build_tasks.formats.picture_transform import TRANSFORM_MODULES, data_config, set_channels
from build_tasks.formats.user_code import fp32_network, python_files, user_function
from build_tasks.paths import MODELS
from build_tasks.runtime.stage import Settings
from build_tasks.spec.model import Model, table_settings
from build_tasks.tensors import layout_dims

if TYPE_CHECKING:
    import torch

# The keys of [input] that normalize bytes. The shape gives the number of channels.
NORMALIZATION_KEYS = ("shape", "mean", "std", "scale")

# The modules of the project that make and run a network, for the fingerprint of the stages that use one.
NETWORK_MODULES = (
    "build_tasks.formats.pytorch_network",
    "build_tasks.formats.user_code",
    *TRANSFORM_MODULES,
    "build_tasks.tensors",
)

PROGRAM_MODULES = ("build_tasks.formats.torch_program", "build_tasks.formats.file_kinds")  # and for files of PyTorch


def settings_of(model: Model) -> Settings:
    """Return the settings of the network, for the fingerprint of every stage that creates it."""
    return {"model": model.name, "architecture": table_settings(model.spec.architecture)}


def input_settings_of(model: Model) -> Settings:
    """Return the settings of the preprocessing, without those of the network."""
    return {
        key: value for key, value in table_settings(model.spec.input).items() if key not in ("min_size", "max_size")
    }


def interface_of(model: Model) -> Settings:
    """Return the settings of the inputs and outputs of artifacts, for the fingerprint of the stages that build them."""
    spec = model.spec
    normalizes = spec.input.format != "fp32_nchw"
    return {
        "format": spec.input.format,
        **table_settings(spec.output),
        **({key: getattr(spec.input, key) for key in NORMALIZATION_KEYS} if normalizes else {}),
    }


def shapes_to_check(shape: tuple[int, int, int], sizes: list[list[int]] | None) -> list[tuple[int, int, int]]:
    """Return the (channels, height, width) that a network must take: its own, and the smallest and largest if open.

    Args:
        shape: Its own.
        sizes: [[height, width], [height, width]], the smallest and the largest. None if height and width are fixed.
    """
    return [shape, *((shape[0], height, width) for height, width in sizes or ())]


def spatial_axes(input_format: str) -> tuple[int, int]:
    """Return which axes of an input are its height and its width."""
    return (1, 2) if input_format == "uint8_nhwc" else (2, 3)


def size_dependent_axes(
    module: Any, shape: tuple[int, int, int], sizes: list[list[int]] | None, input_format: str
) -> list[list[int]]:
    """Return, for each output, the axes besides the batch whose length depends on the size of the input.

    The network runs once at each of `shapes_to_check`.
    """
    runs = [forward(module, example_input(other, 1, input_format)) for other in shapes_to_check(shape, sizes)]
    return [
        [axis for axis in range(1, outputs[0].ndim) if len({output.shape[axis] for output in outputs}) > 1]
        for outputs in zip(*runs, strict=True)
    ]


def source_modules(model: Model) -> tuple[str, ...]:
    """Return the project's modules that make the network, for the fingerprint of every stage that uses it."""
    return (
        *NETWORK_MODULES,
        *(ONNX_MODULES if model.spec.from_onnx else ()),
        *(PROGRAM_MODULES if model.spec.program_suffix else ()),
    )


def user_source_files(model: Model) -> tuple[str, ...]:
    """Return the user's files that make the network: the Python files of the model except for a converter."""
    network = model.spec.architecture.network
    if network is None:
        return ()
    converter = model.source((model.spec.weights.converter or "").partition(":")[0])
    return tuple(sorted({*python_files(model)} - {converter} | {model.source(network.partition(":")[0])}))


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
        return load_program(weights) if weights and not weights.endswith(".onnx") else onnx_module(weights)
    try:
        if architecture["timm"] is not None:
            module = timm.create_model(architecture["timm"], exportable=exportable, **architecture["arguments"])
            if channels := architecture["arguments"].get("in_chans"):
                set_channels(module, channels)
        else:
            build = user_function(settings["model"], architecture["network"])
            module = fp32_network(build(**architecture["arguments"]), settings["model"], architecture["network"])
    except (RuntimeError, TypeError) as error:  # an unknown model, an unknown argument
        raise UserError(f"{MODELS}/{settings['model']}/model.toml: architecture: {error}") from error
    if weights is not None:
        module.load_state_dict(load_file(weights))
    return module.eval().requires_grad_(False)


def onnx_module(path: str | None) -> "torch.nn.Module":
    """Return an ONNX file as a network, which ONNX Runtime runs on the CPU in fp32. Without a file it cannot run.

    If the batch of the graph is fixed, batches of any size are cut to it, and the last one is filled with repeats.
    """
    import numpy as np
    import torch

    class OnnxModule(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.run = onnx_session(path) if path else None
            self.batch = fixed_batch(path) if path else None

        def forward(self, batch: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
            assert self.run is not None
            parts = []
            for part in batch.split(self.batch or len(batch)):
                filled = np.resize(part.numpy(), (self.batch or len(part), *part.shape[1:]))
                outputs = [torch.from_numpy(output) for output in self.run(filled)]
                for output in outputs:
                    if output.ndim == 0 or output.shape[0] != len(filled):
                        raise UserError(
                            f"an output has shape {list(output.shape)} for a batch of {len(filled)}; "
                            "the batch must be its first dimension"
                        )
                parts.append([output[: len(part)] for output in outputs])
            return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))

    return OnnxModule().eval()


def wrap_for_serving(module: "torch.nn.Module", interface: Settings) -> "torch.nn.Module":
    """Add the interface of the spec to a network, as hooks, so that its layers keep their names in every format.

    A uint8 input (batch, height, width, channels) is normalized. A float32 input (batch, channels, height, width) still
    passes unchanged. The output becomes probabilities, or the largest values and their classes. A list of outputs
    becomes a tuple, because Triton's PyTorch backend takes no list.

    Args:
        module: The network.
        interface: What `interface_of` returns.
    Raises:
        UserError: When it runs, if its output is not one tensor (batch, classes) although the interface needs one.
    """
    if interface["format"] == "uint8_nhwc":
        module.register_forward_pre_hook(lambda _, inputs: (normalize_input(module, inputs[0], interface),))
    module.register_forward_hook(lambda _, inputs, output: tuple(output) if isinstance(output, list) else output)
    if interface["softmax"] or interface["top_k"]:
        module.register_forward_hook(lambda _, inputs, output: top_k_outputs(output, interface))
    return module


def normalize_input(module: "torch.nn.Module", batch: "torch.Tensor", interface: Settings) -> "torch.Tensor":
    """Return uint8 (batch, height, width, channels) as normalized float32 (batch, channels, height, width).

    A float32 batch is already normalized and comes back unchanged. The mean is subtracted before the division, because
    in fp16 this difference is exact except for the rounding of the mean.
    """
    import torch

    if batch.dtype != torch.uint8:
        return batch
    config = data_config(module, {key: interface.get(key) for key in NORMALIZATION_KEYS})
    factor: float = 255 / config.get("scale", 1)
    mean, std = (torch.tensor(config[key], dtype=torch.float64).reshape(-1, 1, 1) * factor for key in ("mean", "std"))
    # The cast comes first: it is the only operator of TensorRT that takes bytes.
    return (batch.float().permute(0, 3, 1, 2) - mean.float()) * (1 / std).float()


def top_k_outputs(output: Any, interface: Settings) -> Any:
    """Return the output as probabilities, or as its `top_k` largest values and their classes.

    Raises:
        UserError: If the output is not one tensor (batch, classes), or has fewer classes.
    """
    import torch

    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        found = f"shape {list(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise UserError(f"output: softmax and top_k need one output of (batch, classes), and the network's is {found}")
    output = output.softmax(dim=1) if interface["softmax"] else output
    if interface["top_k"] is None:
        return output
    if interface["top_k"] > output.shape[1]:
        raise UserError(f"output.top_k: {interface['top_k']} of {output.shape[1]} classes")
    return tuple(output.topk(interface["top_k"], dim=1))


def input_shape(module: "torch.nn.Module", override: list[int] | None) -> tuple[int, int, int]:
    """Return (channels, height, width) of one input."""
    channels, height, width = override or data_config(module, {})["input_size"]
    return channels, height, width


def forward(module: Any, batch: "torch.Tensor") -> "list[torch.Tensor]":
    """Run the network and return its outputs in their order.

    Raises:
        UserError: If they are not tensors whose first dimension is the batch, or if one of them is bfloat16.
    """
    import torch

    with torch.inference_mode():
        outputs = module(batch)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    if not isinstance(outputs, tuple | list) or not all(isinstance(output, torch.Tensor) for output in outputs):
        names = [type(output).__name__ for output in outputs] if isinstance(outputs, tuple | list) else ()
        found = type(outputs).__name__ + (f" of {', '.join(names)}" if names else "")
        raise UserError(f"the network answers with {found}; Triton needs one tensor, or a tuple of them")
    for index, output in enumerate(outputs):
        if output.dtype == torch.bfloat16:
            raise UserError(f"output {index} is bfloat16, which Triton's clients and NumPy do not have; cast it")
        if output.ndim == 0 or output.shape[0] != len(batch):
            raise UserError(
                f"output {index} has shape {list(output.shape)} for a batch of {len(batch)}; "
                "the batch must be its first dimension"
            )
    return list(outputs)


def example_input(
    shape: tuple[int, int, int], batch: int, input_format: str = "fp32_nchw", seed: int = 0
) -> "torch.Tensor":
    """Return a reproducible input: standard normal values, or bytes in the layout uint8_nhwc.

    Args:
        shape: (channels, height, width) of one input.
        batch: The number of inputs.
        input_format: "fp32_nchw" or "uint8_nhwc".
        seed: Seed of the random generator.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    if input_format == "uint8_nhwc":
        return torch.randint(0, 256, (batch, *layout_dims(shape, input_format)), generator=generator, dtype=torch.uint8)
    return torch.randn(batch, *shape, generator=generator)
