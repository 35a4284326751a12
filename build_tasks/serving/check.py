"""check: every model of model_repository/ loaded by Triton's own server, as strictly as it can

    ok                      it is loaded, and warmed up; a Python model answers with what the network wants
    config accepted         all that the core checks is right, and then a backend or a GPU was not there
    refused: reason         exit code 1

Source of what the server says: the core's model_config_utils.cc, backend_model.cc and ensemble_utils.cc.
"""

import re
from typing import Any

from doit.exceptions import TaskFailed

from build_tasks.errors import UserError
from build_tasks.paths import BUILD, REPOSITORY
from build_tasks.serving import triton_client, triton_server
from build_tasks.spec.model import Model
from build_tasks.triton.platforms import FORMATS
from build_tasks.triton.repository import published_models
from build_tasks.verification import accuracy_samples

LOG = f"{BUILD}/check.log"

# What a server says that lacks something, after everything that it checks without it was right.
LACKING = {
    r"unable to find backend library for backend '(\w+)'": "backend {} not on this machine",
    r"unable to find '[^']*libtriton_(\w+)\.so'": "backend {} not on this machine",
    r"has kind (KIND_GPU) but no GPUs are available": "{}, and no GPU on this machine",
    r"KIND_CPU but (\w+) backend supports only GPU": "no GPU on this machine for {}",
}

STAND_IN_FOR = {"torchscript": "PyTorch", "onnx": "ONNX Runtime"}

# Where the server's Pillow is of another version, its JPEG decoder may round otherwise: by a grey level, of 256.
DECODERS_APART = 1e-2  # relative L2

STAND_INS = {
    "name": "stand_ins", "long": "stand_ins", "type": bool, "default": False,
    "help": "with the core: run ONNX and TorchScript models by the same libraries in its Python backend",
}  # fmt: skip


def task(models: list[Model]) -> dict[str, Any]:
    return {
        "actions": [(check, [models])],
        "params": [triton_server.SERVER, STAND_INS],
        "io": {"capture": False},
        "doc": f"On demand: load {REPOSITORY}/ in Triton's own server, strictly",
    }


def check(models: list[Model], server: str, stand_ins: bool) -> TaskFailed | None:
    """doit's action: one row for each model; with Docker, in the image of the release that the spec names."""
    described = {
        m.triton_name(model_format): (m, model_format)
        for m in models
        for model_format in (*m.served_formats, *m.ensemble_parts)
    }
    names = published_models()
    if not names:
        return TaskFailed(f"{REPOSITORY}/ has no model; `doit` builds them")
    default = models[0].release
    try:
        kind = triton_server.which(server, default)
        by_release: dict[str, list[str]] = {}
        for name in names:
            release = described[name][0].release if kind == "docker" and name in described else default
            by_release.setdefault(release, []).append(name)
        refused = []
        for release, theirs in sorted(by_release.items()):
            with triton_server.started(kind, release, triton_server.free_ports(), LOG, stand_ins=stand_ins) as running:
                for name in theirs:
                    said = verdict(running, name, described.get(name))
                    if said.startswith("refused"):
                        refused.append(name)
                    elif stand_ins and kind == "core" and said.startswith("ok"):  # other servers have their backends
                        said += stood_in(name)
                    print(f"  {name}: {said}", flush=True)
    except UserError as error:
        return TaskFailed(str(error))
    if refused:
        return TaskFailed(f"Triton refuses {', '.join(refused)}; its log: {LOG}")
    return None


def stood_in(name: str) -> str:
    """What is to be said of a model that another backend runs than Triton's own."""
    with open(f"{REPOSITORY}/{name}/config.pbtxt", encoding="utf-8") as file:
        platform = re.search(r'^platform: "(.*)"', file.read(), re.MULTILINE)
    stand_ins = {FORMATS[model_format].platform: library for model_format, library in STAND_IN_FOR.items()}
    library = stand_ins.get(platform[1]) if platform else None
    return f" ({library} in Python, in the place of Triton's backend)" if library else ""


def verdict(server: triton_server.Server, name: str, described: tuple[Model, str] | None) -> str:
    """What the server thinks of a model."""
    reason = server.load(name)
    if reason is None and described and described[1] == "preprocess":
        return answers(server, name, described[0])
    return reason_told(reason)


def reason_told(reason: str | None) -> str:
    """What it means that a model cannot be loaded; None means that it can."""
    if reason is None:
        return "ok"
    for pattern, told in LACKING.items():
        if found := re.search(pattern, reason):
            step = re.search(r"depends on '([^']+)'", reason)
            return f"config accepted, {told.format(found[1])}" + (f", for its step {step[1]}" if step else "")
    return f"refused: {reason}"


def answers(server: triton_server.Server, name: str, model: Model) -> str:
    """What a Python model makes of the accuracy samples, beside what timm made of them."""
    from polygraphy.json import load_json

    from build_tasks.tensors import INPUT
    from build_tasks.verification.tolerance import relative_error

    if (encoded := accuracy_samples.read_encoded(model)) is None:
        return "ok"
    batch = encoded[: model.largest_batch("preprocess")]
    client = triton_client.Client("HTTP", server.http)
    try:
        _, (found,) = client.infer(name, client.tensors(name), batch)
    except UserError as error:
        return f"refused: {error}"
    expected = load_json(model.artifact("samples.json"))[0][INPUT][: len(batch)]
    off = relative_error(found.astype("float32"), expected.astype("float32"))
    told = f"{len(batch)} pictures prepared, off from timm's by {off:.1e}"
    return f"ok, {told}" if off <= DECODERS_APART else f"refused: {told}, limit {DECODERS_APART:.0e}"
