"""check: load every model of model_repository/ in Triton's own server, with its strictest options

    published models ─► server (triton_server.py) ─► load, warm-up ─► ok
                                                                   ├► config accepted: the core accepts it, and then a
                                                                   │  backend or a GPU is missing on this machine
                                                                   └► refused: reason ─► exit code 1

If a model makes the server end, another server loads the models after it.
The preprocessing model of an ensemble also has to prepare the accuracy samples as timm does. Source of the server's
messages: model_config_utils.cc, backend_model.cc and ensemble_utils.cc of Triton's core.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from doit.exceptions import TaskFailed

from build_tasks.errors import UserError
from build_tasks.paths import BUILD, REPOSITORY
from build_tasks.serving import server_kinds, triton_client, triton_server
from build_tasks.spec.model import Model
from build_tasks.triton.existing_repository import read_model
from build_tasks.triton.repository import published_models
from build_tasks.verification import accuracy_samples

LOG = f"{BUILD}/check.log"

# The server's messages about what this machine lacks. They come after every check that does not need it.
MISSING_ON_MACHINE = {
    r"unable to find backend library for backend '(\w+)'": "backend {} is not on this machine",
    r"unable to find '[^']*libtriton_(\w+)\.so'": "backend {} is not on this machine",
    r"has kind (KIND_GPU) but no GPUs are available": "{} needs a GPU, and this machine has none",
    r"KIND_CPU but (\w+) backend supports only GPU": "backend {} needs a GPU, and this machine has none",
}

STUB_LIBRARIES = {"torchscript": "PyTorch", "onnx": "ONNX Runtime", "aoti": "PyTorch"}

# The JPEG decoder of another version of Pillow may round differently, by one of 256 gray levels.
DECODER_TOLERANCE = 1e-2  # relative L2

PARAMS = [
    server_kinds.SERVER_PARAM,
    {
        "name": "stubs", "long": "stubs", "type": bool, "default": False,
        "help": "with the core: run all models but plans with the same libraries in its Python backend",
    },
    {"name": "old_stubs", "long": "stand_ins", "type": bool, "default": False, "help": "the former name of --stubs"},
]  # fmt: skip


class ServedModel(NamedTuple):
    """A model of Triton's, and the spec and the format that it is built from."""

    name: str
    model: Model
    model_format: str


def task(models: list[Model]) -> dict[str, Any]:
    """doit's task `check`."""
    return {
        "actions": [(check, [models])],
        "params": PARAMS,
        "io": {"capture": False},
        "doc": f"On demand: load {REPOSITORY}/ in Triton's own server, strictly",
    }


def served_models(models: list[Model]) -> list[ServedModel]:
    """All models of Triton's that the specs describe, published or not."""
    return [
        ServedModel(model.triton_name(model_format), model, model_format)
        for model in models
        for model_format in (*model.served_formats, *model.ensemble_parts)
    ]


def check(models: list[Model], server: str, stubs: bool, old_stubs: bool) -> TaskFailed | None:
    """doit's action: load each model and print a line for it.

    In Docker each model is loaded by the image of the release that its spec names.
    """
    names = published_models()
    if not names:
        return TaskFailed(f"{REPOSITORY}/ has no model; `doit` builds them")
    stubs = stubs or old_stubs
    specs = {served.name: served for served in served_models(models)}
    default = models[0].release
    refused: list[str] = []
    try:
        kind = server_kinds.select_kind(server, default)
        names_of: dict[str, list[str]] = {}
        for name in names:
            release = specs[name].model.release if kind == "docker" and name in specs else default
            names_of.setdefault(release, []).append(name)
        for release, names_of_release in sorted(names_of.items()):
            print(f"  starting Triton ({kind}); log: {LOG}\n  {loading_line(names_of_release)}", flush=True)
            for name, result in check_models(kind, release, names_of_release, specs, stubs):
                if result.startswith("refused"):
                    refused += [name] if name not in refused else []
                elif stubs and kind == "core" and result.startswith("ok"):  # other servers have their backends
                    result += stub_note(name)
                print(f"  {name}: {result}", flush=True)
    except UserError as error:
        return TaskFailed(str(error))
    if refused:
        return TaskFailed(f"Triton refuses {', '.join(refused)}; the server's log: {LOG}")
    return None


