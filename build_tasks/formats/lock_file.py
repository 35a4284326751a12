"""The lock file of a model: the nodes that `doit repair` excludes from a precision.

    repair ─► write_lock ─► models/<model>/keep_fp32.lock ─► locked_nodes ─► precision

The user commits it with the spec.
"""

import json
import re
import tomllib
from typing import TYPE_CHECKING

from msgspec import Struct, convert

from build_tasks.errors import UserError

if TYPE_CHECKING:
    import onnx

LOCK_FILE = "keep_fp32.lock"  # beside the spec

HEADER = """\
# Nodes that are excluded from a precision so that the accuracy gate holds: fp32 in fp16 and bf16 graphs, not quantized
# in int8 and fp8 graphs. `doit repair:{}` found them. This file is a part of the spec: commit it. To search for other
# nodes, delete the file and repeat the command.
"""


class LockedNodes(Struct, forbid_unknown_fields=True):
    """The table of a precision in the lock file."""

    keep_fp32: list[str] = []


def read_lock(path: str) -> dict[str, LockedNodes]:
    """Return the tables of a lock file by precision. Without a file there are none.

    Raises:
        UserError: If the file is not a lock file.
    """
    try:
        with open(path, "rb") as file:
            return convert(tomllib.load(file), dict[str, LockedNodes])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:  # of the file, of TOML or UTF-8, of msgspec, of nesting
        raise UserError(
            f"{path} is not what `doit repair` writes ({error}): delete it and run `doit repair` again"
        ) from error


def locked_nodes(path: str, precision: str, graph: "onnx.ModelProto") -> list[str]:
    """Return the nodes that the lock file excludes from a precision.

    Raises:
        UserError: If the graph does not have one of them.
    """
    names = read_lock(path).get(precision, LockedNodes()).keep_fp32
    nodes = {node.name for node in graph.graph.node}
    if missing := [name for name in names if name not in nodes]:
        raise UserError(
            f"{path}: {precision}: the graph has no node {missing[0]!r}, because it has changed; delete the file and "
            "run `doit repair` again"
        )
    return names


def overwrite_error(path: str) -> str | None:
    """Return why a lock file must not be rewritten: it has comments of a person. None if nothing would be lost."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        return None
    own_header = re.compile(r"(#.*\n)*").match(text)
    header = own_header.group() if own_header and "`doit repair:" in own_header.group() else ""
    if not re.search(r'^\s*#|["\]),]\s*#', text[len(header) :], re.MULTILINE):
        return None
    return f"{path} has comments that `doit repair` did not write, and is not replaced: move it away, or delete it"


def write_lock(path: str, model: str, tables: dict[str, LockedNodes]) -> None:
    """Write the lock file. A precision without excluded nodes gets no table."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(HEADER.format(model))
        for name, table in sorted(tables.items()):
            if table.keep_fp32:
                lines = "".join(f"    {json.dumps(node)},\n" for node in table.keep_fp32)
                file.write(f"\n[{name}]\nkeep_fp32 = [\n{lines}]\n")
