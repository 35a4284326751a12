"""The sources of weights: files in installed packages, the Hugging Face hub, and downloads.

package://  ─► package_file
hf://, timm ─► hub_file ─► download_from_hub ─┐
https://    ─► download ──────────────────────┴► a file, or a UserError that says where to put it by hand
"""

import contextlib
import hashlib
import importlib.util
import math
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from build_tasks.errors import UserError, first_lines
from build_tasks.paths import BUILD, MODELS
from build_tasks.runtime import atomic_files, progress
from build_tasks.runtime.digests import digest
from build_tasks.runtime.limits import ADVICE, DOWNLOAD_SIZE, DOWNLOAD_TIME, limit
from build_tasks.spec.model import split_source

if TYPE_CHECKING:
    import requests

DOWNLOADS = f"{BUILD}/.downloads"
ATTEMPTS = 4  # number of attempts of a download; each pause between them is one second longer
MAX_TIMER = 1e8  # seconds; the system's timers take no more than some 1e9
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30
HUB_TIMEOUT = 10.0  # seconds for each part of an answer of the Hugging Face hub
MAX_REASON = 200  # characters of a server's or a library's reason in a message
RETRIED_CLIENT_ERRORS = (408, 429)  # request timeout, too many requests


def package_file(name: str) -> str | None:
    """Return the path of a file in an installed package, without importing the package. None if there is none.

    Args:
        name: `package/path/in/it`.
    """
    package, _, inner = name.partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # the second: a module without a spec, such as __main__
        return None
    for folder in spec.submodule_search_locations or [] if spec else []:
        if os.path.isfile(path := os.path.join(folder, inner)):
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
        path = rest.partition("@")[0] if scheme == "hf" else rest
        return f"{MODELS}/{model}/{os.path.basename(path)}"
    return None


def verify_sha256(path: str, sha256: str | None, name: str = "") -> None:
    """Raise UserError if the spec has a digest and the file has another one.

    Args:
        name: What the message calls the file, instead of its path.
    """
    if sha256 is None:
        return
    if (found := digest(path, remember=False)) != sha256:
        raise UserError(f"{name or path} has the sha256 {found}, but the spec expects {sha256}")


def fetch(model: str, source: str, query: str, sha256: str | None, by_hand: str | None = None) -> str:
    """Download a source and return the path of the file.

    Args:
        source: weights.source without its query.
        query: The query of its URL, with the question mark. It may be a secret, and appears in no message.
        by_hand: What a message tells the user to do instead. Default: to put the file at its path.
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
        with time_limit(limit(DOWNLOAD_TIME)):
            if scheme in ("http", "https"):
                return download(source, query, sha256)
            repository, file, revision = hub_file(source)
            path = download_from_hub(repository, file, revision)
    except (OSError, ValueError, LimitError) as error:  # of requests, of the hub's client, of another digest
        reason = first_lines(error)
        if query:
            reason = re.sub(r"\?\S+", "?…", reason)  # requests repeats the path with its query
        advice = by_hand or f"put the file at {manual_path(model, source)}"
        raise UserError(f"{source} cannot be fetched ({reason[:MAX_REASON]}); {advice}") from None
    verify_sha256(path, sha256, source)
    return path


@contextlib.contextmanager
def time_limit(minutes: float) -> Iterator[None]:
    """Raise LimitError in the block after a number of minutes. It needs POSIX, and the main thread of a process."""
    if math.isinf(minutes) or not hasattr(signal, "setitimer") or threading.current_thread() != threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise LimitError(f"it takes longer than {minutes:g} minutes, as {DOWNLOAD_TIME} allows; {ADVICE}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(max(minutes * 60, 0.001), MAX_TIMER))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class LimitError(Exception):
    """A download is longer or takes longer than it may. It is no OSError, which the HTTP libraries would wrap."""


def check_size(size: int) -> None:
    """Raise LimitError if a download has more bytes than it may have."""
    if size > (allowed := limit(DOWNLOAD_SIZE)) * 1e9:
        raise LimitError(f"it has more than {allowed:g} GB, as {DOWNLOAD_SIZE} allows; {ADVICE}")


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
    from huggingface_hub import constants, get_session, hf_hub_download
    from huggingface_hub.utils import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, tqdm

    class ProgressBar(tqdm):
        """The client's progress bar, which sends the progress of the stage instead of drawing it."""

        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **{**options, "disable": False})  # tqdm disables it without a terminal

        def display(self, *arguments: Any, **options: Any) -> None:
            check_size(int(max(self.n, self.total or 0)))
            progress.emit(progress.Progress(os.path.basename(file), self.n, self.total, "B"))

    unanswered: Counter[str] = Counter()

    def check_request(request: Any) -> None:
        """Called before every request of the client, also before one that follows a redirect."""
        if constants.ENDPOINT.startswith("https:") and request.url.scheme != "https":
            target = f"{request.url.scheme}://{request.url.host}"
            raise OSError(f"the hub redirects from https to {target}, which is not secure")
        # The client waits a minute, six times, for a hub that accepts connections and never answers.
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {key: min(each or HUB_TIMEOUT, HUB_TIMEOUT) for key, each in limits.items()}
        unanswered[str(request.url)] += 1
        if (count := unanswered[str(request.url)]) > ATTEMPTS:
            raise OSError(f"{request.url.host} accepts connections and does not answer within {HUB_TIMEOUT:g} s")
        again = f", request {count} of {ATTEMPTS}" if count > 1 else ""
        progress.emit(progress.Progress(f"waiting for {request.url.host}{again}"))

    def forget_requests(response: Any) -> None:
        unanswered.clear()

    client = get_session()
    hooks = client.event_hooks
    more = {"request": check_request, "response": forget_requests}
    client.event_hooks = {event: [*hooks[event], hook] for event, hook in more.items()}
    try:
        return hf_hub_download(repository, file, revision=revision, tqdm_class=ProgressBar)
    except LocalEntryNotFoundError as error:  # its own text is general, its cause gives the reason
        raise OSError(f"the Hugging Face hub cannot be reached: {first_lines(error.__cause__ or error)}") from error
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{repository}"
        raise OSError(f"{repository} is gated: accept its terms at {page}, and set HF_TOKEN to your token") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise OSError(f"{repository} does not exist, or is private and HF_TOKEN has no token for it") from error
        raise OSError(f"the Hugging Face hub answers: {first_lines(error, count=2)}") from error
    except HTTPError as error:  # of a proxy, or of a connection that breaks; it is no OSError, unlike the others
        raise OSError(f"the Hugging Face hub cannot be reached: {first_lines(error)}") from error


