"""Versions of installed distributions."""

import functools
import importlib.metadata
import re


@functools.cache
def installed_version(distribution: str) -> str | None:
    """The version of a distribution that is installed here, None where it is absent."""
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    # `found.version` parses the whole file, README included.
    header = re.search(r"^Version: *(\S+)", found.read_text("METADATA") or "", re.MULTILINE)
    return header[1] if header else found.version


def versions(tools: tuple[str, ...]) -> dict[str, str]:
    """The versions of those distributions that are installed here."""
    return {tool: version for tool in tools if (version := installed_version(tool)) is not None}
