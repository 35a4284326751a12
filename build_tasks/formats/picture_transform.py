"""How the pictures of a sample become the input of a network: timm's data config, and its transform for evaluation.

    [input], timm's config of the network ─► data_config ─► preprocessing.json
                                                 └─► transform: PIL images of a sample ─► the input, as clients send it

triton/preprocess_model/preprocessing.py does the same without PyTorch, to the bit.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError
from build_tasks.runtime.stage import Settings
from build_tasks.spec.picture_keys import CHANNELS
from build_tasks.spec.pictures import FILL, colors_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Transform = Callable[[Sequence["Image"]], "torch.Tensor"]  # from the pictures of one sample to the input


def data_config(module: "torch.nn.Module", overrides: Settings) -> dict[str, Any]:
    """Return timm's data config of the network with the overrides of the spec.

    It has the keys input_size, mean, std, interpolation, crop_pct and crop_mode; and color, files,
    scale and fill if timm's transform alone would do something else. If the mean and std of the network belong to
    another number of channels, each channel has their average.

    Raises:
        UserError: If mean, std or color do not fit the number of channels.
    """
    import statistics

    from timm.data import resolve_data_config

    timm_keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    options = {key: overrides[key] for key in timm_keys if overrides.get(key) is not None}
    if overrides.get("shape") is not None:
        options["input_size"] = tuple(overrides["shape"])
    config: dict[str, Any] = {**resolve_data_config(model=module), **options}
    channels = config["input_size"][0]
    scale, color, files = overrides.get("scale") or 1, overrides.get("color"), overrides.get("files")
    for key, default in (("mean", 0.0), ("std", 1.0)):
        if key not in options and scale != 1:
            config[key] = (default,) * channels
        elif key not in options and len(config[key]) not in (1, channels):
            config[key] = (round(statistics.fmean(config[key]), 6),) * channels
        if len(config[key]) not in (1, channels):
            raise UserError(f"input.{key}: expected {channels} values, one for each channel, found {config[key]}")
    colors = colors_of(color, files, channels)
    if (color or files) and not colors:
        raise UserError(f"input.color: expected {channels} channels, as the network takes, found {color or files}")
    if colors != ["rgb"]:
        config["color"] = colors  # an empty list: no picture has this number of channels
    if files:
        config["files"] = files
    if scale != 1:
        config["scale"] = scale
    if config["crop_mode"] == "letterbox":
        fill = overrides.get("fill")
        config |= {"crop_pct": 1.0, "fill": FILL if fill is None else fill}
    return config


def set_channels(network: Any, channels: int) -> None:
    """Set the number of channels in timm's config of a network, which has those of the pretrained weights."""
    _, *size = network.pretrained_cfg.get("input_size") or (3, 224, 224)
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (channels, *size)}


def transform(config: dict[str, Any], input_format: str) -> Transform:
    """Return the preprocessing with a data config: from the PIL images of one sample to the input of clients.

    Their colors are those of the config, so that the channels are already in the order of the network. The result has
    no batch.
    """
    import torch

    steps = timm_transforms(config, input_format)

    def prepare(images: "Sequence[Image]") -> "torch.Tensor":
        channels = torch.cat([step(image) for step, image in zip(steps, images, strict=True)])
        return channels.permute(1, 2, 0) if input_format == "uint8_nhwc" else channels

    return prepare


def format_steps(config: dict[str, Any], input_format: str) -> list[str]:
    """Return the lines that describe the transform of each picture of a sample."""
    return [line for transform in timm_transforms(config, input_format) for line in str(transform).splitlines()]


def timm_transforms(config: dict[str, Any], input_format: str) -> list[Any]:
    """Return timm's transform for each picture of a sample, from a PIL image to (channels, height, width).

    The keys that timm does not have change the steps of its transform: the border of letterbox, and the pixels up to
    255, which are not divided.
    """
    import torch
    from timm.data import create_transform
    from timm.data.transforms import CenterCropOrPad
    from torchvision.transforms import Compose, Normalize, v2

    config = dict(config)
    color, scale, fill = config.pop("color", "rgb"), config.pop("scale", 1), config.pop("fill", None)
    config.pop("files", None)
    size = config["input_size"][1:]
    transforms, first = [], 0
    for each in [color] if isinstance(color, str) else color:
        last = first + CHANNELS[each]
        mean, std = (config[key] if len(config[key]) == 1 else config[key][first:last] for key in ("mean", "std"))
        normalize = input_format != "uint8_nhwc"
        options = {**config, "mean": [value / scale for value in mean], "std": std}
        if fill is not None:
            options["crop_mode"] = "border"
        steps = [*create_transform(**options, is_training=False, normalize=normalize and scale == 1).transforms]
        if fill is not None:
            steps[1] = CenterCropOrPad(size, fill=fill)
        if normalize and scale != 1:
            steps += [v2.ToDtype(torch.float32), Normalize(mean, std)]
        transforms.append(Compose(steps))
        first = last
    return transforms
