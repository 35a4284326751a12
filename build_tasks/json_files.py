"""JSON files. All stages read and write them here."""

import json
import os
from typing import Any


def read_json(path: str) -> Any:
    """Return the value of a JSON file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not JSON.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # to open a FIFO waits, and a device has no end
        raise OSError(f"{path} is not a file")
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def write_json(path: str, value: Any) -> None:
    """Write a value with one key per line. The same value gives the same bytes.

    These are the bytes of `json.dumps(value, indent=1)`. With an indent, Python's encoder in C does not write the text,
    so that it takes five times longer.

    Raises:
        ValueError: For NaN and infinity, which JSON does not have.
    """
    import msgspec

    text = json.dumps(value, allow_nan=False)
    try:
        text = msgspec.json.format(text, indent=1)
    except msgspec.DecodeError:  # half of a surrogate pair, as in a file name that is not UTF-8
        text = json.dumps(value, indent=1)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
