"""How much faster an ensemble's Python model prepares a batch of pictures in threads than one picture after the other.

    doit tritonserver && python benchmarks/pictures.py
    doit tritonserver efficientnet_lite0 && python benchmarks/pictures.py --model efficientnet_lite0

The second form compares the ensemble of a published model, which gets pictures, with its ONNX model, which gets tensors
that are ready, in the stub for ONNX Runtime.

One client sends batches to Triton's core from PyPI. Two models take turns, so that other work on the machine slows
both: the published one, and a copy of it with one thread. Their answers must be equal in every bit. The benchmark
prints pictures per second of both, and the ratio.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_tasks.serving import triton_core, triton_server  # noqa: E402
from build_tasks.serving.triton_client import Client, Tensors  # noqa: E402

PHOTOGRAPHS = sorted((ROOT / "build_tasks/verification/photographs").glob("*.jpg"))
MODEL = ROOT / "build_tasks/triton/preprocess_model"
PREPROCESSING = {
    "input_size": [3, 288, 288], "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic",
    "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "format": "fp32_nchw",
}  # fmt: skip
CONFIG = """
name: "{name}" backend: "python" max_batch_size: 64
input {{ name: "IMAGE" data_type: TYPE_STRING dims: 1 }}
output {{ name: "INPUT__0" data_type: TYPE_FP32 dims: [3, 288, 288] }}
instance_group {{ kind: KIND_CPU count: 2 }}
"""
TENSORS = Tensors({"IMAGE": "BYTES"}, ["INPUT__0"])


def write_model(name: str, threads: str) -> None:
    """Write the Python model, with a value of THREADS."""
    folder = pathlib.Path("model_repository") / name
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(CONFIG.format(name=name))
    code = (MODEL / "model.py").read_text()
    line = next(line for line in code.splitlines() if line.startswith("THREADS = "))
    (folder / "1/model.py").write_text(code.replace(line, threads or line))
    shutil.copy(MODEL / "preprocessing.py", folder / "1")
    (folder / "1/preprocessing.json").write_text(json.dumps(PREPROCESSING))


def measure(client: Client, batch: np.ndarray, requests: int) -> dict[str, float]:
    """Return the pictures per second of both models: the median over the requests."""
    seconds: dict[str, list[float]] = {"threads": [], "one_thread": []}
    answers = {}
    for _ in range(requests):
        for name, times in seconds.items():
            start = time.perf_counter()
            _, (answers[name],) = client.infer(name, TENSORS, {"IMAGE": batch})
            times.append(time.perf_counter() - start)
    if not np.array_equal(answers["threads"], answers["one_thread"]):
        raise SystemExit("the answers differ")
    return {name: len(batch) / statistics.median(times) for name, times in seconds.items()}


def compare_with_onnx(name: str, requests: int) -> None:
    """Print the pictures per second of the parts of an ensemble and of the whole, in turns."""
    from polygraphy.json import load_json

    photographs = [path.read_bytes() for path in PHOTOGRAPHS]
    prepared = load_json(f"build/{name}/samples.json")[0]["INPUT__0"]
    models = [f"{name}_{part}" for part in ("onnx", "preprocess", "ensemble")]
    with triton_server.start("core", "24.10", triton_server.free_ports(), "build/server.log", stubs=True) as server:
        for model in models:
            if reason := server.load(model):
                raise SystemExit(reason)
        client = Client("HTTP", server.http)
        tensors = {model: client.tensors(model) for model in models}
        for size in (1, 8, 32):
            pictures = np.array([[photographs[index % len(photographs)]] for index in range(size)], object)
            seconds: dict[str, list[float]] = {model: [] for model in models}
            for _ in range(requests):
                for model, times in seconds.items():
                    batch = prepared[np.arange(size) % len(prepared)] if model == models[0] else pictures
                    start = time.perf_counter()
                    client.infer(model, tensors[model], dict.fromkeys(tensors[model].input_types, batch))
                    times.append(time.perf_counter() - start)
            rates = {model: size / statistics.median(times) for model, times in seconds.items()}
            text = ", ".join(f"{model} {rate:.1f}" for model, rate in rates.items())
            print(f"batch {size:2}: pictures/s of {text}; ensemble/onnx {rates[models[2]] / rates[models[0]]:.2f}")
        client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=30, help="requests of each batch to each model")
    parser.add_argument("--model", help='a published model with ensemble = "onnx", to compare with its ONNX model')
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if not triton_core.installed():
        raise SystemExit(f"there is no {triton_core.CORE}; `doit tritonserver` fetches it")
    if arguments.model:
        print(f"{len(os.sched_getaffinity(0))} cores")
        compare_with_onnx(arguments.model, arguments.requests)
        return
    core = os.path.abspath(triton_core.CORE)
    photographs = [path.read_bytes() for path in PHOTOGRAPHS]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.makedirs("build")
        os.symlink(core, triton_core.CORE)
        write_model("threads", "")
        write_model("one_thread", "THREADS = 1")
        with triton_server.start("core", "24.10", triton_server.free_ports(), "build/server.log") as server:
            for name in ("threads", "one_thread"):
                if reason := server.load(name):
                    raise SystemExit(reason)
            client = Client("HTTP", server.http)
            print(f"{len(os.sched_getaffinity(0))} cores")
            for size in (1, 8, 32):
                batch = np.array([[photographs[index % len(photographs)]] for index in range(size)], object)
                rates = measure(client, batch, arguments.requests)
                ratio = rates["threads"] / rates["one_thread"]
                print(
                    f"batch {size:2}: {rates['threads']:6.1f} pictures/s in threads, {rates['one_thread']:6.1f} in one "
                    f"thread, ratio {ratio:.2f}"
                )
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
