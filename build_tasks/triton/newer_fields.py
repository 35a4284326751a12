"""The fields of a ModelConfig that a release does not have. The server then refuses the whole config.pbtxt."""

from collections.abc import Iterator, Mapping
from typing import Any

from build_tasks.triton.model_config import Mistake, shorten
from build_tasks.triton.release_table import FIELDS_SINCE


def _newer(message: Any, release: str, path: str = "") -> Iterator[tuple[Any, Any, Any, str]]:
    """Yield (message, field, value, key) of each field that the release does not have."""
    for field, value in message.ListFields():
        key = f"{path}{field.name}"
        if release < FIELDS_SINCE.get(field.full_name.removeprefix("inference."), ""):
            yield message, field, value, key
        elif field.message_type is not None and not isinstance(value, Mapping):  # its options take 5 ms to load
            for element in value if field.is_repeated else (value,):
                yield from _newer(element, release, f"{key}.")


def mistakes(config: Any, release: str) -> Iterator[Mistake]:
    """Yield the fields of a ModelConfig that a release does not have."""
    for _, field, value, key in _newer(config, release):
        since = FIELDS_SINCE[field.full_name.removeprefix("inference.")]
        expected = f"nothing, since Triton {release} does not know this field ({since} and newer do)"
        yield key, expected, shorten(" ".join(str(value).split()))


def remove(config: Any, release: str) -> list[str]:
    """Remove the fields of a ModelConfig that a release does not have. Return their keys."""
    newer = list(_newer(config, release))
    for message, field, _, _ in newer:
        message.ClearField(field.name)
    return [key for *_, key in newer]
