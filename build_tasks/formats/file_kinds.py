"""What a file of the user is, found from its bytes without loading it."""

from build_tasks.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # its first line; source: git-lfs, docs/spec.md

# Members of PyTorch's archives, below one folder, that only one kind of archive has.
# Source: torch/jit/_serialization.py, torch/export/pt2_archive/constants.py, torch/serialization.py.
TORCHSCRIPT, EXPORTED, AOTI_PACKAGE = "a TorchScript file", "a torch.export file", "an AOTInductor package"
MEMBERS = {
    "constants.pkl": TORCHSCRIPT,
    "models/model.json": EXPORTED,
    "serialized_exported_program.json": EXPORTED,
}
AOTI = "data/aotinductor/"  # a folder of archives with code that was compiled for one machine


def reject_placeholder(path: str) -> None:
    """Raise UserError if a file is a pointer of Git LFS instead of the file itself. Other problems are not reported."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return
    if is_pointer:
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its repository")


def program_kind(path: str) -> str | None:
    """Return what a file with a network of PyTorch is; None for a checkpoint, and for every other file."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return None
    if any(AOTI in name for name in names):
        return AOTI_PACKAGE
    inner = {name.partition("/")[2] for name in names} | set(names)
    return next((kind for member, kind in MEMBERS.items() if member in inner), None)
