"""The guide's options on doit's command line, in the place of the spec's keys for one run.

    doit engine:NAME --engine_precision FP16 --max_engine_batch_size 64

They are read before the tasks are made, because they decide more than the task that they stand behind: another
precision is another file for the stages before and after. An override is part of what an artifact was built from,
so the next plain `doit` returns to the spec.
"""

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from doit.cmdparse import CmdOption, CmdParseError, TaskParse

from build_tasks.errors import UserError


class Override(NamedTuple):
    table: str
    key: str
    option: dict[str, Any]  # as doit takes it


def _override(table: str, key: str, long: str, help_text: str, value_type: Any = int, **more: Any) -> Override:
    option = {
        "name": long,
        "long": long,
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

Overrides = dict[tuple[str, str], tuple[str, Any]]  # (table, key) of the spec -> (as it was typed, value)


def params(stage: str) -> list[dict[str, Any]]:
    """What doit needs to accept the options behind a task of this stage, and to tell of them in `doit help TASK`."""
    return [override.option for override in OF_STAGE[stage]]


def from_command_line(words: Iterable[str] = sys.argv) -> dict[str, Overrides]:
    """The values on a command line, by model. UserError for two of one key.

    What cannot be parsed is left to doit, which says so and exits with 3.
    """
    words = list(words)
    values: dict[str, Overrides] = {}
    for index, word in enumerate(words):
        stage, colon, name = word.partition(":")
        if colon and stage in OF_STAGE:
            try:
                parsed, _ = TaskParse([CmdOption(option) for option in params(stage)]).parse(words[index + 1 :])
            except (CmdParseError, ValueError):
                continue
            model = values.setdefault(name.partition(".")[0], {})
            for override in OF_STAGE[stage]:
                if parsed[override.option["name"]] is not None:
                    option = override.option["name"]
                    value = parsed[option]
                    typed = f"--{override.option['inverse']}" if value is False else f"--{option} {value}"
                    before, _ = model.setdefault((override.table, override.key), (typed, value))
                    if before != typed:
                        raise UserError(f"{name}: {before} and {typed} at once")
    return values
