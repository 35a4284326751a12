"""sign: `doit sign --key KEY` signs the published models, as model_repository/<model>/model.sig"""

from typing import Any

from doit.cmd_base import Command
from doit.exceptions import InvalidCommand

from build_tasks.delivery.options import CHAIN, KEY, chain_of, option, requested_models, require_files
from build_tasks.doit_plugin.command_line import OneLineMistakes
from build_tasks.doit_plugin.state import StateManager
from build_tasks.errors import UserError
from build_tasks.paths import REPOSITORY
from build_tasks.provenance import signature
from build_tasks.provenance.signature import Identity
from build_tasks.runtime import atomic_files, repository_files
from build_tasks.runtime.digests import digest


class Sign(OneLineMistakes, Command):  # type: ignore[misc]  # doit has no types
    """The command."""

    takes_names_first = True
    doc_purpose = "sign the published models, by OpenSSF Model Signing"
    doc_usage = "[MODEL ...] --key PRIVATE.pem [--certificate CERT.pem --chain CA.pem] | --keyless"
    doc_description = (
        "Writes model.sig into the folder of each published model, or of the named ones. It covers every file of the "
        "folder, and `model_signing verify` accepts it. A model that is published again has no signature until it is "
        "signed again; with REPOSITORY_SIGNING_KEY, publishing signs."
    )
    cmd_options = (
        KEY,
        option("certificate", "the certificate of the key"),
        CHAIN,
        option("keyless", "sign by Sigstore, with your login or that of the CI system", default=False),
    )

    def execute(self, params: dict[str, Any], args: list[str]) -> int:
        signer = Identity(params["key"], params["certificate"], chain_of(params["chain"]), params["keyless"])
        if bool(signer.key) == signer.keyless:
            raise InvalidCommand("expected either --key or --keyless; `doit help sign` shows both")
        if (signer.certificate and signer.keyless) or (signer.chain and not signer.certificate):
            raise InvalidCommand("expected --certificate with --key, and --chain with --certificate")
        try:
            require_files(signer)
            for name in requested_models(args):
                sign_published(name, signer)
                print(f"{REPOSITORY}/{name}: signed", flush=True)
        except UserError as error:
            raise InvalidCommand(str(error)) from error
        return 0


def sign_published(name: str, signer: Identity) -> None:
    """Sign a published model, and record its folder as it is then, so that the next doit finds it up to date."""
    folder, task = f"{REPOSITORY}/{name}", f"publish:{name}"
    records = StateManager()
    with repository_files.repository_lock(), atomic_files.scratch_dir() as scratch:
        draft = f"{scratch}/{signature.SIGNATURE}"
        signature.sign(folder, signer, draft)
        atomic_files.flush(draft)
        values = records.get_values(task)
        recorded = values.get("outputs", {}).get(folder) == digest(folder)
        atomic_files.replace(draft, f"{folder}/{signature.SIGNATURE}", near=REPOSITORY)
        if recorded:  # a folder that somebody changed stays outdated
            values["outputs"][folder] = digest(folder)
            records.backend.set(task, "_values_:", values)
            records.close()
