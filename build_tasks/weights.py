"""weights: whatever the spec names as a source -> weights.safetensors, with the network's own keys.

hf:// https:// timm:// package:// path random://
          └─► sha256 ─► converter ─► keys checked ─► weights.safetensors
"""

import contextlib
import hashlib
import importlib.util
import os
import threading
import traceback
from typing import TYPE_CHECKING, Any

from build_tasks import architecture, worker
from build_tasks.errors import UserError
from build_tasks.spec import BUILD, MODELS, Model, settings, split_source
from build_tasks.stage import Notes, Paths, Settings, Stage, code_of

if TYPE_CHECKING:
    import torch

DOWNLOADS = f"{BUILD}/.downloads"
ATTEMPTS = 4  # of a download; the pause before each grows by a second


def task(model: Model) -> dict[str, Any]:
    weights = model.spec.weights
    inputs: Paths = {}
    elsewhere: dict[str, str | None] = {}
    scheme, rest = split_source(weights.source)
    if scheme == "file":
        inputs["source"] = model.source(rest)
    elif scheme == "package":
        elsewhere["source"] = package_file(rest)
    elif (placed := placed_file(model.name, weights.source)) and os.path.exists(placed):
        inputs["source"] = placed
    code = (*code_of("weights", "architecture"), *architecture.code_of(model))
    if weights.converter is not None:
        inputs["converter"] = model.source(weights.converter.partition(":")[0])
    stage = Stage(
        name=f"weights:{model.name}",
        model=model,
        build=build,
        inputs=inputs,
        elsewhere=elsewhere,
        outputs={"weights": model.artifact("weights.safetensors")},
        settings={**architecture.settings_of(model), "weights": settings(weights)},
        tools=("torch", "timm", "safetensors"),
        code=code,
    )
    random = "RANDOM weights, for structure tests only" if model.seed is not None else None
    return stage.task(doc=random or f"weights.safetensors from {weights.source}")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    from safetensors.torch import save_file

    source = settings["weights"]["source"]
    scheme, rest = split_source(source)
    if scheme == "random":
        state = random_state(settings, seed=int(rest))
    else:
        path = inputs.get("source") or fetch(settings["model"], source, settings["weights"]["sha256"])
        if "source" in inputs:
            verify(path, settings["weights"]["sha256"])
        try:
            state = read(path)
        except UserError:
            if is_download(path):  # a page that asks for a login, say; the next run fetches anew
                os.remove(path)
            raise
    if converter := settings["weights"]["converter"]:
        state = converted(state, settings["model"], converter)
    state = matched(state, architecture.create(settings).state_dict(), source)
    save_file(state, outputs["weights"])
    parameters = sum(tensor.numel() for tensor in state.values())
    return {"weights": "RANDOM" if scheme == "random" else source, "parameters": parameters}


def random_state(settings: Settings, seed: int) -> "dict[str, torch.Tensor]":
    """The architecture's own initialisation under a seed."""
    import torch

    torch.manual_seed(seed)
    return architecture.create(settings).state_dict()


def read(path: str) -> "dict[str, torch.Tensor]":
    """The state dict of a safetensors file or a checkpoint, unwrapped as timm does. No code in it is executed."""
    import pickle

    from timm.models import load_state_dict

    try:
        state: dict[str, torch.Tensor] = load_state_dict(path, use_ema=True, weights_only=True)
    except Exception as error:  # whatever torch, safetensors or timm say of a file that is none of theirs
        # torch's unpickler meets an "unsupported operand" in what is no pickle at all, a web page for example.
        cause = error.__cause__
        if isinstance(cause, pickle.UnpicklingError):
            if "Unsupported operand" in str(cause):
                raise UserError(f"{path} cannot be read as weights: it is no checkpoint") from error
            raise UserError(f"{path} holds more than tensors and could execute code: save it as safetensors") from error
        raise UserError(f"{path} cannot be read as weights: {_line(error)}") from error
    return state


