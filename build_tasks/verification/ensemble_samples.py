"""The samples of an ensemble in a file: arrays of numbers, and of encoded pictures and texts, by name.

Polygraphy's JSON cannot hold bytes.
"""

import base64
from typing import TYPE_CHECKING, Any

from build_tasks.json_files import read_json, write_json

if TYPE_CHECKING:
    import numpy as np


def save_samples(feed: "dict[str, np.ndarray]", path: str) -> None:
    """Write arrays (samples, …) to a file."""
    write_json(
        path,
        {
            name: {
                "dtype": str(array.dtype),
                "shape": list(array.shape),
                "values": [_encode(value) for value in array.ravel()] if array.dtype == object else _encode(array),
            }
            for name, array in feed.items()
        },
    )


def load_samples(path: str) -> "dict[str, np.ndarray]":
    """Return the arrays of such a file."""
    import numpy as np

    records: dict[str, Any] = read_json(path)
    feed: dict[str, np.ndarray] = {}
    for name, record in records.items():
        if record["dtype"] == "object":
            array = np.empty(len(record["values"]), object)
            array[:] = [base64.b64decode(value) for value in record["values"]]
        else:
            array = np.frombuffer(base64.b64decode(record["values"]), record["dtype"])
        feed[name] = array.reshape(record["shape"])
    return feed


def _encode(value: Any) -> str:
    content = value.encode() if isinstance(value, str) else bytes(value)
    return base64.b64encode(content).decode("ascii")
