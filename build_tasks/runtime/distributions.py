"""Versions of installed distributions."""

import functools
import importlib.metadata
import re


@functools.cache
def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None if it is not installed."""
    try:
        installed = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    # `installed.version` would parse the whole file, README included.
    header = re.search(r"^Version: *(\S+)", installed.read_text("METADATA") or "", re.MULTILINE)
    return header[1] if header else installed.version


def versions(tools: tuple[str, ...]) -> dict[str, str]:
    """The versions of the distributions, without those that are not installed."""
    return {tool: version for tool in tools if (version := installed_version(tool)) is not None}
