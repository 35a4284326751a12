"""cache: `doit cache` tells what a build cache holds, `doit cache prune` removes what is old, `verify` reads it all

BUILD_CACHE ─► actions: age, stage ─┬─► blobs that they name: size ─► a table
                                    ├─► prune: the oldest actions go, then the blobs that no action names
                                    └─► verify: every blob against its sha256
"""

import contextlib
import os
import re
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from doit.cmd_base import Command
from doit.exceptions import InvalidCommand

from build_tasks.doit_plugin.command_line import OneLineMistakes
from build_tasks.errors import UserError, with_suggestion
from build_tasks.json_files import read_json
from build_tasks.runtime import build_cache, cache_entries
from build_tasks.runtime.cache_entries import Action, Blob
from build_tasks.runtime.cache_storage import DRAFTS, DamagedError, Entry, Storage, StorageError
from build_tasks.text_table import format_size, format_table

WORDS = ("prune", "verify")
DAY = 86400.0  # seconds
# A writer stores the blobs of an action before the action. Until then, nothing names them.
GRACE = DAY
LISTING = 300.0  # seconds that a list of all files may take


class Cache(OneLineMistakes, Command):  # type: ignore[misc]  # doit has no types
    """The command."""

    takes_names_first = True
    doc_purpose = "size, age and use of the build cache; `prune` and `verify` it"
    doc_usage = "[prune [--older 30d] [--size 50GB] | verify]"
    doc_description = (
        "BUILD_CACHE names the cache, a folder or a bucket (docs/how-to/build-cache.md). `prune` removes results that "
        "no build has used for the time of --older, then the oldest ones until the rest fits into --size, and the "
        "files that no result names any more. `verify` reads every file, and removes what is damaged; exit code 1 if "
        "there was any. With BUILD_CACHE_MODE=read, neither removes anything."
    )
    cmd_options = (
        {"name": "older", "long": "older", "type": str, "default": "", "help": "for prune: 12h, 30d, 8w"},
        {"name": "size", "long": "size", "type": str, "default": "", "help": "for prune: 500MB, 50GB, 1TiB"},
    )

    def execute(self, params: dict[str, Any], args: list[str]) -> int:
        if len(args) > 1 or args[:1] not in ([], *([word] for word in WORDS)):
            raise InvalidCommand(f"expected prune or verify, found {with_suggestion(' '.join(args), WORDS)}")
        if args != ["prune"] and (params["older"] or params["size"]):
            raise InvalidCommand("--older and --size belong to `doit cache prune`")
        try:
            older, size = parse_duration(params["older"]), parse_size(params["size"])
            if not os.environ.get(build_cache.URL):
                raise UserError(f"{build_cache.URL} is not set; it names the cache, file:///mnt/cache for example")
            build_cache.check_variables()
            writes = os.environ.get(build_cache.MODE) != build_cache.READ
            content = read_content(Storage(os.environ[build_cache.URL]))
            if args == ["prune"]:
                return prune(content, older, size, writes)
            return verify(content, writes) if args == ["verify"] else show(content)
        except UserError as error:
            raise InvalidCommand(str(error)) from error
        except StorageError as error:
            print(f"doit cache: {error}")
            return 1


class Content(NamedTuple):
    """What a cache holds.

    actions: By path, with the time of the last use; None stands for a file that is no action.
    blobs: The files with content, by path.
    """

    storage: Storage
    actions: dict[str, tuple[Action | None, float]]
    blobs: dict[str, Entry]


def read_content(storage: Storage) -> Content:
    """Return all that is in a cache; each action is read."""
    cache = build_cache.BuildCache(os.environ[build_cache.URL], writes=False)
    with contextlib.suppress(FileNotFoundError):  # a listing of fsspec hides that a server does not answer
        storage.read(f"{cache_entries.FORMAT}/anything", 0)
    actions = {}
    for path, entry in storage.find(cache_entries.ACTIONS, LISTING).items():
        action = cache.read_action(path)
        # The clock of the storage, where there is one, and not those of the machines that write.
        actions[path] = action, entry.modified or (action.time if action else 0.0)
    return Content(storage, actions, storage.find(cache_entries.BLOBS, LISTING))


def show(content: Content) -> int:
    """Print the results by stage, and what this checkout got from the cache. Returns the exit code."""
    groups: dict[str, list[tuple[Action, float]]] = {}
    unreadable = sum(action is None for action, _ in content.actions.values())
    for action, used in content.actions.values():
        if action is not None:
            groups.setdefault(action.stage, []).append((action, used))
    now = time.time()
    rows = []
    for stage, results in sorted(groups.items()):
        actions, ages = [action for action, _ in results], [now - used for _, used in results]
        size = format_size(sum(action.size for action in actions))
        work = f"{sum(action.seconds for action in actions):.1f} s"
        rows.append([stage, str(len(actions)), size, work, *(format_age(age) for age in (max(ages), min(ages)))])
    if rows:
        print(format_table(["stage", "results", "size", "work", "oldest use", "newest use"], rows))
    stored = sum(entry.size for entry in content.blobs.values())
    print(
        f"{content.storage.url}: {len(content.actions)} results, {len(content.blobs)} files, {format_size(stored)}"
        + (f"; {unreadable} of the results cannot be read, `doit cache verify` removes them" if unreadable else "")
    )
    usage = read_json(build_cache.USAGE) if os.path.exists(build_cache.USAGE) else {}
    if usage:
        tries = usage["fetched"] + usage["missed"]
        print(
            f"this checkout: {usage['fetched']:.0f} of {tries:.0f} results were there, "
            f"{format_size(int(usage['read']))} in place of {usage['seconds']:.1f} s of work; "
            f"{usage['stored']:.0f} stored, {usage['refused']:.0f} damaged"
        )
    return 0


