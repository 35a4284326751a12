"""The values of default warm-up requests, for inputs that zeros are not valid for."""

from build_tasks.spec.interface import inputs_of
from build_tasks.spec.model import Model
from build_tasks.tensors import InputTensor
from build_tasks.triton.model_config import fields_of_format
from build_tasks.triton.platforms import FORMATS


def warm_up_values(model: Model, model_format: str) -> dict[str, int | float | bool | str]:
    """Return a valid value of each such input, by its name; empty if the spec has warm-up requests of its own."""
    if model_format not in FORMATS or "model_warmup" in fields_of_format(model.config_fields, model_format):
        return {}
    found = {each["name"]: valid_value(each) for each in inputs_of(model.spec)}
    return {name: value for name, value in found.items() if value is not None}


def valid_value(tensor: InputTensor) -> int | float | bool | str | None:
    """Return a value that an input may have; None if it may be zero, or an empty string."""
    if values := tensor["values"]:
        return None if any(not value for value in values) else values[0]
    low, high = tensor["low"], tensor["high"]
    if low is not None and low > 0:
        return low
    return high if high is not None and high < 0 else None


def warm_up_folder(config: str) -> str:
    """Return the folder of the files with these values, beside a config.pbtxt in build/."""
    return f"{config.removesuffix('config.pbtxt')}warmup"
