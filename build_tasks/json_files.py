"""JSON files as every stage reads and writes them."""

import json
from typing import Any


def read_json(path: str) -> Any:
    """The value that a JSON file holds. Raises OSError and ValueError where there is none."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path: str, value: Any) -> None:
    """Write a value with one key per line. The same value gives the same bytes.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
