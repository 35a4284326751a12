"""push: `doit push URL` copies the published models to a bucket or a folder; `--oci FOLDER` as an image for KServe"""

from typing import Any

from doit.cmd_base import Command
from doit.exceptions import InvalidCommand

from build_tasks.delivery.options import option, requested_models
from build_tasks.doit_plugin.command_line import OneLineMistakes
from build_tasks.errors import UserError, first_lines, printable


class Push(OneLineMistakes, Command):  # type: ignore[misc]  # doit has no types
    """The command."""

    takes_names_first = True
    doc_purpose = "copy the published models to a bucket, a folder or an OCI image layout"
    doc_usage = "URL [MODEL ...] | --oci FOLDER [MODEL ...]"
    doc_description = (
        "URL is any of fsspec: s3://bucket/models, gs://, az://, file:///srv/models. Only what differs is copied, "
        "config.pbtxt last, and every copy is read back. A push that was interrupted is completed by the next one. "
        "--oci writes an OCI image layout (a modelcar for KServe) without a daemon: `skopeo copy oci:FOLDER docker://…`."
    )
    cmd_options = (option("oci", "write an OCI image layout into this folder"),)

    def execute(self, params: dict[str, Any], args: list[str]) -> int:
        try:
            if params["oci"]:
                from build_tasks.delivery import oci_layout

                digest = oci_layout.write(params["oci"], requested_models(args))
                print(printable(f"{params['oci']}: {digest}"))
                return 0
            if not args or "://" not in args[0]:
                raise InvalidCommand("expected a URL such as s3://bucket/models or file:///srv/models")
            from build_tasks.delivery import push

            push.push(args[0], requested_models(args[1:]), lambda line: print(printable(line), flush=True))
        except UserError as error:
            raise InvalidCommand(str(error)) from error
        except OSError as error:
            raise InvalidCommand(first_lines(error)) from error
        return 0
