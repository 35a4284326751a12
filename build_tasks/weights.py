"""weights: whatever the spec names as a source -> weights.safetensors, with the network's own keys.

hf:// https:// timm:// package:// path random://
          └─► sha256 ─► converter ─► keys checked ─► weights.safetensors
"""

import contextlib
import hashlib
import importlib.util
import os
from typing import IO, TYPE_CHECKING, Any

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
        state = read(path)
    if converter := settings["weights"]["converter"]:
        state = architecture.user_function(settings["model"], converter)(state)
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
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise UserError(f"{path} holds more than tensors and could execute code: save it as safetensors") from error
        raise UserError(f"{path} cannot be read as weights: {_line(error)}") from error
    return state


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


def placed_file(model: str, source: str) -> str | None:
    """Where a file that is otherwise downloaded can be put by hand, None for sources that are no download."""
    scheme, rest = split_source(source)
    if scheme == "timm":
        return f"{MODELS}/{model}/model.safetensors"
    if scheme in ("hf", "http", "https"):
        return f"{MODELS}/{model}/{os.path.basename(rest.partition('@')[0].partition('?')[0])}"
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

    config = get_pretrained_cfg(rest)
    if config is None or not config.hf_hub_id:
        raise ValueError(f"timm knows no pretrained weights {rest!r} on the hub")
    tag = f".{config.tag}" if config.tag else ""
    repository = config.hf_hub_id if config.hf_hub_id != "timm/" else f"timm/{config.architecture}{tag}"
    return repository, config.hf_hub_filename or "model.safetensors", None


def download_from_hub(repository: str, file: str, revision: str | None) -> str:
    """The hub's client keeps its own cache, resumes, and counts a file only when it is whole."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with contextlib.redirect_stderr(worker.terminal):  # its progress bar
            return hf_hub_download(repository, file, revision=revision)
    except LocalEntryNotFoundError as error:
        raise OSError("the Hugging Face hub cannot be reached") from error
    except HfHubHTTPError as error:
        raise OSError(f"the Hugging Face hub answers: {_line(error)}") from error


def download(url: str, sha256: str | None) -> str:
    """The path of the downloaded file, under build/.downloads; verified while it streams, retried with back-off."""
    import pooch

    name = os.path.basename(url.partition("?")[0]) or "weights"
    folder = f"{DOWNLOADS}/{hashlib.sha256(f'{url} {sha256}'.encode()).hexdigest()[:16]}"
    shelf = pooch.create(folder, base_url="", registry={name: None}, urls={name: url}, retry_if_failed=ATTEMPTS - 1)
    fetched: str = shelf.fetch(name, downloader=Download(sha256))
    return fetched


class Download:
    """A pooch downloader that hashes what it writes. pooch gives the file its name only if this returns."""

    def __init__(self, sha256: str | None):
        self.sha256 = sha256

    def __call__(self, url: str, output_file: str, shelf: Any) -> None:
        import pooch
        from tqdm import tqdm

        pause = 0.1 if worker.terminal.isatty() else 10.0
        bar = tqdm(
            desc=os.path.basename(url), unit="B", unit_scale=True, delay=1, mininterval=pause, file=worker.terminal
        )
        with open(output_file, "wb") as file:
            sink = Hashing(file)
            pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 20, timeout=30)(url, sink, shelf)
        if self.sha256 not in (None, sink.hash.hexdigest()):
            raise ValueError(f"it has the sha256 {sink.hash.hexdigest()}, but the spec expects {self.sha256}")


class Hashing:
    """A file that knows the sha256 of what was written to it."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
