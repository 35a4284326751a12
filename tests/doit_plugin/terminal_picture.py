"""Draw what a command shows on a terminal, as a picture for the docs.

    python -m tests.doit_plugin.terminal_picture doit -n 2 efficientnet_lite0

writes docs/images/terminal.svg: the screen in the middle of the run, and the one at its end. Run it where there is
something to build, such as a fresh clone.

    command ─► pseudo-terminal ─► lines, with the cursor moves of rich applied ─► rich's export_svg
"""

import argparse
import fcntl
import io
import itertools
import operator
import os
import pty
import re
import shlex
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.support.project import ROOT

PICTURE = ROOT / "docs/images/terminal.svg"
WIDTH, HEIGHT = 116, 40  # characters and lines of the terminal
SHOWN_LINES = 9  # of the screen in the middle of the run
TOTALS = re.compile(r"(\d+) of (\d+) tasks done")
TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")
Cell = tuple[str, str]  # a character, and the escape sequence of its style


class Screen:
    """The lines that a program has written, and a cursor. It knows the sequences that rich's live display uses."""

    def __init__(self) -> None:
        self.lines: list[list[Cell]] = [[]]
        self.row = self.column = 0
        self.style = ""

    def feed(self, text: str) -> None:
        for parameters, letter, control, characters in TOKEN.findall(text):
            if letter == "m":
                self.style = "" if parameters in ("", "0") else f"{self.style}\x1b[{parameters}m"
            elif letter == "A":
                self.row = max(self.row - int(parameters or 1), 0)
            elif letter == "K":
                self.lines[self.row] = []
            elif control == "\r":
                self.column = 0
            elif control == "\n":
                self.row += 1
                self.lines += [[]] * (self.row == len(self.lines))
            for character in characters:
                line = self.lines[self.row]
                line += [(" ", "")] * (self.column + 1 - len(line))
                line[self.column] = (character, self.style)
                self.column += 1

    def texts(self) -> list[str]:
        """The lines with their styles as escape sequences, without the empty ones at the end."""
        texts = [
            "".join(
                f"{style}{''.join(character for character, _ in cells)}\x1b[0m"
                for style, cells in itertools.groupby(line, key=operator.itemgetter(1))
            )
            for line in self.lines
        ]
        while texts and not texts[-1]:
            texts.pop()
        return texts


def run(command: list[str]) -> Iterator[list[str]]:
    """Run a command on a terminal, and yield the lines of its screen after each of its writes."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    names = {"COLUMNS", "LINES", "NO_COLOR"}
    environment = {key: value for key, value in os.environ.items() if key not in names} | {"TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    screen = Screen()
    with open(leader, encoding="utf-8", errors="replace", newline="") as reader:
        try:
            while text := os.read(reader.fileno(), 65536).decode(errors="replace"):
                screen.feed(text)
                yield screen.texts()
        except OSError:  # the last process that had the terminal open has ended
            pass
    if code := process.wait():
        raise SystemExit(f"{shlex.join(command)} ended with exit code {code}")


def middle_of(screens: list[list[str]]) -> list[str]:
    """Return the end of the screen on which half of the tasks are done, and as many stages as possible run."""

    def rank(lines: list[str]) -> tuple[int, float]:
        found = TOTALS.fullmatch(Text.from_ansi(lines[-1]).plain.strip()) if lines else None
        if not found:
            return 0, 0.0
        running = sum(Text.from_ansi(line).plain[:1] in "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏" for line in lines[-SHOWN_LINES:-1] if line)
        return running, -abs(int(found[1]) / int(found[2]) - 0.5)

    return max(screens, key=rank)[-SHOWN_LINES:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command and its words")
    command = parser.parse_args().command
    screens = list(run(command))
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    for line in (f"$ {shlex.join(command)}", *middle_of(screens), "…", *screens[-1]):
        console.print(Text.from_ansi(line), soft_wrap=True)
    svg = console.export_svg(title="A build on a terminal", unique_id="terminal")
    # Without the fonts that rich loads from a server: a reader's browser has a monospaced one.
    svg = re.sub(r"\s*@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)
    PICTURE.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE), encoding="utf-8")
    print(f"wrote {Path(PICTURE).relative_to(ROOT)}, {len(svg) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
