"""client: an example client per protocol for each Triton model -> build/<model>/clients/<name>/

    signatures ──────────┐
    preprocessing.json ──┼─► client.py.j2 ─► http_client.py, grpc_client.py   complete programs
    labels.txt ──────────┘                   preprocessing.py, .json          how they prepare an image

If the Triton model is an ensemble, the client sends image files. If the only input of the model is a picture, the
client preprocesses the images itself. If some of several inputs are pictures, each of them has an option for image
files, and the others come from a .npz file. For other models it sends an array from a .npy file, or arrays from a .npz
file.

Triton's sequence batcher takes requests of one sample each, with a correlation ID. For a model that uses it, the
samples are one sequence: the first request starts it, and the last one ends it. If an input is ragged, each request has
one sample, too. If the batch is fixed, each request has as many samples.
"""

import functools
import json
import os
import shutil
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from build_tasks.json_files import read_json
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.interface import client_dims, interface_of, label_files, ragged_inputs
from build_tasks.spec.model import Model
from build_tasks.spec.ragged import hidden_tensors
from build_tasks.tensors import IMAGE, Signature, TensorSignature, signature_dims
from build_tasks.verification.class_outputs import class_outputs

if TYPE_CHECKING:
    from jinja2 import Template

PORTS = {"http": 8000, "grpc": 8001}  # Triton's defaults
# NumPy's names of types, and Triton's in requests. Others are the same in upper case.
# Source: the KServe protocol, "Tensor Data Types".
DTYPES = {"float16": "FP16", "float32": "FP32", "float64": "FP64", "string": "BYTES"}
TEMPLATE = "build_tasks/stages/templates/client.py.j2"
PREPROCESSING = "build_tasks/triton/preprocess_model/preprocessing.py"
OPTIONS = ("help", "url", "arrays")  # of a client, besides those for inputs that are pictures


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
            **({"labels": model.artifact(labels)} if (labels := labels_of_first(model)) else {}),
        },
        outputs={"folder": model.artifact(f"clients/{name}")},
        settings={
            "name": name,
            "top_k": model.spec.output.top_k,
            "sequences": sequences,
            "classes": first_is_classes(model),
            "by_name": bool(model.spec.inputs),
            "hidden": hidden_tensors(model, model_format),
            "ragged": bool(ragged_inputs(model.spec)),
            "batched": model_format in model.served_formats and model.largest_batch(model_format) > 0,
            "dims": {tensor: signature_dims(dims) for tensor, dims in client_dims(model.spec).items()},
        },
        tools=("jinja2",),
        modules=(__name__, "build_tasks.tensors", "build_tasks.triton.preprocess_model.preprocessing"),
        source_files=(TEMPLATE,),
        in_process=True,
    )
    return stage.task(doc=f"Example clients of {name}, over HTTP and gRPC")


def labels_of_first(model: Model) -> str | None:
    """Return the file in build/<model>/ with the labels of the first output; None without them."""
    files, outputs = label_files(model.spec), interface_of(model.spec)["outputs"]
    found = files.get("") or files.get(outputs[0]["name"] if outputs else "")
    return found[0] if found else None


def first_is_classes(model: Model) -> bool:
    """Return whether the first output of the shape (batch, n) is shown as classes, as [[outputs]] may deny."""
    outputs, classes = interface_of(model.spec)["outputs"], class_outputs(model)
    return not outputs or classes is None or outputs[0]["name"] in classes


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    first: Signature = read_json(inputs["first"])
    last: Signature = read_json(inputs["last"])
    tensors, results = (
        [
            as_clients_see(each, settings["dims"], batched=settings["batched"])
            for each in each_of
            if each["name"] not in settings["hidden"]
        ]
        for each_of in (first["inputs"], last["outputs"])
    )
    preprocessing = read_json(inputs["preprocessing"])
    folder = outputs["folder"]
    os.makedirs(folder)
    pictures = {} if tensors[0]["name"] == IMAGE else pictures_of(preprocessing, tensors, settings["dims"])
    if tensors[0]["name"] == IMAGE:
        sends, pictures = "encoded images", {IMAGE: preprocessing.get("files", [])}
    elif pictures:
        sends = "preprocessed images" if len(tensors) == 1 else "images and arrays"
        shutil.copyfile(PREPROCESSING, f"{folder}/preprocessing.py")
        shutil.copyfile(inputs["preprocessing"], f"{folder}/preprocessing.json")
    else:
        sends = "an array" if len(tensors) == 1 else "arrays"
    if "labels" in inputs:
        shutil.copyfile(inputs["labels"], f"{folder}/labels.txt")
    whole = any(each["shape"][0] == 1 and each["name"] in settings["dims"] for each in first["inputs"])
    settings = {**settings, "whole": whole}
    for protocol in PORTS:
        text = render(protocol, settings, tensors, results, sends, pictures, labels="labels" in inputs)
        with open(f"{folder}/{protocol}_client.py", "w", encoding="utf-8") as file:
            file.write(text)
    return {"clients": ", ".join(PORTS)}


