"""The sources of weights: files in installed packages, the Hugging Face hub, and downloads.

package://  ─► package_file
hf://, timm ─► hub_file ─► download_from_hub ─┐
https://    ─► download ──────────────────────┴► a file, or a UserError that says where to put it by hand
"""

import hashlib
import importlib.util
import os
from typing import Any

from build_tasks.errors import UserError, first_lines
from build_tasks.paths import BUILD, MODELS
from build_tasks.runtime import progress
from build_tasks.runtime.digests import digest
from build_tasks.spec.model import split_source

DOWNLOADS = f"{BUILD}/.downloads"
ATTEMPTS = 4  # number of attempts of a download; each pause between them is one second longer
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30
RETRIED_CLIENT_ERRORS = (408, 429)  # request timeout, too many requests


def package_file(name: str) -> str | None:
    """Return the path of a file in an installed package, without importing the package. None if there is none.

    Args:
        name: `package/path/in/it`.
    """
    package, _, inner = name.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or [] if spec else []:
        if os.path.exists(path := os.path.join(folder, inner)):
            return path
    return None


def is_download(path: str) -> bool:
    """Whether a file lies in the folder of downloads."""
    return os.path.commonpath([os.path.abspath(DOWNLOADS), os.path.abspath(path)]) == os.path.abspath(DOWNLOADS)


def manual_path(model: str, source: str) -> str | None:
    """Return the path where the user may put a file that is otherwise downloaded. None for other sources."""
    scheme, rest = split_source(source)
    if scheme == "timm":
        return f"{MODELS}/{model}/model.safetensors"
    if scheme in ("hf", "http", "https"):
        path = rest.partition("@")[0] if scheme == "hf" else rest.partition("?")[0].partition("#")[0]
        return f"{MODELS}/{model}/{os.path.basename(path)}"
    return None


def verify_sha256(path: str, sha256: str | None) -> None:
    """Raise UserError if the spec has a digest and the file has another one."""
    if sha256 is None:
        return
    if (found := digest(path, remember=False)) != sha256:
        raise UserError(f"{path} has the sha256 {found}, but the spec expects {sha256}")


def fetch(model: str, source: str, sha256: str | None) -> str:
    """Download a source and return the path of the file.

    Raises:
        UserError: If it cannot be fetched. The message says where to put the file by hand.
    """
    scheme, rest = split_source(source)
    if scheme == "package":
        package = rest.partition("/")[0]
        raise UserError(
            f"{source}: the package {package} is not installed, or does not contain this file: "
            "pip install -r requirements.txt"
        )
    try:
        if scheme in ("http", "https"):
            return download(source, sha256)
        repository, file, revision = hub_file(source)
        path = download_from_hub(repository, file, revision)
    except (OSError, ValueError) as error:  # from requests, from the client of the hub, or for another digest
        raise UserError(
            f"{source} cannot be fetched ({first_lines(error)}); put the file at {manual_path(model, source)}"
        ) from error
    verify_sha256(path, sha256)
    return path


def hub_file(source: str) -> tuple[str, str, str | None]:
    """Return (repository, file, revision) on the Hugging Face hub.

    Args:
        source: An hf:// source, or timm:// with one of timm's pretrained tags.
    Raises:
        ValueError: If timm has no such weights on the hub.
    """
    scheme, rest = split_source(source)
    if scheme == "hf":
        rest, _, revision = rest.partition("@")
        owner, repository, file = rest.split("/", 2)
        return f"{owner}/{repository}", file, revision or None
    from timm.models import get_pretrained_cfg

    try:
        config = get_pretrained_cfg(rest)
    except RuntimeError as error:  # the architecture does not have the tag
        raise ValueError(str(error)) from error
    if config is None or not config.hf_hub_id:
        raise ValueError(f"timm knows no pretrained weights {rest!r} on the hub")
    tag = f".{config.tag}" if config.tag else ""
    repository = config.hf_hub_id if config.hf_hub_id != "timm/" else f"timm/{config.architecture}{tag}"
    return repository, config.hf_hub_filename or "model.safetensors", None


def download_from_hub(repository: str, file: str, revision: str | None) -> str:
    """Download a file from the hub and return its path in the cache of the hub's client.

    The client resumes interrupted downloads, and returns only complete files.

    Raises:
        OSError: If the hub cannot be reached, or refuses the request.
    """
    from httpx2 import HTTPError
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError, tqdm

    class ProgressBar(tqdm):
        """The client's progress bar, which sends the progress of the stage instead of drawing it."""

        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **{**options, "disable": False})  # tqdm disables it without a terminal

        def display(self, *arguments: Any, **options: Any) -> None:
            progress.emit(progress.Progress(os.path.basename(file), self.n, self.total, "B"))

    try:
        return hf_hub_download(repository, file, revision=revision, tqdm_class=ProgressBar)
    except LocalEntryNotFoundError as error:  # its own text is general, its cause gives the reason
        raise OSError(f"the Hugging Face hub cannot be reached: {first_lines(error.__cause__ or error)}") from error
    except HfHubHTTPError as error:
        raise OSError(f"the Hugging Face hub answers: {first_lines(error, count=2)}") from error
    except HTTPError as error:  # of a proxy, or of a connection that breaks; it is no OSError, unlike the others
        raise OSError(f"the Hugging Face hub cannot be reached: {first_lines(error)}") from error


def download(url: str, sha256: str | None) -> str:
    """Download a file to build/.downloads and return its path. A failed download is tried again after a pause."""
    import pooch

    name = os.path.basename(url.partition("?")[0]) or "weights"
    folder = f"{DOWNLOADS}/{hashlib.sha256(f'{url} {sha256}'.encode()).hexdigest()[:16]}"
    shelf = pooch.create(folder, base_url="", registry={name: sha256}, urls={name: url}, retry_if_failed=ATTEMPTS - 1)
    path: str = shelf.fetch(name, downloader=HashingDownloader(sha256))
    return path


class HashingDownloader:
    """A downloader for pooch that computes the digest while it writes.

    pooch moves the file to its name only if the call returns. It tries again after an error of requests and after a
    ValueError, but not after another OSError.
    """

    def __init__(self, sha256: str | None):
        self.sha256 = sha256

    def __call__(self, url: str, output_file: str, shelf: Any) -> None:
        import requests

        computed, done, name = hashlib.sha256(), 0, os.path.basename(url.partition("?")[0])
        with requests.get(url, stream=True, timeout=TIMEOUT_SECONDS) as response, open(output_file, "wb") as file:
            if 400 <= response.status_code < 500 and response.status_code not in RETRIED_CLIENT_ERRORS:
                raise OSError(f"the server answers {response.status_code} {response.reason}")
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0)) or None
            progress.emit(progress.Progress(name, 0, size, "B"))
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)
                computed.update(chunk)
                done += len(chunk)
                progress.emit(progress.Progress(name, done, size, "B"))
        if self.sha256 not in (None, computed.hexdigest()):
            raise OSError(f"it has the sha256 {computed.hexdigest()}, but the spec expects {self.sha256}")
