"""client: an example client per protocol for each Triton model -> build/<model>/clients/<name>/

    signatures ──────────┐
    preprocessing.json ──┼─► client.py.j2 ─► http_client.py, grpc_client.py   complete programs
    labels.txt ──────────┘                   preprocessing.py, .json          how they prepare an image

If the Triton model is an ensemble, the client sends image files. If the model takes pictures, the client preprocesses
the images itself. For other models it sends an array from a .npy file.

Triton's sequence batcher takes requests of one sample each, with a correlation ID. For a model that uses it, the
samples are one sequence: the first request starts it, and the last one ends it.
"""

import functools
import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from build_tasks.json_files import read_json
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.interface import client_dims
from build_tasks.spec.model import Model
from build_tasks.tensors import IMAGE, Signature, TensorSignature, signature_dims

if TYPE_CHECKING:
    from jinja2 import Template

PORTS = {"http": 8000, "grpc": 8001}  # Triton's defaults
# NumPy's names of types, and Triton's in requests. Others are the same in upper case.
# Source: the KServe protocol, "Tensor Data Types".
DTYPES = {"float16": "FP16", "float32": "FP32", "float64": "FP64", "string": "BYTES"}
TEMPLATE = "build_tasks/stages/templates/client.py.j2"
PREPROCESSING = "build_tasks/triton/preprocess_model/preprocessing.py"


def task(model: Model, model_format: str, files: list[str], *, sequences: bool = False) -> dict[str, Any]:
    """The doit task of one Triton model.

    Args:
        files: The artifacts that the Triton model is served from; for the ensemble, the file that never exists.
        sequences: Whether requests belong to sequences.
    """
    name = model.triton_name(model_format)
    stage = Stage(
        name=f"client:{name}",
        model=model,
        build=build,
        inputs={
            "first": model.artifact(f"{files[0]}.signature.json"),
            "last": model.artifact(f"{files[-1]}.signature.json"),
            "preprocessing": model.artifact("preprocessing.json"),
            **({"labels": model.artifact("labels.txt")} if model.spec.labels else {}),
        },
        outputs={"folder": model.artifact(f"clients/{name}")},
        settings={
            "name": name,
            "top_k": model.spec.output.top_k,
            "sequences": sequences,
            "dims": {tensor: signature_dims(dims) for tensor, dims in client_dims(model.spec).items()},
        },
        tools=("jinja2",),
        modules=(__name__, "build_tasks.tensors", "build_tasks.triton.preprocess_model.preprocessing"),
        source_files=(TEMPLATE,),
        in_process=True,
    )
    return stage.task(doc=f"Example clients of {name}, over HTTP and gRPC")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    first: Signature = read_json(inputs["first"])
    last: Signature = read_json(inputs["last"])
    tensors, results = (
        [as_clients_see(each, settings["dims"]) for each in each_of] for each_of in (first["inputs"], last["outputs"])
    )
    # Empty if the input is not one picture. Its colors are empty if no picture has this number of channels.
    preprocessing = read_json(inputs["preprocessing"])
    colors, files = preprocessing.get("color", ["rgb"] if preprocessing else []), preprocessing.get("files", [])
    folder = outputs["folder"]
    os.makedirs(folder)
    if tensors[0]["name"] == IMAGE:
        sends = "encoded images"
    elif colors and tensors[0]["name"] not in settings["dims"]:
        sends = "preprocessed images"
        shutil.copyfile(PREPROCESSING, f"{folder}/preprocessing.py")
        shutil.copyfile(inputs["preprocessing"], f"{folder}/preprocessing.json")
    else:
        sends = "an array" if len(tensors) == 1 else "arrays"
    if "labels" in inputs:
        shutil.copyfile(inputs["labels"], f"{folder}/labels.txt")
    for protocol in PORTS:
        text = render(protocol, settings, tensors, results, sends, files, labels="labels" in inputs)
        with open(f"{folder}/{protocol}_client.py", "w", encoding="utf-8") as file:
            file.write(text)
    return {"clients": ", ".join(PORTS)}


def as_clients_see(tensor: TensorSignature, dims: dict[str, list[int]]) -> TensorSignature:
    """Return a tensor in the dims that clients see. A fixed batch of 1 is part of them."""
    seen, batch = dims.get(tensor["name"]), tensor["shape"][:1]
    return {**tensor, "shape": [*(batch if batch != [1] else []), *seen]} if seen else tensor


def render(
    protocol: str,
    settings: Settings,
    tensors: list[TensorSignature],
    outputs: list[TensorSignature],
    sends: str,
    files: Sequence[str] = (),
    *,
    labels: bool,
) -> str:
    """The source text of one client.

    Args:
        protocol: "http" or "grpc".
        tensors: The inputs of the model.
        outputs: The outputs of the model, which determine the lines that the client prints.
        sends: "encoded images", "preprocessed images", "an array" or "arrays".
        files: The endings of the image files of one sample. None: a sample is one file.
        labels: Whether labels.txt is beside the client.
    """
    shows, of_images = "tensors", sends in ("encoded images", "preprocessed images")
    if of_images and settings["top_k"]:
        shows = "ranked classes"
    elif of_images and len(outputs) == 1 and len(outputs[0]["shape"]) == 2:
        shows = "classes"
    images, pictures = " ".join(f"image{ending}" for ending in files or [".jpg"]), len(files or [""])
    with open(TEMPLATE, encoding="utf-8") as file:
        template = compile_template(file.read())
    return template.render(
        name=settings["name"],
        protocol=protocol,
        port=PORTS[protocol],
        sends=sends,
        source="images" if of_images else "a batch",
        example=f"{images} ..."
        if of_images
        else f"batch.np{'y' if sends == 'an array' else 'z'}  # "
        + "; ".join(
            f"{'' if sends == 'an array' else each['name'] + ': '}{each['dtype']}, {each['shape']}" for each in tensors
        ),
        pictures=pictures,
        each="path" if pictures == 1 else "paths",
        samples="arguments.files" if pictures == 1 else "samples",
        tensors=tensors,
        dtypes={each["name"]: DTYPES.get(each["dtype"], each["dtype"].upper()) for each in tensors},
        shows=shows,
        names=[output["name"] for output in outputs],
        outputs=", ".join(f'"{output["name"]}"' for output in outputs),
        labels=labels and shows != "tensors",
        sequences=settings["sequences"],
    )


@functools.cache  # compiling takes longer than all else in this stage
def compile_template(text: str) -> "Template":
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(text)
