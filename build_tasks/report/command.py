"""doit report: the state of the whole build on one page -> build/report.html

    specs, build/, doit's records ─► model_page.py: each model as a record ─► templates/report.html.j2 ─► one file
                                               └─► snapshot_diff.py: the changes since the last report

It builds nothing, shows all files in their current state, and uses no network, except to look stages up in the build
cache if BUILD_CACHE names one.
"""

import json
import os
import re
import time
from typing import Any

import msgspec
from doit.cmd_base import DoitCmdBase
from doit.control import TaskControl
from doit.exceptions import InvalidCommand

from build_tasks.doit_plugin import dry_run, failures, standard_streams
from build_tasks.doit_plugin.command_line import RecordsCommand
from build_tasks.errors import message_line, with_suggestion
from build_tasks.paths import BUILD
from build_tasks.report import charts, overview, snapshot_diff
from build_tasks.report.model_page import STATES, model_page, task_row
from build_tasks.report.records import ModelPage, Snapshot
from build_tasks.runtime import atomic_files
from build_tasks.runtime.stage import stage_of
from build_tasks.spec.model import Model
from build_tasks.text_table import format_size
from build_tasks.verification import gate

PAGE = f"{BUILD}/report.html"
TEMPLATES = "build_tasks/report/templates"


class Report(RecordsCommand, DoitCmdBase):  # type: ignore[misc]  # doit has no types
    """The command `doit report`."""

    doc_purpose = "write the state of the build as one page, build/report.html"
    doc_usage = "[MODEL ...]"
    doc_description = "Nothing is built. Without a MODEL, the page shows all models."
    cmd_options = (
        {
            "name": "markdown", "long": "markdown", "type": bool, "default": False,
            "help": "also print the table of models as Markdown, for the summary of a CI job",
        },
    )  # fmt: skip

    def _execute(self, markdown: bool, pos_args: list[str]) -> int:
        tasks: dict[str, Any] = TaskControl(self.task_list).tasks
        models = {stage.model.name: stage.model for stage in map(stage_of, tasks.values()) if stage}
        for name in pos_args:
            if name not in models:
                raise InvalidCommand(f"expected the name of a model, found {with_suggestion(name, models)}")
        try:
            pages = self.write_page(tasks, models, pos_args)
        except OSError as error:  # for example a file in build/ that cannot be read
            raise InvalidCommand(message_line(f"{PAGE} was not written: {error}")) from error
        if markdown:
            standard_streams.keep_lines_whole()
        self.outstream.write(overview.format_markdown(pages) if markdown else f"{PAGE}\n")
        return 0

    def write_page(self, tasks: dict[str, Any], models: dict[str, Model], requested: list[str]) -> list[ModelPage]:
        """Write the page and the snapshot, and return what the page shows."""
        before, failed = snapshot_diff.read_snapshot(), failures.read()
        dependencies = {name: set(task.task_dep) for name, task in tasks.items()}
        pages = []
        for name in [name for name in models if not requested or name in requested]:
            order = {task: index for index, task in enumerate(tasks[name].task_dep)}
            steps = dry_run.plan_steps(tasks, [name], self.dep_manager, with_cache=True)
            steps = [step for step in steps if step.stage]
            steps.sort(key=lambda step: order.get(step.task, len(order)))
            rows = [task_row(step, self.dep_manager.get_values(step.task), failed.get(step.task)) for step in steps]
            pages.append(model_page(models[name], dependencies, rows, before))
        written = time.time()
        write_files(
            render(pages, before.written, written), snapshot_diff.next_snapshot(before, pages, written, [*models])
        )
        return pages


def write_files(html: str, snapshot: Snapshot) -> None:
    """Write the page and the snapshot, each as a whole.

    The page comes first: if the snapshot is lost, the next report shows the same changes once more.
    """
    snapshot_text = json.dumps(msgspec.to_builtins(snapshot), indent=1)
    with atomic_files.scratch_dir() as folder:
        for path, text in ((PAGE, html), (snapshot_diff.SNAPSHOT, snapshot_text)):
            draft = f"{folder}/{os.path.basename(path)}"
            # A path may hold bytes that are not UTF-8.
            with open(draft, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            atomic_files.flush(draft)
            atomic_files.replace(draft, path)


def render(pages: list[ModelPage], before: float | None, written: float) -> str:
    """The page as HTML.

    Args:
        before: When the last report was written, in seconds since 1970; None if this is the first one.
        written: The same of this report.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # names, labels and paths come from the user
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": format_size,
        "time": format_time,
        "code": format_code,
        "metric": gate.format_metric,
        "seconds": format_seconds,
        "accuracy": overview.accuracy_text,
        "speed": overview.speed_text,
        "served": overview.served_text,
        "bom_link": overview.bom_link,
        "next_steps": overview.next_steps,
        "breakable": breakable,
    }
    counts = {state: sum(task.state == state for page in pages for task in page.tasks) for state in STATES}
    return environment.get_template("report.html.j2").render(
        project=os.path.basename(os.getcwd()),
        pages=pages,
        counts=counts,
        before=before,
        written=written,
        box=(charts.BOX_WIDTH, charts.BOX_HEIGHT),
    )


def format_seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.1f} s"


def breakable(name: str) -> Any:
    """A name as HTML that may be broken after an underscore, so that a table fits a phone."""
    from markupsafe import Markup, escape

    return Markup(str(escape(name)).replace("_", "_<wbr>"))


def format_code(message: str) -> Any:
    """A message as HTML, with the text in backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(message))))


def format_time(seconds: float) -> str:
    """A time in seconds since 1970, as local time with its offset from UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))
