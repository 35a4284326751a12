"""The locks fit requirements.txt, and pip can check every package that they name."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.project import ROOT

LOCKS = sorted((ROOT / "locks").glob("python-*.txt"))


def pinned(text: str) -> set[tuple[str, str]]:
    """The name and version of each package that a file pins. Two may be for different platforms."""
    lines = re.findall(r"^([A-Za-z0-9][^#;\n\\]*==[^#;\s\\]+)", text, re.MULTILINE)
    requirements = [Requirement(line) for line in lines]
    return {(canonicalize_name(each.name), str(each.specifier)) for each in requirements}


def test_every_supported_python_has_a_lock() -> None:
    assert [path.stem.removeprefix("python-") for path in LOCKS] == ["3.11", "3.12", "3.13"]


@pytest.mark.parametrize("lock", LOCKS, ids=[path.stem for path in LOCKS])
def test_a_lock_fits_requirements_and_has_hashes(lock: Path) -> None:
    text = lock.read_text()
    required = pinned((ROOT / "requirements.txt").read_text())
    locked = pinned(text)
    assert required <= locked, f"run .ci/lock: {required - locked}"
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(entries) >= len(locked)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    assert "://" not in text, "a lock names no host"