def converted(state: "dict[str, torch.Tensor]", model: str, converter: str) -> "dict[str, torch.Tensor]":
    """What the spec's converter makes of it. UserError where that fails, or is something else."""
    import torch

    path = f"{MODELS}/{model}/{converter.partition(':')[0]}"
    function = architecture.user_function(model, converter)
    try:
        result = function(state)
    except Exception as error:
        traceback.print_exc()  # to the log
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
        line = f", line {frames[-1].lineno}" if frames else ""
        raise UserError(
            f"{path}{line}: {type(error).__name__}: {_line(error)} "
            f"(the whole log: {BUILD}/{model}/logs/weights.{model}.log)"
        ) from error
    if not isinstance(result, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in result.values()):
        raise UserError(f"{MODELS}/{model}/{converter} must return a dict from keys to tensors")
    return result


def matched(state: "dict[str, torch.Tensor]", own: "dict[str, torch.Tensor]", source: str) -> "dict[str, torch.Tensor]":
    """`state` in the dtype and under the keys of `own`. UserError that lists every key that does not match."""
    # Older checkpoints lack the counter that only training uses, as torch's own loader knows.
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    missing = sorted(own.keys() - state.keys() - optional)
    unexpected = sorted(state.keys() - own.keys())
    wrong = sorted(
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    )
    problems = {"missing": missing, "unexpected": unexpected, "wrongly shaped": wrong}
    if any(problems.values()):
        told = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in problems.items() if keys)
        raise UserError(f"{source} does not fit the architecture: {told}")
    return {key: state.get(key, own[key]).to(own[key].dtype).clone().contiguous() for key in own}


def _some(keys: list[str], limit: int = 8) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


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


def placed_file(model: str, source: str) -> str | None:
    """Where a file that is otherwise downloaded can be put by hand, None for sources that are no download."""
    scheme, rest = split_source(source)
    if scheme == "timm":
        return f"{MODELS}/{model}/model.safetensors"
    if scheme in ("hf", "http", "https"):
        path = rest.partition("@")[0] if scheme == "hf" else rest.partition("?")[0].partition("#")[0]
        return f"{MODELS}/{model}/{os.path.basename(path)}"
    return None


def verify(path: str, sha256: str | None) -> None:
    """UserError where the file's digest is not the spec's."""
    if sha256 is None:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
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
            f"{source} cannot be fetched ({_line(error)}); put the file at {placed_file(model, source)}"
        ) from error
    verify(path, sha256)
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
    from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with contextlib.redirect_stderr(worker.terminal):  # its progress bar
            return hf_hub_download(repository, file, revision=revision)
    except LocalEntryNotFoundError as error:  # its own text is general, its cause says why
        raise OSError(f"the Hugging Face hub cannot be reached: {_line(error.__cause__ or error)}") from error
    except HfHubHTTPError as error:
        raise OSError(f"the Hugging Face hub answers: {_line(error, count=2)}") from error
    except HTTPError as error:  # a proxy, or a connection that breaks; no OSError, unlike the others
        raise OSError(f"the Hugging Face hub cannot be reached: {_line(error)}") from error


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
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own is shared between processes, and outlives this one
        pause = 0.1 if worker.terminal.isatty() else 10.0
        found = hashlib.sha256()
        with requests.get(url, stream=True, timeout=30) as response, open(output_file, "wb") as file:
            if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
                raise OSError(f"the server answers {response.status_code} {response.reason}")
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(
                desc=os.path.basename(output_file),
                total=size,
                unit="B",
                unit_scale=True,
                delay=1,
                mininterval=pause,
                file=worker.terminal,
            ) as bar:
                for chunk in response.iter_content(1 << 20):
                    file.write(chunk)
                    found.update(chunk)
                    bar.update(len(chunk))
        if self.sha256 not in (None, found.hexdigest()):
            raise OSError(f"it has the sha256 {found.hexdigest()}, but the spec expects {self.sha256}")


def _line(error: BaseException, count: int = 1) -> str:
    """The first lines of the error's text that say something, as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count]) or type(error).__name__
