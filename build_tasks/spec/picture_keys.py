"""The keys that say how a picture becomes an input, as types for the tables of a spec."""

from typing import Annotated, Literal

from msgspec import Meta

PixelValue = Annotated[float, Meta(ge=-1e6, le=1e6)]
PositivePixelValue = Annotated[float, Meta(gt=0, le=1e6)]
FileEnding = Annotated[str, Meta(min_length=1)]
ColorName = Literal["gray", "rgb", "bgr", "rgba", "bgra"]
NAMES = ("color", "files", "scale", "mean", "std", "interpolation", "crop_pct", "crop_mode", "fill")
CHANNELS = {"gray": 1, "rgb": 3, "bgr": 3, "rgba": 4, "bgra": 4}  # of a picture of each color

Color = Annotated[
    ColorName | Annotated[list[ColorName], Meta(min_length=1)] | None,
    Meta(
        description="The channels of a picture in the order of the network; a list if a sample has several files. "
        "Default: gray, rgb or rgba, by the number of channels."
    ),
]
Files = Annotated[
    Annotated[list[FileEnding], Meta(min_length=1)] | None,
    Meta(
        description='The endings of the files that form one sample, in the order of the channels: `["_rgb.png", '
        '"_nir.png"]`. Default: each file is a sample.'
    ),
]
Scale = Annotated[
    Literal[1, 255],
    Meta(description="The largest value of a pixel, before mean and std. With 255 they are 0 and 1 by default."),
]
Mean = Annotated[
    list[PixelValue] | None, Meta(description="Mean of each channel, for pixels from 0 to 1, or to `scale`.")
]
Std = Annotated[
    list[PositivePixelValue] | None,
    Meta(description="Standard deviation of each channel, for pixels from 0 to 1, or to `scale`."),
]
Interpolation = Annotated[
    Literal["nearest", "bilinear", "bicubic", "lanczos"] | None, Meta(description="How pictures are resized.")
]
CropShare = Annotated[
    Annotated[float, Meta(gt=0, le=1)] | None,
    Meta(description="Share of the resized picture that the center crop keeps."),
]
CropMode = Annotated[
    Literal["center", "squash", "border", "letterbox"] | None,
    Meta(
        description="How a picture that is not square is fitted, as timm does it. letterbox keeps the whole picture, "
        "and fills the rest with `fill`."
    ),
]
Fill = Annotated[
    Annotated[int, Meta(ge=0, le=255)] | None,
    Meta(description="The value around the picture, from 0 to 255, if crop_mode is letterbox. Default: 114."),
]
