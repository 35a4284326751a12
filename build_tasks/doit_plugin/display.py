"""Writes the lines of a run to a terminal, above a line for each running stage, or to a log, with the time.

reporter ─► write(line), write_table(table)         what stays on the screen
         ─► begin, update, end (of one stage)       what is shown while the stage runs
"""

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TextIO

from build_tasks.errors import message_line, printable
from build_tasks.runtime.progress import Progress
from build_tasks.text_table import terminal_width, wrap

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.progress import Progress as ProgressBars
    from rich.progress import ProgressColumn, TaskID

LOG_INTERVAL = 10  # seconds until the first line on a running stage, in a log; each pause is twice the one before
MAX_LOG_INTERVAL = 120  # seconds
BAR_WIDTH = 12  # characters
REFRESHES = 8  # number of refreshes per second
NEARLY = (
    0.999  # the largest share of a bar: rich shows a full bar as finished, but a stage may take longer than last time
)
MARKS = {"✓": "green", "✗": "bold red", "–": "yellow", "!": "yellow"}  # first character of a line -> its style


class RunningStage(NamedTuple):
    """A stage that runs.

    started: time.monotonic() at its start.
    last_seconds: Its duration in the run before, None where that is not known.
    """

    title: str
    started: float
    last_seconds: float | None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def time(self) -> str:
        """The duration so far, and the one of the run before: "   1.2 s of 5.8 s"."""
        before = "" if self.last_seconds is None else f" of {self.last_seconds:.1f} s"
        return f"{self.seconds:6.1f} s{before}"


class Phase(NamedTuple):
    """The progress of a stage, and when (time.monotonic()) the current file or phase began."""

    progress: Progress
    started: float


def next_phase(before: Phase | None, progress: Progress) -> Phase:
    """Return the phase of a stage after a message on its progress."""
    same = before is not None and before.progress.what == progress.what
    return Phase(progress, before.started if before and same else time.monotonic())


def create(out: TextIO, totals: Callable[[], str]) -> "NullDisplay":
    """Return the display that fits a stream: a terminal or a log.

    Args:
        totals: Returns the line with the totals of the run, at any moment.
    """
    is_terminal = out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return LiveDisplay(out, totals) if is_terminal else LogDisplay(out)


class NullDisplay:
    """Shows nothing. Base class of the others."""

    def write(self, line: str, failure: bool = False) -> None:
        """Write a line that stays."""

    def write_table(self, table: str) -> None:
        """Write several lines that stay."""

    def begin(self, task: str, title: str, last_seconds: float | None, reason: str) -> None:
        """Show that a stage runs, and why."""

    def update(self, task: str, progress: Progress) -> None:
        """Show how far a stage is."""

    def end(self, task: str) -> None:
        """Stop showing a stage."""

    def pause(self) -> None:
        """Leave the terminal to something else that writes to it."""

    def close(self) -> None:
        """Leave the terminal as it was before the run."""


class FailuresDisplay(NullDisplay):
    """Writes only the lines on failures."""

    def __init__(self, out: TextIO):
        self.out = out

    def write(self, line: str, failure: bool = False) -> None:
        if failure:
            self.out.write(f"{printable(line)}\n")
            self.out.flush()


class LogDisplay(NullDisplay):
    """Writes every line with the time before it, and from time to time a line on a stage that takes long."""

    def __init__(self, out: TextIO):
        self.out = out
        self.running: dict[str, RunningStage] = {}
        self.phases: dict[str, Phase] = {}
        self.due: dict[str, float] = {}  # the duration of each stage, in seconds, at which its next line is written
        self.lock = threading.RLock()  # the lines come from several threads
        self.closed = threading.Event()
        self.watcher: threading.Thread | None = None

    def write(self, line: str, failure: bool = False) -> None:
        with self.lock:
            self.out.write(f"{time.strftime('%H:%M:%S')} {printable(line)}\n")
            self.out.flush()

    def write_table(self, table: str) -> None:
        with self.lock:
            self.out.write(f"{printable(table)}\n")
            self.out.flush()

    def begin(self, task: str, title: str, last_seconds: float | None, reason: str) -> None:
        before = "" if last_seconds is None else f", {last_seconds:.1f} s last time"
        self.write(f"  {title} ...{f'{before};' if before and reason else before}{f' {reason}' if reason else ''}")
        with self.lock:
            self.running[task] = RunningStage(title, time.monotonic(), last_seconds)
            self.due[task] = LOG_INTERVAL
            if self.watcher is None:
                self.watcher = threading.Thread(target=self._watch, daemon=True)
                self.watcher.start()

    def update(self, task: str, progress: Progress) -> None:
        with self.lock:
            self.phases[task] = next_phase(self.phases.get(task), progress)

    def end(self, task: str) -> None:
        with self.lock:
            for known in (self.running, self.phases, self.due):
                known.pop(task, None)

    def close(self) -> None:
        self.closed.set()

    def _watch(self) -> None:
        """Write a line on each stage that takes long. A stage need not report any progress for that."""
        while not self.closed.wait(LOG_INTERVAL / 10):
            with self.lock:
                for task, stage in self.running.items():
                    if stage.seconds >= self.due[task]:
                        self.due[task] += min(self.due[task], MAX_LOG_INTERVAL)
                        phase = self.phases.get(task)
                        detail = format_progress(phase) if phase else "runs"
                        self.write(f"  {stage.title} {stage.seconds:6.1f} s  {detail}")