def prune(content: Content, older: float | None, size: int | None, writes: bool) -> int:
    """Remove results and files, and print how many.

    Args:
        older: Seconds since the last use after which a result goes.
        size: Bytes of blobs that stay at most.
        writes: Whether anything is removed at all.
    Returns: The exit code.
    """
    now = time.time()
    by_use = sorted(content.actions.items(), key=lambda item: item[1][1], reverse=True)
    kept: dict[str, Action] = {}
    needed: dict[str, int] = {}
    for path, (action, used) in by_use:
        if action is None or (older is not None and now - used > older):
            continue
        more = {blob.path: blob.stored_size for blob in action.blobs if blob.path not in needed}
        if size is not None and sum(needed.values()) + sum(more.values()) > size:
            break  # the older ones go too, also smaller ones: what was used last stays
        kept[path] = action
        needed |= more
    actions = [path for path in content.actions if path not in kept]
    removed = {path for path in actions if (action := content.actions[path][0])}
    named = {blob.path for path in removed for blob in content.actions[path][0].blobs}  # type: ignore[union-attr]
    blobs = {
        path: entry
        for path, entry in content.blobs.items()
        if path not in needed and (path in named or entry.modified is None or now - entry.modified > GRACE)
    }
    drafts = [p for p, entry in content.storage.find(DRAFTS, LISTING).items() if now - (entry.modified or now) > GRACE]
    if writes:
        content.storage.remove([*actions, *blobs, *drafts])
    gone = format_size(sum(entry.size for entry in blobs.values()))
    left = format_size(sum(entry.size for path, entry in content.blobs.items() if path not in blobs))
    word = "removed" if writes else f"{build_cache.MODE}={build_cache.READ}: not removed"
    print(f"{word} {len(actions)} results and {len(blobs)} files ({gone}); {len(kept)} results stay ({left})")
    return 0


def verify(content: Content, writes: bool) -> int:
    """Read every blob, and print those that are damaged or missing. Returns the exit code."""
    blobs = {blob.path: blob for action, _ in content.actions.values() if action for blob in action.blobs}
    damaged = {}
    for path, blob in blobs.items():
        if path not in content.blobs:
            damaged[path] = "missing"
        elif reason := damage_of(content.storage, blob):
            damaged[path] = reason
    unreadable = [path for path, (action, _) in content.actions.items() if action is None]
    lines = [f"{path}: {reason}" for path, reason in damaged.items()] + [f"{path}: no result" for path in unreadable]
    if writes:
        naming = [p for p, (action, _) in content.actions.items() if action and names_any(action, damaged)]
        content.storage.remove([*naming, *unreadable, *(path for path in damaged if path in content.blobs)])
    for line in lines:
        print(f"{line}{'; removed, with the results that name it' if writes else ''}")
    print(f"{len(blobs)} files and {len(content.actions)} results read, {len(lines)} damaged")
    return 1 if lines else 0


def names_any(action: Action, paths: Iterable[str]) -> bool:
    """Return whether an action names one of these blobs."""
    return not {blob.path for blob in action.blobs}.isdisjoint(paths)


def damage_of(storage: Storage, blob: Blob) -> str:
    """Return what is wrong with a blob, "" if nothing is."""
    verifier = cache_entries.Verifier(blob, lambda chunk: None)
    try:
        storage.stream(blob.path, blob.stored_size, verifier)
        verifier.finish()
    except DamagedError as error:
        return str(error)
    except FileNotFoundError:
        return "missing"
    return ""


def parse_duration(text: str) -> float | None:
    """Return the seconds of "12h", "30d" or "8w"; None for "". Case and a space do not matter.

    Raises:
        UserError: If it is something else.
    """
    units = {"h": 3600.0, "d": DAY, "w": 7 * DAY}
    return _parse(text, units, "--older: expected a number of hours, days or weeks, such as 12h, 30d or 8w")


def parse_size(text: str) -> int | None:
    """Return the bytes of "500MB", "50 GiB" or "1t"; None for "". Case, a space and the final B do not matter.

    Raises:
        UserError: If it is something else.
    """
    units = {f"{letter}{end}": 1000.0**power for power, letter in enumerate("kmgt", 1) for end in ("", "b")}
    units |= {f"{letter}i{end}": 1024.0**power for power, letter in enumerate("kmgt", 1) for end in ("", "b")}
    value = _parse(text, units, "--size: expected a size such as 500MB, 50GB or 1TiB")
    return None if value is None else int(value)


def _parse(text: str, units: dict[str, float], expected: str) -> float | None:
    if not text:
        return None
    found = re.fullmatch(rf"(\d{{1,9}}(?:\.\d{{1,9}})?) ?({'|'.join(units)})", text.strip().lower(), re.ASCII)
    if found is None:
        raise UserError(f"{expected}, found {text!r}")
    return float(found[1]) * units[found[2]]


def format_age(seconds: float) -> str:
    """Return a time that has passed, "3 h" for example."""
    for unit, factor in (("days", DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.0f} {unit}"
    return "now"
