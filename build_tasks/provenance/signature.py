"""Signatures of published models by OpenSSF Model Signing: <model>/model.sig covers every file of the model's folder.

    model_repository/<model>/ ─► digests of all files ─► signed by a key, a certificate or Sigstore ─► model.sig

The package model-signing does all of it, and its own command accepts the signatures:

    model_signing verify key FOLDER --signature FOLDER/model.sig --public_key KEY

Source: https://github.com/sigstore/model-transparency
"""

import os
import re
from typing import Any, NamedTuple

from build_tasks.errors import UserError, first_lines
from build_tasks.provenance.verify_repository import SIGNATURE

KEY_VARIABLE = "REPOSITORY_SIGNING_KEY"  # the private key that publishing signs with
PASSWORD_VARIABLE = "REPOSITORY_SIGNING_PASSWORD"  # of an encrypted key


class Identity(NamedTuple):
    """Who signs, or whose signature is accepted. One of key, certificate and keyless.

    key: Path of a PEM file: to sign the private key, to verify the public one.
    certificate: To sign: path of the certificate of the key.
    chain: Paths of further certificates, up to the root.
    keyless: To sign: by Sigstore, with the identity that its login or the CI system gives.
    identity, issuer: To verify: the identity that Sigstore confirmed, and who confirmed it.
    """

    key: str = ""
    certificate: str = ""
    chain: tuple[str, ...] = ()
    keyless: bool = False
    identity: str = ""
    issuer: str = ""


def sign(folder: str, signer: Identity, path: str) -> None:
    """Write the signature of a model's folder to a path.

    Raises:
        UserError: If that is not possible.
    """
    library = _library("signing")
    config = library.Config()
    try:
        if signer.keyless:
            config.use_sigstore_signer(use_ambient_credentials="CI" in os.environ)
        elif signer.certificate:
            config.use_certificate_signer(
                private_key=signer.key, signing_certificate=signer.certificate, certificate_chain=signer.chain
            )
        else:
            config.use_elliptic_key_signer(private_key=signer.key, password=os.environ.get(PASSWORD_VARIABLE))
    except Exception as error:  # the library has no class of its own
        raise UserError(f"cannot sign with {_described(signer)}: {first_lines(error)}") from error
    # The signature itself is no part of what it signs.
    hashing = _library("hashing").Config().set_ignored_paths(paths=[SIGNATURE])
    try:
        config.set_hashing_config(hashing).sign(folder, path)
    except Exception as error:
        raise UserError(f"{folder} was not signed: {first_lines(error)}") from error


def verify(folder: str, signer: Identity) -> str | None:
    """Return why the signature of a model's folder is not accepted, None if it is.

    Raises:
        UserError: If the key cannot be read.
    """
    config = _library("verifying").Config()
    try:
        if signer.identity:
            config.use_sigstore_verifier(identity=signer.identity, oidc_issuer=signer.issuer)
        elif signer.chain:
            config.use_certificate_verifier(certificate_chain=signer.chain)
        else:
            config.use_elliptic_key_verifier(public_key=signer.key)
    except Exception as error:
        raise UserError(f"cannot verify with {_described(signer)}: {first_lines(error)}") from error
    path = f"{folder}/{SIGNATURE}"
    if os.path.islink(path) or not os.path.isfile(path):
        return f"there is no signature {SIGNATURE}"
    try:
        config.verify(folder, path)
    except Exception as error:  # a wrong key, a changed file and a damaged signature raise different classes
        return f"the signature is not accepted: {_without_digests(first_lines(error))}"
    return None


def _described(signer: Identity) -> str:
    """Return the files of a key and its certificates, as a message names them."""
    return ", ".join(filter(None, (signer.key, signer.certificate, *signer.chain))) or "Sigstore"


def _without_digests(text: str) -> str:
    """Return a reason of the library without the digests of changed files, which it shows as Python's bytes."""
    return re.sub(r"Hash mismatch for \\?'(.*?)\\?': Expected .*?, Actual .*?\)\\?'(?=['\"])", r"\1 has changed", text)


def from_environment() -> Identity | None:
    """Return who signs what is published, None if nobody does.

    Raises:
        UserError: If the key does not exist.
    """
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        return None
    if not os.path.isfile(key):
        raise UserError(f"{KEY_VARIABLE}: there is no file {key!r}")
    return Identity(key=key)


def _library(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as error:
        raise UserError(f"signatures need model-signing ({error}): pip install -r requirements-signing.txt") from error
