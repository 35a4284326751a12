"""run: `doit`, with this project's records (state.py), and without any check for models in which nothing has changed

    doit NAME ... ─► no-op cache: has anything changed? ─ no ─► the same lines as a run that checks every task
                                    └─ yes ─► doit loads dodo.py and runs the tasks

dodo.py, and with it most modules of build_tasks, is imported only where there may be something to do.
"""

import atexit
import contextlib
import gc
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from doit.cmd_run import Run as DoitRun
from doit.exceptions import InvalidCommand

from build_tasks.doit_plugin import display
from build_tasks.doit_plugin.command_line import RecordsCommand, all_words, is_default_dodo
from build_tasks.doit_plugin.noop_cache import noop_cache, requested_models
from build_tasks.doit_plugin.standard_streams import open_output
from build_tasks.doit_plugin.task_state import format_counts
from build_tasks.paths import REPOSITORY, TRANSIT, TRASH

CHECKED_VARIABLES = {
    "BUILD_MEMORY",
    "BUILD_DOWNLOAD_SIZE",
    "BUILD_DOWNLOAD_TIME",
    "BUILD_STAGE_TIME",
    "BUILD_UNPACKED_SIZE",
    "BUILD_DATA_FOLDERS",
    "BUILD_CACHE_MODE",
}

# doit's own process is short and small. To collect garbage would take an eighth of a run with nothing to do.
gc.disable()
atexit.register(gc.freeze)


class Run(RecordsCommand, DoitRun):  # type: ignore[misc]  # doit has no types
    """The command."""

    name = "run"
    pdb = False

    def get_backends(self) -> dict[str, Any]:
        """Do nothing yet. doit reads the entry points of all distributions here; `load_plugins` may not need them."""
        return {}

    def get_reporters(self) -> dict[str, Any]:
        """Do nothing yet, for the same reason."""
        return {}

    def load_plugins(self) -> None:
        """Find doit's backends and reporters, as doit's own constructor does."""
        self._backends = super().get_backends()
        self.reporters = super().get_reporters()

    def help(self) -> str:
        self.load_plugins()
        return super().help()

    def print_help(self, names: Sequence[str]) -> int:
        """Print the help of the tasks that are named, or an overview."""
        from build_tasks.doit_plugin.core_commands import Help

        command = Help(
            task_loader=self.loader,
            config=self.config,
            bin_name=self.bin_name,
            cmds=self.all_commands,
            opt_vals=self.opt_vals,
        )
        return command.print_help(names)

    def parse_execute(self, in_args: list[str]) -> Any:
        if is_default_dodo(self.opt_vals.get("dodoFile", "dodo.py")) and self.opt_vals.get("cwdPath") is None:
            words = requested_models(all_words(in_args))
            if words is not None and "DOIT_FILE" not in os.environ and nothing_to_do(words.models, words.quiet):
                return 0
        if any(word.startswith("-") for word in in_args) or "DOIT_FILE" in os.environ:
            self.load_plugins()  # an option may name one; without options, dodo.py names the reporter and the backend
        return super().parse_execute(in_args)

    def execute(self, params: Any, args: list[str]) -> Any:
        with contextlib.ExitStack() as files:
            if not isinstance(params["outfile"], str):  # the stream from before `standard_streams.protect`
                params["outfile"] = sys.stdout
            else:
                try:
                    params["outfile"] = files.enter_context(open_output(params["outfile"]))
                except OSError as error:
                    raise InvalidCommand(f"--output-file {params['outfile']}: {error.strerror}") from error
            return super().execute(params, args)


def nothing_to_do(models: set[str], quiet: bool) -> bool:
    """Report the models as up to date, if the no-op cache shows that nothing has changed.

    Args:
        models: The names on the command line; empty for all models and `prune`.
        quiet: Whether the report has only the totals.
    Returns: False if a run has to check the models.
    """
    if not CHECKED_VARIABLES.isdisjoint(os.environ):  # dodo.py checks their values
        return False
    noop_cache.load(models)
    if not noop_cache.complete or not models <= noop_cache.unchanged.keys() or (not models and not _nothing_to_prune()):
        return False
    counts: Counter[str] = Counter() if models else Counter({"up to date": 1})  # this one is prune
    out = display.FailuresDisplay(sys.stdout) if quiet else display.create(sys.stdout, lambda: "")
    for record in noop_cache.unchanged.values():
        counts.update(record.counts)
        for line in record.messages:
            out.write(line)
    text = format_counts(counts)
    if quiet:
        sys.stdout.write(f"{text}\n")
    else:
        out.write(text)
    noop_cache.refresh()
    return True


def _nothing_to_prune() -> bool:
    """Return whether `prune` finds nothing: no model without a spec, no leftovers, no trash older than a day."""
    described = {name for record in noop_cache.unchanged.values() for name in record.triton_models}
    try:
        others = set(os.listdir(REPOSITORY)) - described
    except OSError:
        others = set()
    if any(name.startswith(TRANSIT) for name in others):
        return False
    if os.path.exists(TRASH):
        from build_tasks.runtime import repository_files

        if repository_files.expired_trash():
            return False
    if others:
        from build_tasks.triton.repository import is_generated

        return not any(map(is_generated, others))
    return True