def download(url: str, query: str, sha256: str | None) -> str:
    """Download a file to build/.downloads and return its path. A failed download is tried again after a pause.

    The folder of the file follows from the URL without its query: another signature is no other file.
    """
    import pooch

    name = os.path.basename(url)
    folder = f"{DOWNLOADS}/{hashlib.sha256(f'{url} {sha256}'.encode()).hexdigest()[:16]}"
    shelf = pooch.create(folder, base_url="", registry={name: sha256}, urls={name: url}, retry_if_failed=ATTEMPTS - 1)
    atomic_files.make_folder(DOWNLOADS)
    atomic_files.make_folder(folder)
    with atomic_files.locked(folder):  # another run that downloads the same file finishes first
        remove_interrupted_downloads(folder, name)
        path: str = shelf.fetch(name, downloader=HashingDownloader(query, sha256))
    return path


def remove_interrupted_downloads(folder: str, name: str) -> None:
    """Remove the temporary files that killed runs have left in build/.downloads.

    Args:
        folder: The folder of a download, which this process has locked.
        name: Of its file.
    """
    for leftover in {*os.listdir(folder)} - {name}:
        os.remove(f"{folder}/{leftover}")
    for other in os.listdir(DOWNLOADS):
        with contextlib.suppress(OSError), atomic_files.locked(f"{DOWNLOADS}/{other}", wait=False):
            for leftover in os.listdir(f"{DOWNLOADS}/{other}"):
                if re.fullmatch("tmp[a-z0-9_]{8}", leftover):  # as Python's tempfile names them for pooch
                    os.remove(f"{DOWNLOADS}/{other}/{leftover}")


class HashingDownloader:
    """A downloader for pooch that computes the digest while it writes.

    pooch moves the file to its name only if the call returns. It tries again after an error of requests and after a
    ValueError, but not after another OSError.
    """

    def __init__(self, query: str, sha256: str | None):
        self.query = query
        self.sha256 = sha256
        self.attempts = 0

    def __call__(self, url: str, output_file: str, shelf: Any) -> None:
        computed, done, name = hashlib.sha256(), 0, os.path.basename(url)
        self.attempts += 1
        again = f", attempt {self.attempts} of {ATTEMPTS}" if self.attempts > 1 else ""
        progress.emit(progress.Progress(f"waiting for {urlsplit(url).hostname}{again}"))
        with (
            secure_session() as session,
            session.get(f"{url}{self.query}", stream=True, timeout=TIMEOUT_SECONDS) as response,
            open(output_file, "wb") as file,
        ):
            if 400 <= response.status_code < 500 and response.status_code not in RETRIED_CLIENT_ERRORS:
                raise OSError(f"the server answers {response.status_code} {response.reason}")
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0)) or None
            check_size(size or 0)
            progress.emit(progress.Progress(name, 0, size, "B"))
            for chunk in response.iter_content(CHUNK_BYTES):
                done += len(chunk)
                check_size(done)
                file.write(chunk)
                computed.update(chunk)
                progress.emit(progress.Progress(name, done, size, "B"))
        if self.sha256 not in (None, computed.hexdigest()):
            raise OSError(f"it has the sha256 {computed.hexdigest()}, but the spec expects {self.sha256}")


def secure_session() -> "requests.Session":
    """Return a session that does not follow a redirect from https:// to http://."""
    import requests

    class SecureSession(requests.Session):
        def get_redirect_target(self, resp: "requests.Response") -> str | None:
            target = super().get_redirect_target(resp)
            if target is not None and resp.url.startswith("https:"):
                joined = urljoin(resp.url, target)
                if not joined.lower().startswith("https:"):
                    raise OSError(f"the server redirects from https to {joined.partition('?')[0]}, which is not secure")
            return target

    return SecureSession()
