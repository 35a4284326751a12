"""Limits of time and size, which environment variables set: a build ends, and unpacks no more than it should.

BUILD_DOWNLOAD_SIZE, BUILD_DOWNLOAD_TIME ─► a download (formats/weight_sources.py)
BUILD_STAGE_TIME                         ─► the process of a stage (worker.py)
BUILD_UNPACKED_SIZE                      ─► check_archive: checkpoints and .npz files, before they are unpacked
"""

import math
import os

from build_tasks.errors import UserError

DOWNLOAD_SIZE = "BUILD_DOWNLOAD_SIZE"  # that one download may have
DOWNLOAD_TIME = "BUILD_DOWNLOAD_TIME"  # that one download may take, with its repetitions
STAGE_TIME = "BUILD_STAGE_TIME"  # that the process of one stage may take
UNPACKED_SIZE = "BUILD_UNPACKED_SIZE"  # that an archive may unpack to, if that is more than its own size
GB, MINUTES = "GB", "minutes"
DEFAULTS = {
    DOWNLOAD_SIZE: (100.0, GB),
    DOWNLOAD_TIME: (180.0, MINUTES),
    STAGE_TIME: (720.0, MINUTES),
    UNPACKED_SIZE: (4.0, GB),
}
ADVICE = "set it to more, or to 0 for no limit"


def limit(variable: str) -> float:
    """Return the limit that an environment variable sets, in GB or minutes; infinity if it is off.

    Raises:
        UserError: If the variable is not a number.
    """
    default, unit = DEFAULTS[variable]
    text = os.environ.get(variable, str(default))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise UserError(f"{variable}: expected a number of {unit}, or 0 for no limit, found {text!r}")
    return value or math.inf


def check_variables() -> None:
    """Raise UserError if a limit is not a number."""
    for variable in DEFAULTS:
        limit(variable)


def check_unpacked(path: str, size: int, what: str) -> None:
    """Raise UserError if something has unpacked to more bytes than it may.

    Args:
        path: The file with which the size was reached.
        size: Bytes.
        what: What has this size.
    """
    allowed = limit(UNPACKED_SIZE)
    if size > allowed * 1e9:
        raise UserError(
            f"{path}: {what} have {size / 1e9:,.2f} GB, more than the {allowed:g} GB that {UNPACKED_SIZE} "
            f"allows; {ADVICE}"
        )


def check_archive(path: str) -> None:
    """Raise UserError if a file is a zip archive that unpacks to more than it may.

    An archive without compression, as PyTorch writes it, may be of any size: it never unpacks to more than its size.
    """
    import zipfile

    with open(path, "rb") as file:
        if file.read(2) != b"PK":  # the readers of checkpoints and of .npz files take nothing else for a zip archive
            return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as a zip archive: {error}; copy it again if it is cut off") from error
    size, allowed = os.path.getsize(path), limit(UNPACKED_SIZE)
    if unpacked > max(size, allowed * 1e9):
        raise UserError(
            f"{path}: {size / 1e6:,.1f} MB that unpack to {unpacked / 1e9:,.2f} GB, more than the {allowed:g} GB that "
            f"{UNPACKED_SIZE} allows; {ADVICE}"
        )
