"""Where weights come from: packages, the Hugging Face hub, downloads, and files put in their place by hand."""

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
ATTEMPTS = 4  # of a download; the pause before each grows by a second


def package_file(rest: str) -> str | None:
    """The path of `package/path/in/it` in an installed package, without importing it; None where it is absent."""
    package, _, inner = rest.partition("/")
    found = importlib.util.find_spec(package)
    for folder in found.submodule_search_locations or [] if found else []:
        if os.path.exists(path := os.path.join(folder, inner)):
            return path
    return None


def is_download(path: str) -> bool:
    return os.path.commonpath([os.path.abspath(DOWNLOADS), os.path.abspath(path)]) == os.path.abspath(DOWNLOADS)


def manual_path(model: str, source: str) -> str | None:
    """Where a file that is otherwise downloaded can be put by hand, None for sources that are no download."""
    scheme, rest = split_source(source)
    if scheme == "timm":
        return f"{MODELS}/{model}/model.safetensors"
    if scheme in ("hf", "http", "https"):
        path = rest.partition("@")[0] if scheme == "hf" else rest.partition("?")[0].partition("#")[0]
        return f"{MODELS}/{model}/{os.path.basename(path)}"
    return None


def verify_sha256(path: str, sha256: str | None) -> None:
    """UserError where the file's digest is not the spec's."""
    if sha256 is None:
        return
    if (found := digest(path, remember=False)) != sha256:
        raise UserError(f"{path} has the sha256 {found}, but the spec expects {sha256}")


def fetch(model: str, source: str, sha256: str | None) -> str:
    """Download the source and return its path; UserError that names where to put the file by hand."""
    scheme, rest = split_source(source)
    if scheme == "package":
        package = rest.partition("/")[0]
        raise UserError(
            f"{source}: the package {package} is not installed, or lacks that file: pip install -r requirements.txt"
        )
    try:
        if scheme in ("http", "https"):
            return download(source, sha256)
        repository, file, revision = hub_file(source)
        path = download_from_hub(repository, file, revision)
    except (OSError, ValueError) as error:  # of requests, of the hub's client, or of a digest
        raise UserError(
            f"{source} cannot be fetched ({first_lines(error)}); put the file at {manual_path(model, source)}"
        ) from error
    verify_sha256(path, sha256)
    return path


def hub_file(source: str) -> tuple[str, str, str | None]:
    """(repository, file, revision) on the Hugging Face hub, of an hf:// source or of timm's own pretrained tag."""
    scheme, rest = split_source(source)
    if scheme == "hf":
        rest, _, revision = rest.partition("@")
        owner, repository, file = rest.split("/", 2)
        return f"{owner}/{repository}", file, revision or None
    from timm.models import get_pretrained_cfg

    try:
        config = get_pretrained_cfg(rest)
    except RuntimeError as error:  # a tag that the architecture does not have
        raise ValueError(str(error)) from error
    if config is None or not config.hf_hub_id:
        raise ValueError(f"timm knows no pretrained weights {rest!r} on the hub")
    tag = f".{config.tag}" if config.tag else ""
    repository = config.hf_hub_id if config.hf_hub_id != "timm/" else f"timm/{config.architecture}{tag}"
    return repository, config.hf_hub_filename or "model.safetensors", None


def download_from_hub(repository: str, file: str, revision: str | None) -> str:
    """The hub's client keeps its own cache, resumes, and counts a file only when it is whole."""
    from httpx2 import HTTPError
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError, tqdm

    class Bar(tqdm):
        """The client's progress bar, for whoever is watching this stage."""

        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **{**options, "disable": False})  # although it goes to no terminal

        def display(self, *arguments: Any, **options: Any) -> None:
            progress.emit(progress.Progress(os.path.basename(file), self.n, self.total, "B"))

    try:
        return hf_hub_download(repository, file, revision=revision, tqdm_class=Bar)
    except LocalEntryNotFoundError as error:  # its own text is general, its cause says why
        raise OSError(f"the Hugging Face hub cannot be reached: {first_lines(error.__cause__ or error)}") from error
    except HfHubHTTPError as error:
        raise OSError(f"the Hugging Face hub answers: {first_lines(error, count=2)}") from error
    except HTTPError as error:  # a proxy, or a connection that breaks; no OSError, unlike the others
        raise OSError(f"the Hugging Face hub cannot be reached: {first_lines(error)}") from error


def download(url: str, sha256: str | None) -> str:
    """The path of the downloaded file, under build/.downloads; verified while it streams, retried with back-off."""
    import pooch

    name = os.path.basename(url.partition("?")[0]) or "weights"
    folder = f"{DOWNLOADS}/{hashlib.sha256(f'{url} {sha256}'.encode()).hexdigest()[:16]}"
    shelf = pooch.create(folder, base_url="", registry={name: sha256}, urls={name: url}, retry_if_failed=ATTEMPTS - 1)
    fetched: str = shelf.fetch(name, downloader=Download(sha256))
    return fetched


class Download:
    """A pooch downloader that hashes what it writes. pooch gives the file its name only if this returns.

    pooch tries again after what requests raises, and after a ValueError; not after another OSError.
    """

    def __init__(self, sha256: str | None):
        self.sha256 = sha256

    def __call__(self, url: str, output_file: str, shelf: Any) -> None:
        import requests

        found, done, name = hashlib.sha256(), 0, os.path.basename(url.partition("?")[0])
        with requests.get(url, stream=True, timeout=30) as response, open(output_file, "wb") as file:
            if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
                raise OSError(f"the server answers {response.status_code} {response.reason}")
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0)) or None
            progress.emit(progress.Progress(name, 0, size, "B"))
            for chunk in response.iter_content(1 << 20):
                file.write(chunk)
                found.update(chunk)
                done += len(chunk)
                progress.emit(progress.Progress(name, done, size, "B"))
        if self.sha256 not in (None, found.hexdigest()):
            raise OSError(f"it has the sha256 {found.hexdigest()}, but the spec expects {self.sha256}")