def as_clients_see(tensor: TensorSignature, dims: dict[str, list[int]], *, batched: bool) -> TensorSignature:
    """Return a tensor in the dims that clients see. A fixed batch of 1 is part of them.

    Args:
        batched: Whether Triton batches the model, if its batch is open. Then it needs a dimension besides the batch.
    """
    if tensor["dtype"] == "bytes":  # of an ensemble
        tensor = {**tensor, "dtype": "string"}
    seen, batch = dims.get(tensor["name"]), tensor["shape"][:1]
    if seen:
        return {**tensor, "shape": [*(batch if batch != [1] else []), *seen]}
    return {**tensor, "shape": [-1, 1]} if batched and tensor["shape"] == [-1] else tensor


def pictures_of(
    preprocessing: dict[str, Any], tensors: list[TensorSignature], dims: Container[str]
) -> dict[str, list[str]]:
    """Return the endings of the image files of a sample for each input that the client prepares, by its name.

    An input is left out if no picture has its number of channels, or if clients see it in other dims.

    Args:
        preprocessing: The content of preprocessing.json: of the only picture, or by the names of inputs.
        tensors: The inputs.
        dims: The names of the inputs that clients see in other dims.
    """
    if isinstance(preprocessing.get("steps"), list):
        preprocessing = {tensors[0]["name"]: preprocessing}
    return {
        name: picture.get("files", [])
        for name, picture in preprocessing.items()
        if picture.get("color", ["rgb"]) and name not in dims
    }


def render(
    protocol: str,
    settings: Settings,
    tensors: list[TensorSignature],
    outputs: list[TensorSignature],
    sends: str,
    pictures: Mapping[str, Sequence[str]],
    *,
    labels: bool,
) -> str:
    """The source text of one client.

    Args:
        protocol: "http" or "grpc".
        settings: Those of the stage, and `whole`: whether the arrays have no batch, so that they are one request.
        tensors: The inputs of the model.
        outputs: The outputs of the model, which determine the lines that the client prints.
        sends: "encoded images", "preprocessed images", "images and arrays", "an array" or "arrays".
        pictures: The endings of the image files of one sample, for each input that is a picture. Empty: it is one file.
        labels: Whether labels.txt is beside the client.
    """
    shows, (first, *_) = "tensors", tensors[0]["shape"]
    if pictures and settings["top_k"]:
        shows = "ranked classes"
    elif pictures and len(outputs) == 1 and len(outputs[0]["shape"]) == 2 and settings["classes"]:
        shows = "classes"
    files = {name: [f"image{ending}" for ending in endings or [".jpg"]] for name, endings in pictures.items()}
    arrays = [each for each in tensors if each["name"] not in files]
    example = {
        "an array": "batch.npy",
        "arrays": "batch.npz",
        "images and arrays": " ".join(
            [*(f"{option_of(name)} {' '.join(images)} ..." for name, images in files.items())]
            + ["--arrays batch.npz"] * bool(arrays)
        ),
    }.get(sends, " ".join(f"{' '.join(images)} ..." for images in files.values()))
    with open(TEMPLATE, encoding="utf-8") as file:
        template = compile_template(file.read())
    return template.render(
        name=settings["name"],
        protocol=protocol,
        port=PORTS[protocol],
        sends=sends,
        source="images and arrays" if pictures and arrays else "images" if pictures else "a batch",
        example=example,
        counts={name: len(images) for name, images in files.items()},
        files=max(map(len, files.values()), default=1),
        options={name: option_of(name) for name in files},
        tensors=tensors,
        arrays=arrays,
        dtypes={each["name"]: DTYPES.get(each["dtype"], each["dtype"].upper()) for each in tensors},
        by_name=settings["by_name"],
        shows=shows,
        names=[output["name"] for output in outputs],
        outputs=", ".join(json.dumps(output["name"]) for output in outputs),
        labels=labels and shows != "tensors",
        sequences=settings["sequences"],
        ragged=settings["ragged"],
        whole=settings["whole"],
        size=1 if settings["sequences"] or settings["ragged"] else 0 if settings["whole"] else max(first, 0),
    )


def option_of(name: str) -> str:
    """Return the option of a client for the image files of an input."""
    return f"--input-{name}" if name in OPTIONS else f"--{name}"


@functools.cache  # compiling takes longer than all else in this stage
def compile_template(text: str) -> "Template":
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(text)
