"""Where a run's lines go: to a terminal, above a line for each stage that runs; or with the time before each.

Both hear of the same things: what is said (a line) and shown (a table) for good, and which stage begins, gets on and
ends.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TextIO

from build_tasks.runtime.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

PAUSE = 10  # seconds between two lines on the progress of a stage, without a terminal
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
BAR = 12  # characters
MARKS = {"✓": "green", "✗": "bold red", "–": "yellow", "!": "yellow"}


class Running(NamedTuple):
    """A stage that runs.

    since: of time.monotonic().
    last: the seconds that it took last time, None where that is not known.
    """

    title: str
    since: float
    last: float | None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since


class Reached(NamedTuple):
    """How far a stage is, and since when (of time.monotonic()) it tells of this file or phase."""

    progress: Progress
    since: float


def reached(before: Reached | None, progress: Progress) -> Reached:
    same = before is not None and before.progress.what == progress.what
    return Reached(progress, before.since if before and same else time.monotonic())


def create(out: TextIO, totals: Callable[[], str]) -> "NullDisplay":
    """Return the display that fits a stream: a terminal or a log.

    Args:
        totals: Returns the line on the run as a whole, at any moment.
    """
    is_terminal = out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return LiveDisplay(out, totals) if is_terminal else LogDisplay(out)


class NullDisplay:
    """For a run that is told as a whole, at its end."""

    def say(self, line: str, failure: bool = False) -> None:
        pass

    def show(self, table: str) -> None:
        pass

    def begin(self, task: str, title: str, last: float | None, cause: str) -> None:
        pass

    def get_on(self, task: str, progress: Progress) -> None:
        pass

    def end(self, task: str) -> None:
        pass

    def pause(self) -> None:
        """Something else is going to write to the terminal."""

    def close(self) -> None:
        pass


class FailuresDisplay(NullDisplay):
    """What fails alone."""

    def __init__(self, out: TextIO):
        self.out = out

    def say(self, line: str, failure: bool = False) -> None:
        if failure:
            self.out.write(f"{line}\n")
            self.out.flush()


class LogDisplay(NullDisplay):
    """Without a terminal: every line with the time before it, and one in a while on what takes long."""

    def __init__(self, out: TextIO):
        self.out = out
        self.running: dict[str, Running] = {}
        self.reached: dict[str, Reached] = {}
        self.told: dict[str, float] = {}  # when there was a line on a stage's progress
        self.lock = threading.Lock()

    def say(self, line: str, failure: bool = False) -> None:
        with self.lock:
            self.out.write(f"{time.strftime('%H:%M:%S')} {line}\n")
            self.out.flush()

    def show(self, table: str) -> None:
        with self.lock:
            self.out.write(f"{table}\n")
            self.out.flush()

    def begin(self, task: str, title: str, last: float | None, cause: str) -> None:
        self.running[task] = Running(title, time.monotonic(), last)
        before = "" if last is None else f", {last:.1f} s last time"
        self.say(f"  {title} ...{before}{'; ' if before and cause else ' ' if cause else ''}{cause}")

    def get_on(self, task: str, progress: Progress) -> None:
        stage, now = self.running.get(task), time.monotonic()
        self.reached[task] = reached(self.reached.get(task), progress)
        if stage and now - self.told.setdefault(task, now) >= PAUSE:
            self.told[task] = now
            self.say(f"  {stage.title} {stage.seconds:6.1f} s  {format_progress(self.reached[task])}")

    def end(self, task: str) -> None:
        for known in (self.running, self.reached, self.told):
            known.pop(task, None)


class LiveDisplay(NullDisplay):
    """With one: what is said scrolls, and below it stands a line for each stage that runs.

    tally: what is to be said of the run as a whole, at any moment.
    """

    def __init__(self, out: TextIO, tally: Callable[[], str]):
        self.out = out
        self.tally = tally
        self.running: dict[str, Running] = {}
        self.reached: dict[str, Reached] = {}
        self.lock = threading.Lock()  # of what is rendered, by a thread of rich's
        self.starting = threading.Lock()
        self.live: Live | None = None

    def say(self, line: str, failure: bool = False) -> None:
        if self.live is None and line[:1] not in MARKS:
            self.out.write(f"{line}\n")  # as it is where nothing runs: a run with nothing to do needs no rich
            self.out.flush()
            return
        from rich.text import Text

        text = Text(line)
        if style := MARKS.get(line[:1]):
            text.stylize(style, 0, 1)
        console = self.live.console if self.live else self.console()
        console.print(text, soft_wrap=True)

    def show(self, table: str) -> None:
        self.say(table)

    def begin(self, task: str, title: str, last: float | None, cause: str) -> None:
        with self.lock:
            self.running[task] = Running(title, time.monotonic(), last)
            if cause:
                self.reached[task] = reached(None, Progress(cause))
        with self.starting:  # `doit -n` begins tasks in threads of their own
            if self.live is None:
                from rich.live import Live

                live = Live(console=self.console(), get_renderable=self.render, refresh_per_second=8, transient=True)
                live.start()
                self.live = live

    def get_on(self, task: str, progress: Progress) -> None:
        with self.lock:
            self.reached[task] = reached(self.reached.get(task), progress)

    def end(self, task: str) -> None:
        with self.lock:
            self.running.pop(task, None)
            self.reached.pop(task, None)

    def pause(self) -> None:
        with self.starting:
            if self.live:
                self.live.stop()
                self.live = None

    def close(self) -> None:
        self.pause()

    def console(self) -> "Console":
        from rich.console import Console

        return Console(file=self.out, highlight=False, markup=False)

    def render(self) -> "RenderableType":
        """A line for each stage that runs: what, how long of how long, and where it is; below, the run as a whole."""
        from rich.console import Group
        from rich.text import Text

        lines = []
        with self.lock:
            for task, stage in self.running.items():
                at, done, total = self.reached.get(task), stage.seconds, stage.last
                if at and at.progress.total:
                    done, total = at.progress.done, at.progress.total
                full = round(BAR * min(done / total, 1)) if total else 0
                before = "" if stage.last is None else f" (last time {stage.last:.1f} s)"
                line = Text.assemble(
                    (SPINNER[int(time.monotonic() * 8) % len(SPINNER)], "cyan"),
                    f" {stage.title} ",
                    ("━" * full, "green"),
                    ("━" * (BAR - full), "bright_black"),
                    (f" {stage.seconds:6.1f} s{before}", "cyan"),
                    (f"  {format_progress(at)}" if at else "", "dim"),
                    no_wrap=True,
                    overflow="ellipsis",
                )
                lines.append(line)
        return Group(*lines, Text(self.tally(), style="dim"))


def format_progress(at: Reached) -> str:
    """How far a stage is: "model.safetensors: 12.3 of 49.0 MB, 4.1 MB/s"."""
    (what, done, total, unit), seconds = at.progress, time.monotonic() - at.since
    if not unit and total is None:
        return what
    if unit != "B":
        return f"{what}: {done:.0f} of {total or 0:.0f} {unit}".rstrip()
    size = f" of {total / 1e6:.1f}" if total else ""
    rate = f", {done / 1e6 / seconds:.1f} MB/s" if seconds > 0.5 else ""
    return f"{what}: {done / 1e6:.1f}{size} MB{rate}"
