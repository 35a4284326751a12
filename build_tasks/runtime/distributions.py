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
    """The versions of the distributions, without those that are not installed.

    They have no local label: torch 2.14.1+cpu and 2.14.1+cu130 run the same code on a CPU, on which all stages use it.
    Stages that depend on a GPU have the GPU and TensorRT's version in their fingerprint; see hardware.py.
    """
    return {tool: version.partition("+")[0] for tool in tools if (version := installed_version(tool)) is not None}