def loading_line(names: list[str]) -> str:
    """Return what is said before models are loaded, which takes long without any output."""
    count = f"{len(names)} model{'s' if len(names) > 1 else ''}"
    return f"loading {count}; PyTorch and large models take up to a minute each, and longer on a busy machine"


def check_models(
    kind: str, release: str, names: list[str], specs: dict[str, ServedModel], stubs: bool
) -> Iterator[tuple[str, str]]:
    """Load models in one server, and yield the name and the result of each.

    If the server ends, another one is started for the rest. If a model does not load because the server has already
    ended, it loads in the next one, and the model before it is to blame.

    Args:
        kind, release, stubs: As of `triton_server.start`.
    """
    rest, ended_after, append = list(names), None, False
    while rest:
        with triton_server.start(kind, release, triton_server.free_ports(), LOG, stubs, append=append) as server:
            append, before = True, None
            while rest:
                name = rest[0]
                try:
                    result = check_model(server, name, specs.get(name))
                except triton_server.NoAnswerError as error:
                    if before is not None:
                        ended_after = before
                        break  # the same model again, in a server that has loaded no other
                    result = f"refused: {error}"
                if ended_after is not None and not result.startswith("refused: the server "):
                    yield ended_after, "refused: the server ended after it had loaded this model"
                ended_after = None
                yield rest.pop(0), result
                if result.startswith("refused: the server "):
                    break
                before = name


def stub_note(name: str) -> str:
    """A remark on a model that a stub runs in place of Triton's backend; empty for other models."""
    library = STUB_LIBRARIES.get(read_model(f"{REPOSITORY}/{name}").model_format)
    return f" (by a stub: {library} in the Python backend)" if library else ""


def check_model(server: triton_server.Server, name: str, served: ServedModel | None) -> str:
    """Load a model, and compare its answers if it preprocesses. Returns "ok", or what `format_load_result` returns."""
    reason = server.load(name)
    if reason is None and served and served.model_format == "preprocess":
        return check_preprocessing(server, name, served.model)
    return format_load_result(reason)


def format_load_result(reason: str | None) -> str:
    """The result of loading a model, for people: "ok", "config accepted, …" or "refused: …".

    Args:
        reason: Why the server could not load the model, None if it could.
    """
    if reason is None:
        return "ok"
    for pattern, message in MISSING_ON_MACHINE.items():
        if match := re.search(pattern, reason):
            step = re.search(r"depends on '([^']+)'", reason)
            return f"config accepted, but {message.format(match[1])}" + (f" (for its step {step[1]})" if step else "")
    return f"refused: {reason}"


def check_preprocessing(server: triton_server.Server, name: str, model: Model) -> str:
    """Send the encoded accuracy samples to a Python model and compare its answer with timm's preprocessing."""
    from polygraphy.json import load_json

    from build_tasks.tensors import IMAGE, INPUT
    from build_tasks.verification.tolerance import relative_error

    if (encoded := accuracy_samples.read_encoded(model)) is None:
        return "ok"
    batch = encoded[: model.largest_batch("preprocess")]
    try:
        with contextlib.closing(triton_client.Client("HTTP", server.http)) as client:
            _, (answer,) = client.infer(name, client.tensors(name), {IMAGE: batch})
    except UserError as error:
        if how := server.how_it_ended():
            raise triton_server.NoAnswerError(f"the server {how} while this model preprocessed images") from error
        return f"refused: {error}"
    expected = load_json(model.artifact("samples.json"))[0][INPUT][: len(batch)]
    difference = relative_error(answer.astype("float32"), expected.astype("float32"))
    message = f"{len(batch)} images preprocessed, relative L2 error {difference:.1e} against timm"
    return f"ok, {message}" if difference <= DECODER_TOLERANCE else f"refused: {message}, limit {DECODER_TOLERANCE:.0e}"
