"""What all commands have in common: `--help`, the guide's way to write options, and mistakes in one line.

    doit COMMAND … --help ─► the help of the command, or of the tasks that are named
    doit COMMAND …        ─► doit's command ─► mistake ─► one line, with the name that was probably meant

doit itself prints its option objects where it cannot parse an option, and a traceback where a task is unknown.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from doit.cmdparse import CmdParseError
from doit.exceptions import InvalidCommand, InvalidDodoFile

from build_tasks.paths import STATE_DB

HELP_OPTIONS = {"-h", "--help"}


class OneLineMistakes:
    """Mixin of all commands: `--help`, the options in the guide's form, and mistakes in one line.

    Attributes:
        takes_names_first: Whether names may stand before the options. doit's parser expects them after the options.
    """

    takes_names_first = False

    def __init__(self, cmds: Any = None, **options: Any):
        super().__init__(cmds=cmds, **options)  # type: ignore[call-arg]
        self.all_commands = cmds

    def parse_execute(self, in_args: list[str]) -> Any:
        # A run with nothing to do does not come here.
        from build_tasks.doit_plugin import interrupts
        from build_tasks.spec import overrides

        interrupts.end_waits()
        words = all_words(in_args)
        words = overrides.without_booleans(options_first(words) if self.takes_names_first else words)
        if HELP_OPTIONS.intersection(words):
            return self.print_help([word for word in words if not word.startswith("-")])
        try:
            return super().parse_execute(words)  # type: ignore[misc]
        except CmdParseError as error:
            raise CmdParseError(option_mistake(str(error), self.name, self.cmdparser)) from None  # type: ignore[attr-defined]
        except InvalidCommand as error:
            raise InvalidCommand(self.name_mistake(error)) from None

    def print_help(self, names: Sequence[str]) -> int:
        """Print the help of this command. `run` prints that of the tasks that are named, or an overview."""
        print(self.help())
        return 0

    def help(self) -> str:
        """Return the options, with the defaults that dodo.py sets."""
        defaults: dict[str, Any] = {}
        if loader := getattr(self, "loader", None):  # of commands with tasks or records
            params = self.cmdparser.parse([])[0]  # type: ignore[attr-defined]
            params.update(self.opt_vals)  # type: ignore[attr-defined]
            with contextlib.suppress(InvalidDodoFile):  # a mistake in a spec
                loader.setup(params)
                defaults = loader.load_doit_config()
        for option in self.cmdparser.options:  # type: ignore[attr-defined]
            if option.name in defaults:
                value = defaults[option.name]
                option.set_default("this project's own" if isinstance(value, type) else value)
        text: str = super().help()  # type: ignore[misc]
        return text

    def name_mistake(self, error: InvalidCommand) -> str:
        """Return one line for a name that is neither a command nor a task, with the most similar name."""
        from build_tasks.errors import first_lines, message_line, with_suggestion

        quoted = re.match(r"'(.*)' is not a task\.$", str(error))
        name = error.not_found if error.not_found is not None else quoted and quoted[1]
        if name is None:
            return message_line(first_lines(error))
        tasks = [task.name for task in getattr(self, "task_list", [])]
        commands = self.all_commands or () if error.not_found is not None else ()
        found = with_suggestion(name, [*tasks, *commands])
        hint = "options begin with --; " if "=" in name else ""
        return message_line(
            f"{found} is no command, task or target; {hint}`doit list --all` shows the tasks, `doit help` the commands"
        )


class RecordsCommand(OneLineMistakes):
    """Mixin of the commands that use tasks and doit's records: they use this project's loader and records.

    See dodo_loader.py and state.py.
    """

    def execute(self, params: Any, args: list[str]) -> Any:
        own_dodo = is_default_dodo(params["dodoFile"])
        if own_dodo:
            from build_tasks.doit_plugin.dodo_loader import DodoLoader

            self.loader = DodoLoader(self.loader)  # type: ignore[has-type]
        if own_dodo and params["backend"] in ("dbm", "sqlite3"):  # the first: doit's default
            from doit.cmd_base import opt_depfile

            from build_tasks.doit_plugin.state import StateDB, StateManager, require_doit

            require_doit()
            own_file = params["dep_file"] == opt_depfile["default"]
            self.dep_manager = StateManager(StateDB, STATE_DB if own_file else params["dep_file"])
        return super().execute(params, args)  # type: ignore[misc]


def options_first(words: list[str]) -> list[str]:
    """Return the words of a command line from the first option on, followed by those before it."""
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    return [*words[first:], *words[:first]]


def all_words(in_args: Sequence[str]) -> list[str]:
    """Return the words of this command, with those that doit has taken for variables, such as `epoch=12.ckpt`.

    This project has no variables; doit removes every word with `=` that does not begin with `-`.

    Args:
        in_args: The words that doit has left, without the name of the command.
    """
    if not any(map(_is_variable, sys.argv[1:])):
        return list(in_args)
    first, left = len(sys.argv), len(in_args)
    while first > 1 and (left or _is_variable(sys.argv[first - 1])):
        first -= 1
        left -= not _is_variable(sys.argv[first])
    words = sys.argv[first:]
    return words if [word for word in words if not _is_variable(word)] == list(in_args) else list(in_args)


def _is_variable(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def is_default_dodo(path: str) -> bool:
    """Return whether a path leads to the dodo.py of this folder."""
    return path == "dodo.py" or os.path.realpath(path) == os.path.realpath("dodo.py")


def option_mistake(message: str, command: str, parser: Any) -> str:
    """Return one line for an option that doit could not parse, without its list of option objects.

    Args:
        command: The name of the command.
        parser: Its doit parser, which knows how the option is written.
    """
    from build_tasks.errors import first_lines, message_line, with_suggestion

    text, _, options = message.partition(" (parsing options: ")
    text = first_lines(ValueError(re.sub(r"^Error parsing (Command: |Task: )?", "", text)), 2)
    if unknown := re.fullmatch(r"option --(\S+) not recognized", text):
        longs: Iterable[str] = re.findall(r"'long':'([^']+)'", options)
        text = f"there is no option {with_suggestion(f'--{unknown[1]}', [f'--{name}' for name in longs])}"
    if wrong := re.match(r"parameter '(\w+)' <class '\w+'>\.", text):
        option = next((option for option in parser.options if option.name == wrong[1]), None)
        written = f"-{option.short}" if option and option.short else f"--{option.long if option else wrong[1]}"
        text = f"option {written}:{text[wrong.end() :]}"
    text = text.replace("invalid literal for int() with base 10:", "expected a whole number, found")
    return message_line(
        f"{text}; `doit help {command}` lists the options of the command, `doit help TASK` those of a task"
    )
