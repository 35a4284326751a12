"""Options of doit's command line that replace keys of a spec for one run. They have the names of the guide's options.

    doit engine:NAME --engine_precision FP16 --max_engine_batch_size 64

They are read before the tasks are created, because an option changes more than the task that it follows: with another
precision, the stages before and after use other files too. The value is part of the fingerprint, so the next plain
`doit` builds again what the spec describes.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from doit.cmdparse import CmdOption, CmdParseError, TaskParse
from msgspec import Struct

from build_tasks.errors import UserError


class Override(Struct, frozen=True):
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
OF_STAGE["container"] = OF_STAGE["engine"]
OF_STAGE |= dict.fromkeys(("layers", "repair"), (ENGINE[0],))

# A switch -> what doit calls it when it is on and off.
SWITCHES = {
    f"--{override.option['long']}": {True: f"--{override.option['long']}", False: f"--{override.option['inverse']}"}
    for override in ONNX
    if override.option["type"] is bool
}
BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

Overrides = dict[tuple[str, str], tuple[str, Any]]  # (table, key) of the spec -> (the option as text, value)


def params(stage: str) -> list[dict[str, Any]]:
    """Return the options of a stage's tasks, as doit's `params`. `doit help TASK` lists them."""
    return [override.option for override in OF_STAGE[stage]]


def without_booleans(arguments: Iterable[str]) -> list[str]:
    """Return arguments with `--dynamic_axes True` and `--dynamic_axes=False` in the form that doit parses.

    The scripts that this project replaces took a value behind a switch. doit knows a switch and its inverse.

    Raises:
        CmdParseError: If the value behind `=` is no boolean. doit shows it in one line, and exits with 3.
    """
    words: list[str] = []
    for word in arguments:
        name, equals, value = word.partition("=")
        if equals and name in SWITCHES:
            if value.lower() not in BOOLEANS:
                raise CmdParseError(f"option {name}: expected True or False, found {value[:20]!r}")
            words.append(SWITCHES[name][BOOLEANS[value.lower()]])
        elif words and words[-1] in SWITCHES and word.lower() in BOOLEANS:
            words[-1] = SWITCHES[words[-1]][BOOLEANS[word.lower()]]
        else:
            words.append(word)
    return words


def from_command_line(arguments: Iterable[str] = sys.argv) -> dict[str, Overrides]:
    """Return the values on the command line, by model. doit reports arguments that cannot be parsed, and exits with 3.

    Raises:
        UserError: If one key has two values.
    """
    arguments = without_booleans(arguments)
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
        for key, (text, value) in of_options(stage, parsed).items():
            other, _ = overrides.setdefault(key, (text, value))
            if other != text:
                raise UserError(f"{name}: {other} contradicts {text}")
    return values


def of_options(task: str, options: Mapping[str, Any]) -> Overrides:
    """Return the keys that the options of a task replace. None is an option that was not given.

    Args:
        options: The values as doit has parsed them, by the names of the options.
    """
    values: Overrides = {}
    for override in OF_STAGE[task]:
        option = override.option["name"]
        if (value := options[option]) is not None:
            text = f"--{override.option['inverse']}" if value is False else f"--{option}"
            values[override.table, override.key] = (text if isinstance(value, bool) else f"{text} {value}", value)
    return values
