"""JSON files. All stages read and write them here."""

import json
from typing import Any


def read_json(path: str) -> Any:
    """Return the value of a JSON file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not JSON.
    """
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path: str, value: Any) -> None:
    """Write a value with one key per line. The same value gives the same bytes.

    Raises:
        ValueError: For NaN and infinity, which JSON does not have.
    """
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
