"""`doit adopt PATH --write`: the specs of a repository of another origin, with copies of their files.

Nothing changes in the repository. A model whose name is taken is left out.
"""

import os
import sys
from collections.abc import Mapping

from build_tasks.doit_plugin import reserved_names
from build_tasks.doit_plugin.adoption import Adoption
from build_tasks.doit_plugin.new_command import check_name, write_folder
from build_tasks.doit_plugin.spec_template import format_document
from build_tasks.errors import UserError, printable
from build_tasks.paths import REPOSITORY
from build_tasks.runtime import atomic_files
from build_tasks.spec import loader
from build_tasks.spec.tensor_tables import Dimension


def write(adoptions: list[Adoption]) -> int:
    """Write the specs, with a line for each. Return the exit code: 3 if one of them could not be written."""
    written, refused = [], False
    specs = [adoption for adoption in adoptions if adoption.spec is not None]
    # The steps of an ensemble come before the spec that names them, which is checked against them.
    for adoption in sorted(specs, key=lambda each: bool(each.spec and "ensemble" in each.spec.document)):
        assert adoption.spec is not None
        name = adoption.spec.model.name
        try:
            write_spec(adoption)
        except UserError as error:
            sys.stderr.write(printable(f"ERROR: {error}\n"))
            refused = True
            continue
        written.append(name)
        sys.stdout.write(f"wrote models/{name}/model.toml\n")
    if written:
        sys.stdout.write(next_steps(written, adoptions))
    return 3 if refused else 0


def write_spec(adoption: Adoption) -> None:
    """Write the spec of one model, and copies of the files that it names.

    Raises:
        UserError: If the name is taken, or if a file cannot be copied.
    """
    from build_tasks.formats import onnx_import

    existing, spec = adoption.existing, adoption.spec
    assert spec is not None
    check_name(spec.model.name)
    loader.check_new(spec.model, reserved_names.RESERVED)
    with atomic_files.scratch_dir() as scratch:
        files = dict(spec.files)
        if existing.model_format == "onnx":  # with its external data
            files[spec.model.spec.weights.source] = onnx_import.pack_onnx(existing.artifact, scratch)
        text = format_document(f"adopted from {existing.folder}", spec.document)
        write_folder(spec.model.name, text, files)


def _ranges(dimensions: Mapping[str, Dimension]) -> str:
    return ", ".join(f"{word} ({each.min} to {each.max})" for word, each in dimensions.items())


def next_steps(written: list[str], adoptions: list[Adoption]) -> str:
    """Return what to type next."""
    folders = [adoption.existing.folder for adoption in adoptions if adoption.spec is not None]
    path = folders[0] if len(adoptions) == 1 else os.path.dirname(folders[0])
    words = ["doit", *(written if len(written) < len(loader.model_names()) else [])]
    lines = [
        f"fill in: [dimensions] in {spec.model.file}: {_ranges(spec.model.spec.dimensions)}: the ranges are guesses"
        for spec in (adoption.spec for adoption in adoptions)
        if spec and spec.model.name in written and spec.model.spec.dimensions
    ]
    lines.append(f"next: `{' '.join(words)}` builds them, `doit adopt {path} --compare` compares their answers")
    if os.path.realpath(path).startswith(os.path.realpath(REPOSITORY)):
        lines.append(
            f"{REPOSITORY}/ keeps the originals until `doit adopt {path} --replace`; until then `publish` refuses"
        )
    return "".join(f"{line}\n" for line in lines)
