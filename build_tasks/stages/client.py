"""client: for each model of Triton's, how to ask it -> build/<model>/clients/<name>/

http_client.py, grpc_client.py   a dozen lines each, that run as they stand
preprocessing.py, .json          what they do to a picture, as the network wants it
"""

import json
import os
import shutil
from typing import Any

from build_tasks.json_files import read_json
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage, source_files
from build_tasks.spec.model import Model
from build_tasks.tensors import IMAGE

PORTS = {"http": 8000, "grpc": 8001}
TYPES = {"bool": "BOOL", "float16": "FP16", "float32": "FP32", "float64": "FP64", "bytes": "BYTES"}

# {…} is filled in.
CLIENT = '''\
"""What {name} says to some {of}: python {protocol}_client.py {example}

Needs tritonclient[{protocol}]{needs}. TRITON_URL names another server than localhost:{port}.
"""

import os
import sys

import numpy as np
import tritonclient.{protocol} as triton
{imports}
batch = {batch}
tensor = triton.InferInput("{input}", list(batch.shape), "{type}")
tensor.set_data_from_numpy(batch)
client = triton.InferenceServerClient(os.environ.get("TRITON_URL", "localhost:{port}"))
answer = client.infer("{name}", [tensor])
{show}
'''

PICTURES = "np.stack([preprocess(path, read()) for path in sys.argv[1:]])"
BYTES = 'np.array([[open(path, "rb").read()] for path in sys.argv[1:]], dtype=object)'
TENSORS = "np.load(sys.argv[1])"

CLASSES = """\
for path, row in zip(sys.argv[1:], answer.as_numpy("OUTPUT__0")):
    print(path)
    for index in row.argsort()[::-1][:5]:
        print(f"{row[index]:10.4f}  {index}")"""
BEST = """\
for path, row, classes in zip(sys.argv[1:], answer.as_numpy("OUTPUT__0"), answer.as_numpy("OUTPUT__1")):
    print(path)
    for value, index in zip(row, classes):
        print(f"{value:10.4f}  {index}")"""
ANYTHING = """\
for name in [{names}]:
    print(name, answer.as_numpy(name))"""


def task(model: Model, model_format: str, files: list[str]) -> dict[str, Any]:
    """files: the artifacts that this model of Triton's is served from, or, of the ensemble, that its steps are."""
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
        settings={"name": name, "top_k": model.spec.output.top_k},
        tools=(),
        code=source_files("stages.client", "triton.preprocess_model.preprocessing"),
        in_process=True,
    )
    return stage.task(doc=f"How to ask {name}, over HTTP and gRPC")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    signatures = []
    for which in ("first", "last"):
        signatures.append(read_json(inputs[which]))
    (tensor,), answers = signatures[0]["inputs"], signatures[1]["outputs"]
    channels = read_json(inputs["preprocessing"])["input_size"][0]
    folder = outputs["folder"]
    os.makedirs(folder)
    encoded = tensor["name"] == IMAGE
    shown = not encoded and channels == 3
    if shown:
        shutil.copyfile("build_tasks/triton/preprocess_model/preprocessing.py", f"{folder}/preprocessing.py")
        shutil.copyfile(inputs["preprocessing"], f"{folder}/preprocessing.json")
    if "labels" in inputs:
        shutil.copyfile(inputs["labels"], f"{folder}/labels.txt")
    for protocol in PORTS:
        with open(f"{folder}/{protocol}_client.py", "w", encoding="utf-8") as file:
            file.write(
                client(protocol, tensor, answers, settings, encoded=encoded, shown=shown, labels="labels" in inputs)
            )
    return {"clients": ", ".join(PORTS)}


def client(
    protocol: str,
    tensor: dict[str, Any],
    answers: list[Any],
    settings: Settings,
    *,
    encoded: bool,
    shown: bool,
    labels: bool,
) -> str:
    """The example for one protocol. encoded: it takes encoded pictures; shown: pictures that the client prepares."""
    batch = BYTES if encoded else PICTURES if shown else TENSORS
    dtype = tensor["dtype"]
    if shown and dtype == "float16":
        batch += ".astype(np.float16)"
    if (size := tensor["shape"][0]) != -1:
        batch = f"np.resize({batch}, {tensor['shape']})  # its batch is always {size}"
    pictures = encoded or shown
    imports = "from preprocessing import preprocess, read  # beside this file\n" if shown else ""
    classes = len(answers) == 1 and len(answers[0]["shape"]) == 2
    show = BEST if settings["top_k"] else CLASSES if classes else ANYTHING
    if not pictures or not (settings["top_k"] or classes):
        show = ANYTHING.replace("{names}", ", ".join(json.dumps(answer["name"]) for answer in answers))
    elif labels:
        imports += '\nlabels = open(os.path.join(os.path.dirname(__file__), "labels.txt")).read().splitlines()'
        show = show.replace("  {index}", "  {labels[index]}")
    return CLIENT.format(
        name=settings["name"],
        of="pictures" if pictures else "tensors",
        protocol=protocol,
        example="picture.jpg ..." if pictures else f"batch.npy  ({dtype}, {tensor['shape']})",
        needs=" and Pillow" if shown else "",
        port=PORTS[protocol],
        imports=imports,
        batch=batch,
        input=tensor["name"],
        type=TYPES.get(dtype, dtype.upper()),
        show=show,
    )
