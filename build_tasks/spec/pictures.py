"""How pictures become an input: the colors of its channels, the files of a sample, and keys that contradict each other.

color = "bgr"                             one picture, whose channels are in this order
files = ["_rgb.png", "_nir.png"]          two pictures, a_rgb.png and a_nir.png, give the channels of the sample a
color = ["rgb", "gray"]
"""

from collections.abc import Iterator, Sequence

from build_tasks.spec.picture_keys import CHANNELS
from build_tasks.spec.tables import Input

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
    yield from _color_mistakes(table, channels)
    if table.crop_mode == "letterbox":
        if table.crop_pct not in (None, 1):
            yield "input.crop_pct", "nothing, since letterbox keeps the whole picture", repr(table.crop_pct)
    elif table.fill is not None:
        yield "input.fill", 'nothing, since it is only for crop_mode = "letterbox"', repr(table.fill)


def _color_mistakes(table: Input, channels: int | None) -> Iterator[Mistake]:
    files = table.files or []
    for index, ending in enumerate(files):
        if any(ending.endswith(other) for other in (*files[:index], *files[index + 1 :])):
            yield f"input.files[{index}]", "an ending of one file of each sample, and of no other", repr(ending)
            return
    count = len(files or [""])
    if isinstance(table.color, list) and len(table.color) != count:
        expected = (
            f"{count} colors, one for each of input.files" if files else "one color, since there is no input.files"
        )
        yield "input.color", expected, repr(table.color)
    elif channels and (table.color or files) and not colors_of(table.color, files, channels):
        counts = ", ".join(f"{color} {count}" for color, count in CHANNELS.items())
        found = repr(table.color) if table.color else f"{count} gray pictures"
        yield "input.color", f"channels in the number that the input has, {channels} ({counts})", found
