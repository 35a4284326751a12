"""How pictures become an input: the colors of its channels, the files of a sample, and keys that contradict each other.

color = "bgr"                             one picture, whose channels are in this order
files = ["_rgb.png", "_nir.png"]          two pictures, a_rgb.png and a_nir.png, give the channels of the sample a
color = ["rgb", "gray"]
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from build_tasks.spec.picture_keys import CHANNELS, NAMES
from build_tasks.spec.tables import Input

if TYPE_CHECKING:
    from build_tasks.spec.model import Spec
    from build_tasks.spec.tensor_tables import TensorInput

Mistake = tuple[str, str, str]  # key, what was expected, what was found

DEFAULT_COLORS = {1: "gray", 3: "rgb", 4: "rgba"}  # of a single picture, by the number of channels
FILL = 114  # gray, as in the letterbox of YOLO


def colors_of(color: str | Sequence[str] | None, files: Sequence[str] | None, channels: int) -> list[str]:
    """Return the color of each picture of a sample. Empty if pictures cannot give this number of channels.

    Args:
        color: The key `color` of the spec.
        files: The key `files` of the spec.
        channels: Channels of the input.
    """
    count = len(files or [""])
    if color is None:
        color = "gray" if count > 1 else DEFAULT_COLORS.get(channels, ())
    colors = [color] * count if isinstance(color, str) else list(color)
    return colors if len(colors) == count and sum(CHANNELS[each] for each in colors) == channels else []


def picture_tables(spec: "Spec") -> list[dict[str, Any] | None]:
    """Return how each input of a spec is made of pictures: the keys of its table, None for one that is no picture."""
    if not spec.inputs:
        return [{key: getattr(spec.input, key) for key in NAMES}]
    return [{key: getattr(table, key) for key in NAMES} if table.layout else None for table in spec.inputs]


def mistakes(table: Input, in_chans: object) -> Iterator[Mistake]:
    """Yield the keys of [input] that contradict each other.

    Args:
        in_chans: timm's argument for the number of channels, None without it.
    """
    channels = in_chans if type(in_chans) is int else None
    if table.shape:
        first, height, last = table.shape
        if first > max(DEFAULT_COLORS) and height > last and last in DEFAULT_COLORS:
            yield "input.shape", "[channels, height, width]", f"{table.shape} (did you mean {[last, first, height]}?)"
            return
        if channels not in (None, first):
            yield "input.shape", f"{channels} channels, as architecture.arguments.in_chans says", repr(table.shape)
            return
        channels = first
    yield from key_mistakes(table, "input", channels)


def key_mistakes(table: "Input | TensorInput", key: str, channels: int | None) -> Iterator[Mistake]:
    """Yield the keys of a picture that contradict each other.

    Args:
        key: The table's key in the spec.
        channels: Channels of the input, None if they are unknown.
    """
    for name in ("mean", "std"):
        values = getattr(table, name)
        if values is not None and (not values or (channels and len(values) not in (1, channels))):
            expected = f"{channels} values, one for each channel" if channels else "a value for each channel"
            yield f"{key}.{name}", expected, repr(values)
    yield from _scale_mistakes(table, key)
    yield from _color_mistakes(table, key, channels)
    if table.crop_mode == "letterbox":
        if table.crop_pct not in (None, 1):
            yield f"{key}.crop_pct", "nothing, since letterbox keeps the whole picture", repr(table.crop_pct)
    elif table.fill is not None:
        yield f"{key}.fill", 'nothing, since it is only for crop_mode = "letterbox"', repr(table.fill)


def _color_mistakes(table: "Input | TensorInput", key: str, channels: int | None) -> Iterator[Mistake]:
    files = table.files or []
    for index, ending in enumerate(files):
        if any(ending.endswith(other) for other in (*files[:index], *files[index + 1 :])):
            yield f"{key}.files[{index}]", "an ending of one file of each sample, and of no other", repr(ending)
            return
    count = len(files or [""])
    if isinstance(table.color, list) and len(table.color) != count:
        one = f"one color, since there is no {key}.files"
        yield f"{key}.color", f"{count} colors, one for each of {key}.files" if files else one, repr(table.color)
    elif channels and (table.color or files) and not colors_of(table.color, files, channels):
        counts = ", ".join(f"{color} {count}" for color, count in CHANNELS.items())
        found = repr(table.color) if table.color else f"{count} gray pictures"
        yield f"{key}.color", f"channels in the number that the input has, {channels} ({counts})", found


def _scale_mistakes(table: "Input | TensorInput", key: str) -> Iterator[Mistake]:
    """Yield a mean and a standard deviation for pixels of the other scale, with the values that are probably meant.

    The mean of pixels from 0 to 1 is at most 1. A standard deviation is a divisor, which may be 2 for values from -1 to
    1. A mean for 0 to 255 beside a std of 1 says that the network takes differences of bytes.
    """
    mean, std = table.mean or [], table.std or []
    if table.scale != 1:
        for name, values in (("mean", mean), ("std", std)):
            if values and 0 < max(values) < 1:
                scaled = [round(value * 255, 3) for value in values]
                yield f"{key}.{name}", f"a value for pixels from 0 to 255, probably {scaled}", f"{values}, for 0 to 1"
        return
    bytes_mean, bytes_std = any(abs(value) > 1 for value in mean), any(value > 2 for value in std)
    for name, values, is_wrong in (
        ("mean", mean, bytes_mean),
        ("std", std, bytes_std or (bytes_mean and bool(std) and set(std) == {1.0})),
    ):
        if is_wrong:
            scaled = [float(f"{value / 255:.4g}") for value in values]
            expected = f"a value for pixels from 0 to 1, probably {scaled}"
            yield f"{key}.{name}", expected, f"{values}, for 0 to 255, which need {key}.scale = 255"