class LiveDisplay(NullDisplay):
    """Shows a line for each running stage at the bottom of a terminal; lines that stay scroll above them."""

    def __init__(self, out: TextIO, totals: Callable[[], str]):
        self.out = out
        self.totals = totals
        self.running: dict[str, RunningStage] = {}
        self.phases: dict[str, Phase] = {}
        self.bar_ids: dict[str, TaskID] = {}
        self.lock = threading.Lock()  # protects the three attributes above, because a thread of rich reads them
        self.start_lock = threading.Lock()  # `doit -n` begins tasks in several threads
        self.live: Live | None = None
        self.bars: ProgressBars | None = None
        self.columns: tuple[str | ProgressColumn, ...] = ()  # with the one of the bars, which is not always shown

    def write(self, line: str, failure: bool = False) -> None:
        line = wrap(printable(line), terminal_width(self.out))
        if self.live is None and line[:1] not in MARKS:
            self.out.write(f"{line}\n")  # without rich, so that a run with nothing to do does not import it
            self.out.flush()
            return
        from rich.text import Text

        text = Text(line)
        if style := MARKS.get(line[:1]):
            text.stylize(style, 0, 1)
        console = self.live.console if self.live else self._console()
        console.print(text, soft_wrap=True)

    def write_table(self, table: str) -> None:
        self.write(table)

    def begin(self, task: str, title: str, last_seconds: float | None, reason: str) -> None:
        with self.start_lock:
            if self.live is None:
                self._start()
        with self.lock:
            title = title.rstrip()  # the columns are aligned here in another way
            self.running[task] = RunningStage(title, time.monotonic(), last_seconds)
            if reason:
                self.phases[task] = next_phase(None, Progress(reason))
            if self.bars:
                self.bar_ids[task] = self.bars.add_task(title, total=1, time="", detail="")

    def update(self, task: str, progress: Progress) -> None:
        with self.lock:
            self.phases[task] = next_phase(self.phases.get(task), progress)

    def end(self, task: str) -> None:
        with self.lock:
            self.running.pop(task, None)
            self.phases.pop(task, None)
            if self.bars and task in self.bar_ids:
                self.bars.remove_task(self.bar_ids.pop(task))

    def pause(self) -> None:
        with self.start_lock:
            if self.live:
                self.live.stop()
                self.live = None

    def close(self) -> None:
        self.pause()

    def _start(self) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as ProgressBars
        from rich.table import Column

        console = self._console()
        if self.bars is None:
            whole = Column(no_wrap=True)  # of a line that is too long, the details are cut
            self.bars = ProgressBars(
                SpinnerColumn("line" if console.options.ascii_only else "dots", style="cyan", table_column=whole),
                TextColumn("{task.description}", markup=False, table_column=whole),
                BarColumn(BAR_WIDTH, complete_style="green", finished_style="green", table_column=whole),
                TextColumn("{task.fields[time]}", style="cyan", markup=False, table_column=whole),
                TextColumn("{task.fields[detail]}", style="dim", markup=False),
                console=console,
                auto_refresh=False,
            )
            self.columns = self.bars.columns
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=REFRESHES, transient=True)
        self.live.start()

    def _console(self) -> "Console":
        from rich.console import Console

        return Console(file=self.out, highlight=False, markup=False)

    def _share(self, task: str) -> float | None:
        """Return which share of a stage is done: of its current phase, or of its last duration; None if not known."""
        phase, stage = self.phases.get(task), self.running[task]
        if phase and phase.progress.total:
            return phase.progress.done / phase.progress.total
        return stage.seconds / stage.last_seconds if stage.last_seconds else None

    def _render(self) -> "RenderableType":
        """Return a line for each running stage, and below them the line on the run as a whole.

        There is no bar as long as it would be empty: no length of any running stage is known.
        """
        from rich.console import Group
        from rich.progress import BarColumn
        from rich.text import Text

        assert self.bars is not None
        with self.lock:
            shares = {task: self._share(task) for task in self.running}
            has_bars = any(share is not None for share in shares.values())
            self.bars.columns = tuple(
                column for column in self.columns if has_bars or not isinstance(column, BarColumn)
            )
            titles = max((len(stage.title) for stage in self.running.values()), default=0)
            for task, stage in self.running.items():
                gaps = 5  # the spinner, and spaces
                room = self.bars.console.width - titles - len(stage.time) - gaps - (BAR_WIDTH if has_bars else 0)
                phase = self.phases.get(task)
                self.bars.update(
                    self.bar_ids[task],
                    completed=min(shares[task] or 0, NEARLY),
                    total=1,
                    time=stage.time,
                    detail=shorten(format_progress(phase), room) if phase else "",
                )
            table = self.bars.make_tasks_table(self.bars.tasks)
        return Group(table, Text(self.totals(), style="dim"))


def shorten(text: str, room: int) -> str:
    """Return the beginning of a text that fits into a number of characters, cut between words."""
    if len(text) <= room:
        return text
    beginning = text[: max(room - 1, 0)].rpartition(" ")[0]
    return f"{beginning} …" if beginning else ""


def format_progress(phase: Phase) -> str:
    """Return how far a stage is: "model.safetensors: 12.3 of 49.0 MB, 4.1 MB/s"."""
    (what, done, total, unit), seconds = phase.progress, time.monotonic() - phase.started
    what = message_line(what)
    if not unit and total is None:
        return what
    if unit != "B":
        return f"{what}: {done:.0f} of {total or 0:.0f} {unit}".rstrip()
    size = f" of {total / 1e6:.1f}" if total else ""
    rate = f", {done / 1e6 / seconds:.1f} MB/s" if seconds > 0.5 else ""
    return f"{what}: {done / 1e6:.1f}{size} MB{rate}"
