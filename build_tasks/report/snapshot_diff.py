"""What is different from the last report: a snapshot of each model in build/report.json, and differences in words."""

from typing import Any

from build_tasks.json_files import read_json
from build_tasks.paths import BUILD

SNAPSHOT = f"{BUILD}/report.json"
FIGURES = ("measure", "accuracy", "summary")  # stages that write what is compared as errors and verdicts
NOISE = 1.25, 1.0  # a duration is told that is so many times another, and so many seconds from it

Facts = dict[str, dict[str, Any]]


def last() -> dict[str, Any]:
    """The snapshot of the last report; empty where there is none, or none that can be read."""
    try:
        found = read_json(SNAPSHOT)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.keys() == {"written", "models"} else {}


def facts(steps: list[dict[str, Any]], judged: list[dict[str, Any]]) -> Facts:
    """What of a model is compared."""
    tools: dict[str, set[str]] = {}
    for step in steps:
        for tool, version in step["tools"].items():
            tools.setdefault(tool, set()).add(version)
    return {
        "files": {s["file"]: [s["sha256"], s["size"]] for s in steps if s["sha256"] and s["stage"] not in FIGURES},
        "errors": {
            row["file"]: max(output["relative_l2"] for output in row["outputs"].values())
            for row in judged
            if not any("wrong" in output for output in row["outputs"].values())
        },
        "verdicts": {row["file"]: row["status"] for row in judged},
        "tools": {tool: ", ".join(sorted(versions)) for tool, versions in sorted(tools.items())},
        "seconds": {step["task"]: step["seconds"] for step in steps if step["seconds"] is not None},
    }


def noted(before: dict[str, Any], cards: list[dict[str, Any]], written: float, models: list[str]) -> dict[str, Any]:
    """The snapshot to keep: of the models that are not on the page the one that was, as long as they have a spec."""
    kept = {name: facts for name, facts in before.get("models", {}).items() if name in models}
    return {"written": written, "models": {**kept, **{card["name"]: card["facts"] for card in cards}}}


def changes(before: dict[str, Any], name: str, now: Facts) -> list[tuple[str, str]] | None:
    """(what, how it changed) since the last report; None where this is the first of the model."""
    then: Facts | None = before.get("models", {}).get(name)
    if then is None or then.keys() != TOLD.keys():  # the second: of another version of this page
        return None
    found = []
    for kind, tell in TOLD.items():
        old, new = then[kind], now[kind]
        for key in (*new, *(key for key in old if key not in new)):
            if (told := tell(old.get(key), new.get(key))) is not None:
                found.append((key, told))
    return found


def _file(old: Any, new: Any) -> str | None:
    if told := _come_or_gone(old, new):
        return told
    if old[0] == new[0]:
        return None
    size = f", {old[1]} → {new[1]} bytes" if old[1] != new[1] else ""
    return f"sha256 {old[0][:8]}… → {new[0][:8]}…{size}"


def _error(old: Any, new: Any) -> str | None:
    if old is None or new is None:
        return None  # told with the file
    before, after = f"{old:.1e}", f"{new:.1e}"
    return f"error {before} → {after}" if before != after else None


def _verdict(old: Any, new: Any) -> str | None:
    return f"{old} → {new}" if None not in (old, new) and old != new else None


def _version(old: Any, new: Any) -> str | None:
    return _come_or_gone(old, new) or (f"{old} → {new}" if old != new else None)


def _seconds(old: Any, new: Any) -> str | None:
    times, apart = NOISE
    if old is None or new is None or abs(new - old) < apart or max(old, new) < times * min(old, new):
        return None
    return f"{old:.1f} s → {new:.1f} s"


def _come_or_gone(old: Any, new: Any) -> str | None:
    return "new" if old is None else "gone" if new is None else None


TOLD = {"files": _file, "errors": _error, "verdicts": _verdict, "tools": _version, "seconds": _seconds}
