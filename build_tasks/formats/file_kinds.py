"""What a file of the user is, found from its bytes without loading it."""

from collections.abc import Iterator
from typing import IO

from build_tasks.errors import UserError, listed

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # its first line; source: git-lfs, docs/spec.md
JSON = "text in JSON"
# What lies on people's disks under the name of a checkpoint or of an ONNX file, by its first bytes in lower case.
OTHER_KINDS = {
    b"<!doctype html": "a web page: download the file again, perhaps with a login",
    b"<html": "a web page: download the file again, perhaps with a login",
    b"<?xml": "an answer in XML: download the file again, perhaps with a login",
    b'{"': JSON,
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"\x89hdf\r\n\x1a\n": "a file of HDF5, as Keras writes it: save the weights as .npz or .safetensors",
    b"gguf": "a GGUF file, whose weights are quantized for llama.cpp",
    b"\x93numpy": "one array of NumPy: save all arrays with numpy.savez, as .npz",
}
TAR_OFFSET, TAR = 257, b"ustar"
HEAD = 512  # bytes that show the kind

# Members of PyTorch's archives, below one folder, that only one kind of archive has.
# Source: torch/jit/_serialization.py, torch/export/pt2_archive/constants.py, torch/serialization.py.
TORCHSCRIPT, EXPORTED, AOTI_PACKAGE = "a TorchScript file", "a torch.export file", "an AOTInductor package"
MEMBERS = {
    "constants.pkl": TORCHSCRIPT,
    "models/model.json": EXPORTED,
    "serialized_exported_program.json": EXPORTED,
}
AOTI = "data/aotinductor/"  # a folder of archives with code that was compiled for one machine

CHECKPOINTS = {
    ".safetensors": "a safetensors file",
    ".pth": "a file that torch.save wrote",
    ".npz": "a file of NumPy's arrays",
}
PICKLE_MARKS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))  # how a pickle of a protocol begins
MAX_HEADER = 100_000_000  # bytes of the header of a safetensors file; source: safetensors' documentation
PICKLE_OF_TORCH = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the number with which a file before PyTorch 1.6 begins
PICKLES = 5  # at the beginning of a checkpoint in the format before PyTorch 1.6; source: torch/serialization.py
MAX_NAME = 1000  # characters of the name of a class or function in a pickle


def reject_other_kinds(path: str, expected: str = "weights") -> None:
    """Raise UserError if a file is empty, a pointer of Git LFS, a web page, or of another kind that is no source.

    Other problems are not reported.

    Args:
        expected: What the file should be, for the message.
    """
    if (head := _head(path)) is None:
        return
    if head.startswith(LFS_POINTER):
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its repository")
    begin = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = next((kind for mark, kind in OTHER_KINDS.items() if begin.startswith(mark)), None)
    if kind == JSON and path.endswith(".json"):
        return
    if not head:
        kind = "empty"
    elif head[TAR_OFFSET:].startswith(TAR):
        kind = "a tar archive: unpack it"
    elif not any(head):
        kind = "a file that begins with zeros: copy or download it again, since the transfer was cut off"
    if kind:
        raise UserError(f"{path} cannot be read as {expected}: it is {kind}")


def reject_other_archives(path: str) -> None:
    """Raise UserError if a file is a zip archive that neither PyTorch nor NumPy wrote.

    Other problems are not reported.
    """
    names = _names_in_archive(path)
    if names and not any(name.endswith(("data.pkl", ".npy")) for name in names):
        raise UserError(
            f"{path} cannot be read as weights: it is a zip archive of {listed(names)}: unpack it, and name the "
            "checkpoint in it"
        )


def reject_other_suffix(path: str) -> None:
    """Raise UserError if a checkpoint has the suffix of another kind of checkpoint, by which its reader is chosen.

    Other problems are not reported.
    """
    head, names, found = _head(path) or b"", _names_in_archive(path), None
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < MAX_HEADER:
        found = ".safetensors"
    elif head.startswith(PICKLE_MARKS) or any(name.endswith("data.pkl") for name in names):
        found = ".pth"
    elif any(name.endswith(".npy") for name in names):
        found = ".npz"
    named = next((suffix for suffix in (".safetensors", ".npz") if path.endswith(suffix)), ".pth")
    if found and found != named:
        raise UserError(f"{path} is {CHECKPOINTS[found]}: let its name end with {found}")


def program_kind(path: str) -> str | None:
    """Return what a file with a network of PyTorch is; None for a checkpoint, and for every other file."""
    names = _names_in_archive(path)
    if any(AOTI in name for name in names):
        return AOTI_PACKAGE
    inner = {name.partition("/")[2] for name in names} | set(names)
    return next((kind for member, kind in MEMBERS.items() if member in inner), None)


def _head(path: str) -> bytes | None:
    """Return the first bytes of a file, None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(HEAD)
    except OSError:
        return None


def is_other_pickle(path: str) -> bool:
    """Return whether a file is a pickle that torch.save did not write."""
    head = _head(path) or b""
    return head.startswith(PICKLE_MARKS) and PICKLE_OF_TORCH not in head[:32]


def _names_in_archive(path: str) -> list[str]:
    """Return the names of the files in a ZIP archive; none for every other file."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return []


def reject_long_names(path: str) -> None:
    """Raise UserError if a checkpoint names a class or function with a very long name. No code in it is executed.

    PyTorch refuses such a class, too, but searches its own message about it in a time that grows with the square of the
    length: 16 s for 200,000 characters. Other problems are not reported.
    """
    import pickletools

    with open(path, "rb") as file:
        for pickle in _pickles(file):
            try:
                for opcode, argument, _ in pickletools.genops(pickle):
                    if opcode.name in ("GLOBAL", "INST") and argument and len(argument) > MAX_NAME:
                        raise UserError(
                            f"{path}: expected names of at most {MAX_NAME} characters, found {argument[:40]!r}…"
                        )
            except (ValueError, OverflowError, MemoryError):  # it is no pickle, as PyTorch will find
                return


def _pickles(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yield the pickles of a checkpoint one after the other, each when the one before it has been read."""
    import io
    import zipfile
    import zlib

    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    yield io.BytesIO(archive.read(name))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError):
        file.seek(0)
        for _ in range(PICKLES):
            yield file
