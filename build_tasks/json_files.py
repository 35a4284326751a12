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

    Raises:
        ValueError: For NaN and infinity, which JSON does not have.
    """
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
