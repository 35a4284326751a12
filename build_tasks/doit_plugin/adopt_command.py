"""adopt: `doit adopt PATH` brings in a model repository, or the folder of one model, that was made without doit

doit adopt PATH             what doit would build of it, what differs, and what is left alone; writes nothing
doit adopt PATH --write     writes models/NAME/model.toml of each, with copies of its files
doit adopt PATH --compare   compares the answers of what doit has built with those of the originals
doit adopt PATH --replace   the same, and puts what answers the same into model_repository/; the originals are kept
"""

import sys
from typing import Any

from doit.cmd_base import Command

from build_tasks.doit_plugin.command_line import OneLineMistakes
from build_tasks.errors import UserError, printable


class Adopt(OneLineMistakes, Command):  # type: ignore[misc]  # doit has no types
    """The command. Heavy modules are imported where they are used."""

    takes_names_first = True
    doc_purpose = "bring in a model repository that was made without doit"
    doc_usage = "PATH [--fields] [--write | --compare | --replace]"
    doc_description = (
        "PATH is a model repository, or the folder of one model. Without an option nothing is written: each model gets "
        "a line about what doit would build, each field that would differ, and the reason if it is left alone. "
        "ONNX and TorchScript files become the sources of the new specs."
    )
    cmd_options = (
        {
            "name": "fields", "long": "fields", "type": bool, "default": False,
            "help": "print every field of each config.pbtxt, as it is and as doit would write it",
        },
        {
            "name": "write", "long": "write", "type": bool, "default": False,
            "help": "write the specs, models/NAME/model.toml, with copies of the files that they name",
        },
        {
            "name": "compare", "long": "compare", "type": bool, "default": False,
            "help": "compare the answers of what doit has built with those of the originals",
        },
        {
            "name": "replace", "long": "replace", "type": bool, "default": False,
            "help": "compare them, and replace originals in model_repository/ by what answers the same",
        },
    )  # fmt: skip

    def execute(self, options: dict[str, Any], arguments: list[str]) -> int:
        if len(arguments) != 1 or sum(options[name] for name in ("write", "compare", "replace")) > 1:
            sys.stderr.write(f"ERROR: expected: doit adopt {self.doc_usage}\n")
            return 3  # doit's exit code for a command line that it does not accept
        try:
            return run(arguments[0], options)
        except (UserError, OSError) as error:
            sys.stderr.write(printable(f"ERROR: {error}\n"))
            return 3
        except ModuleNotFoundError as error:
            from build_tasks.runtime.worker import not_installed

            sys.stderr.write(f"ERROR: {not_installed(error)}\n")
            return 3


def run(path: str, options: dict[str, Any]) -> int:
    """Do what the command line says, and return the exit code.

    Raises:
        UserError: If PATH holds no model.
    """
    from build_tasks.doit_plugin import adopt_output, adopted_ensembles, adoption

    adoptions = adopted_ensembles.with_ensembles(adoption.adopt(path))
    if options["compare"] or options["replace"]:
        from build_tasks.doit_plugin import adopt_replace

        return adopt_replace.compare(adoptions, replace=options["replace"])
    sys.stdout.write(printable("".join(adopt_output.describe(each, options["fields"]) for each in adoptions)))
    if options["write"]:
        from build_tasks.doit_plugin import adopt_writer

        return adopt_writer.write(adoptions)
    sys.stdout.write(adopt_output.summary(path, adoptions))
    return 0
