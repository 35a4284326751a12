"""The lines and tables that `doit adopt` prints."""

import textwrap

from build_tasks.doit_plugin.adoption import Adoption
from build_tasks.text_table import format_table
from build_tasks.triton import config_fields

WIDTH = 80  # characters of a line


def describe(adoption: Adoption, with_fields: bool) -> str:
    """Return the lines about one model: what doit would build, what differs, or why it is left alone."""
    existing, spec = adoption.existing, adoption.spec
    if spec is None and not adoption.host:
        return _wrapped(f"{existing.name}: left alone: {adoption.reason}", "")
    rows = list(config_fields.differences(adoption.before, adoption.after))
    same = sum(before == after for _, before, after in rows)
    what = (
        f"{existing.model_format}, version {existing.version}" if spec else f"ensemble of the spec of {adoption.host}"
    )
    lines = [f"{existing.name}: {what}, {same} of {len(rows)} fields the same\n"]
    if with_fields:
        marked = [(path, before, after, "" if before == after else "differs") for path, before, after in rows]
        table = format_table(["field", "before", "after", ""], marked, left=("before", "after", ""))
        lines.append(textwrap.indent(table, "  ") + "\n")
    else:
        lines += [_wrapped(_difference(*row), "  ") for row in adoption.differences]
    lines += [_wrapped(f"not in a spec: {field}: {reason}", "  ") for field, reason in (spec.remarks if spec else [])]
    newest = max(existing.versions, default=0)
    if adoption.host and adoption.new_version != newest:
        lines.append(_wrapped(f"version: {newest}, becomes {adoption.new_version}, as that of {adoption.host}", "  "))
    older = [version for version in existing.versions if spec and version != existing.version]
    if older:
        numbers = ", ".join(map(str, older))
        lines.append(_wrapped(f"versions: {numbers} stay where they are, since a spec describes one artifact", "  "))
    return "".join(lines)


def _difference(path: str, before: str, after: str) -> str:
    if not after:
        return f"lost: {path} = {before}"
    return f"added: {path} = {after}" if not before else f"differs: {path} = {before}, becomes {after}"


def _wrapped(text: str, indent: str) -> str:
    """Return a text in lines of at most WIDTH characters, which do not break words."""
    return (
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=indent,
            subsequent_indent=f"{indent}    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        + "\n"
    )


def summary(path: str, adoptions: list[Adoption]) -> str:
    """Return how many models doit can build, and what to type next."""
    count = sum(not adoption.reason for adoption in adoptions)
    text = f"\n{count} of {len(adoptions)} models can be built by doit. Nothing was written."
    return f"{text}\nnext: `doit adopt {path} --write` writes their specs\n" if count else f"{text}\n"
