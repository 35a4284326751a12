"""The options that the commands of this package share."""

import os
from collections.abc import Iterable
from typing import Any

from build_tasks.errors import UserError, with_suggestion
from build_tasks.paths import REPOSITORY
from build_tasks.provenance.signature import Identity
from build_tasks.triton.repository import is_generated, published_models


def option(name: str, description: str, default: str | bool = "") -> dict[str, Any]:
    """Return an option of a command, as doit declares it."""
    return {"name": name, "long": name, "type": type(default), "default": default, "help": description}


KEY = option("key", "a PEM file: to sign the private key, to verify the public one")
CHAIN = option("chain", "PEM files of certificates, up to the root, with commas between them")


def chain_of(text: str) -> tuple[str, ...]:
    """Return the paths of the option --chain."""
    return tuple(filter(None, text.split(",")))


def require_files(signer: Identity) -> None:
    """Raise a UserError if a file of the command line does not exist."""
    for path in filter(None, (signer.key, signer.certificate, *signer.chain)):
        if not os.path.isfile(path):
            raise UserError(f"there is no file {path}")


def requested_models(names: Iterable[str]) -> list[str]:
    """Return the generated models of the repository, or the named ones.

    Raises:
        UserError: If one was not published here, or if there is none.
    """
    published = [name for name in published_models() if is_generated(name)]
    for name in names:
        if name not in published:
            raise UserError(f"expected the name of a model in {REPOSITORY}/, found {with_suggestion(name, published)}")
    if not published:
        raise UserError(f"{REPOSITORY}/ has no model that was generated here; `doit` builds them")
    return list(names) or published
