"""Options of doit's command line that replace keys of a spec for one run. They have the names of the guide's options.

    doit engine:NAME --engine_precision FP16 --max_engine_batch_size 64

They are read before the tasks are created, because an option changes more than the task that it follows: with another
precision, the stages before and after use other files too. The value is part of the fingerprint, so the next plain
`doit` builds again what the spec describes.
"""

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from doit.cmdparse import CmdOption, CmdParseError, TaskParse

from build_tasks.errors import UserError


class Override(NamedTuple):
    """An option and the key that it replaces."""

    table: str
    key: str
    option: dict[str, Any]  # in the form of doit's `params`


def _override(table: str, key: str, name: str, help_text: str, value_type: Any = int, **more: Any) -> Override:
    option = {
        "name": name,
        "long": name,
        "type": value_type,
        "default": None,
        "help": f"{help_text}, for this run",
        **more,
    }
    return Override(table, key, option)


ONNX = (
    _override("onnx", "opset", "opset_version", "ONNX opset"),
    _override("onnx", "dynamic_axes", "dynamic_axes", "leave the batch open", bool, inverse="no-dynamic_axes"),
    _override("onnx", "batch_size", "batch_size", "batch of the exported example"),
)
ENGINE = (
    _override("engine", "precision", "engine_precision", "FP32, TF32, FP16, BF16, INT8 or FP8", str.lower),
    _override("engine", "min_batch_size", "min_engine_batch_size", "smallest batch of the engine's profile"),
    _override("engine", "opt_batch_size", "opt_engine_batch_size", "batch that the engine is tuned for"),
    _override("engine", "max_batch_size", "max_engine_batch_size", "largest batch of the engine's profile"),
)
OF_STAGE = {"onnx": ONNX, "engine": (*ENGINE, *ONNX), "rtx": (*ENGINE, *ONNX)}
OF_STAGE |= dict.fromkeys(("layers", "repair"), (ENGINE[0],))

Overrides = dict[tuple[str, str], tuple[str, Any]]  # (table, key) of the spec -> (the option as text, value)


def params(stage: str) -> list[dict[str, Any]]:
    """Return the options of a stage's tasks, as doit's `params`. `doit help TASK` lists them."""
    return [override.option for override in OF_STAGE[stage]]


def from_command_line(arguments: Iterable[str] = sys.argv) -> dict[str, Overrides]:
    """Return the values on the command line, by model. doit reports arguments that cannot be parsed, and exits with 3.

    Raises:
        UserError: If one key has two values.
    """
    arguments = list(arguments)
    values: dict[str, Overrides] = {}
    for index, argument in enumerate(arguments):
        stage, colon, name = argument.partition(":")
        if not colon or stage not in OF_STAGE:
            continue
        try:
            parsed, _ = TaskParse([CmdOption(option) for option in params(stage)]).parse(arguments[index + 1 :])
        except (CmdParseError, ValueError):
            continue
        overrides = values.setdefault(name.partition(".")[0], {})
        for override in OF_STAGE[stage]:
            option = override.option["name"]
            if (value := parsed[option]) is not None:
                text = f"--{override.option['inverse']}" if value is False else f"--{option} {value}"
                other, _ = overrides.setdefault((override.table, override.key), (text, value))
                if other != text:
                    raise UserError(f"{name}: {other} contradicts {text}")
    return values
