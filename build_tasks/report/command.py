"""doit report: everything that is known of the build, on one page -> build/report.html

    specs, build/, doit's records ─► card.py: each model as plain data ─► templates/report.html.j2 ─► one file
                                               └─► since.py: what is different from the last report

It builds nothing, shows what is there, in whatever state that is, and asks the network for nothing.
"""

import json
import os
import re
import time
from typing import Any

from doit.cmd_base import DoitCmdBase
from doit.control import TaskControl
from doit.exceptions import InvalidCommand

from build_tasks.doit_plugin import dry_run
from build_tasks.errors import with_suggestion
from build_tasks.paths import BUILD
from build_tasks.report import snapshot_diff
from build_tasks.report.model_page import STATES, Card, card, told
from build_tasks.runtime import atomic_files
from build_tasks.runtime.stage import stage_of
from build_tasks.text_table import format_size
from build_tasks.verification import gate

PAGE = f"{BUILD}/report.html"
TEMPLATES = "build_tasks/report/templates"


class Report(DoitCmdBase):  # type: ignore[misc]  # doit has no types
    """The command."""

    doc_purpose = "write all that is known of the build as one page, build/report.html"
    doc_usage = "[MODEL ...]"
    doc_description = "Nothing is built. Without a MODEL the page is about all of them."
    cmd_options = ()

    def _execute(self, pos_args: list[str]) -> int:
        tasks: dict[str, Any] = TaskControl(self.task_list).tasks
        models = {stage.model.name: stage.model for stage in map(stage_of, tasks.values()) if stage}
        for name in pos_args:
            if name not in models:
                raise InvalidCommand(f"expected the name of a model, found {with_suggestion(name, models)}")
        chosen = [model for name, model in models.items() if not pos_args or name in pos_args]
        cards = []
        for model in chosen:
            order = {name: place for place, name in enumerate(tasks[model.name].task_dep)}
            steps = [step for step in dry_run.plan_steps(tasks, [model.name], self.dep_manager) if step.stage]
            steps.sort(key=lambda step: order.get(step.task, len(order)))
            known = [told(step, self.dep_manager.get_values(step.task)) for step in steps]
            cards.append(card(model, tasks, known))
        before = snapshot_diff.last()
        for each in cards:
            each["changes"] = snapshot_diff.changes(before, each["name"], each["facts"])
        written = time.time()
        _write(page(cards, before.get("written"), written), snapshot_diff.noted(before, cards, written, [*models]))
        self.outstream.write(f"{PAGE}\n")
        return 0


def _write(html: str, snapshot: dict[str, Any]) -> None:
    """Both files whole, the page first: if the other is lost, the next report tells the same changes once more."""
    with atomic_files.scratch_dir() as folder:
        for path, text in ((PAGE, html), (snapshot_diff.SNAPSHOT, json.dumps(snapshot, indent=1))):
            draft = f"{folder}/{os.path.basename(path)}"
            with open(draft, "w", encoding="utf-8", errors="backslashreplace") as file:  # paths may be of another age
                file.write(text)
            atomic_files.flush(draft)
            atomic_files.replace(draft, path)


def page(cards: list[Card], before: float | None, written: float) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # names, labels and paths are the user's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": format_size,
        "moment": moment,
        "marked": marked,
        "figure": gate.format_metric,
        "seconds": seconds,
    }
    counts = {state: sum(step["state"] == state for card in cards for step in card["steps"]) for state in STATES}
    return environment.get_template("report.html.j2").render(
        project=os.path.basename(os.getcwd()), cards=cards, counts=counts, before=before, written=written
    )


def seconds(duration: float | None) -> str:
    return "–" if duration is None else f"{duration:.1f} s"


def marked(text: str) -> Any:
    """A message as it is shown on a terminal, with what stands in backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def moment(stamp: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(stamp))
