"""Mutated specs: a wrong one is refused in short lines, in no time, and never with a traceback."""

import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from build_tasks.errors import MAX_LINE, UNSAFE, UserError
from build_tasks.formats.ensemble_steps import steps_of
from build_tasks.spec.ensemble_tables import Ensemble, EnsembleStep
from build_tasks.spec.loader import load
from build_tasks.spec.model import Spec
from build_tasks.spec.tables import TorchScript, TritonKeys
from build_tasks.spec.tensor_tables import Dimension, TensorInput, TensorOutput
from build_tasks.stages import (
    client,
    config,
    engine,
    ensemble,
    labels,
    measure,
    onnx,
    precision,
    preprocess,
    publish,
    python_model,
    reference,
    weights,
)
from build_tasks.triton.model_config import protobuf
from build_tasks.triton.platforms import TRITON_MODELS
from tests.support import tensor_cases
from tests.support.project import ROOT, TINY
from tests.support.spec_cases import MISTAKES, VALID, spec

SECONDS = 5  # that one spec may take
TRITON = """
[triton]
release = "26.08"
instance_group = [{ count = 2, kind = "KIND_CPU" }]
dynamic_batching = { preferred_batch_size = [2, 4], max_queue_delay_microseconds = 100 }
parameters = { a = "b", c = 1.5 }
[triton.onnx]
max_batch_size = 4
version_policy = { latest = { num_versions = 1 } }
[[triton.onnx.model_warmup]]
name = "w"
batch_size = 1
inputs = { INPUT__0 = { zero_data = true, data_type = "TYPE_FP32", dims = [3, 8, 8] } }
"""
FULL = """
formats = ["torchscript", "onnx", "tensorrt", "rtx"]
max_batch_size = 8
ensemble = "onnx"
labels = "labels.txt"
[architecture]
network = "network.py:build"
arguments = { num_classes = 7, nested = { a = [1, 2.5, true] } }
[weights]
source = "https://host/path/weights.safetensors?signature=abc"
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
converter = "convert.py:convert"
[input]
format = "uint8_nhwc"
shape = [3, 96, 96]
min_size = [64, 64]
max_size = [128, 128]
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
interpolation = "bicubic"
crop_pct = 0.9
[output]
softmax = true
top_k = 5
[torchscript]
precision = "fp16"
[engine]
precision = "int8"
keep_fp32 = ["Conv", "/blocks/.*"]
calibration = "samples"
timing_cache = "timing.cache"
compute_capabilities = ["8.6"]
[accuracy]
samples = "samples"
truth = "truth.csv"
[[accuracy.gate]]
precision = "int8"
top1_drop = 0.01
"""
TENSORS = """
formats = ["torchscript", "onnx", "rtx"]
max_batch_size = 4
[architecture]
network = "network.py:build"
[weights]
source = "random://0"
[[inputs]]
name = "image"
shape = [3, "height", 64]
layout = "nchw"
color = "bgr"
mean = [0.5]
std = [0.5]
[[inputs]]
name = "ids"
dtype = "int64"
shape = ["length"]
dims = [1, "length"]
high = 99
[[inputs]]
name = "mask"
dtype = "int64"
shape = ["length"]
values = [1]
batch_dimension = 1
[dimensions]
height = { min = 32, opt = 64, max = 96 }
length = { max = 128 }
[[outputs]]
name = "logits"
key = "out.0"
classes = true
labels = "labels.txt"
[[outputs]]
name = "boxes"
dims = [4]
batch_dimension = 1
[ensemble]
outputs = ["best"]
samples = "samples.npz"
[[ensemble.steps]]
model = "m_onnx"
outputs = { logits = "scores" }
[[ensemble.steps]]
python = "best"
inputs = { SCORES = "scores" }
[[accuracy.gate]]
output = "logits"
relative_l2 = 0.1
"""
RAGGED = """
formats = ["onnx"]
max_batch_size = 4
[weights]
source = "m.onnx"
[[inputs]]
name = "values"
shape = ["length", 2]
ragged = true
[[inputs]]
name = "ends"
dtype = "int32"
shape = []
[dimensions]
length = { max = 9 }
[triton.onnx]
batch_output = [{ target_name = ["y"], source_input = ["values"] }]
[[triton.onnx.batch_input]]
kind = "BATCH_ELEMENT_COUNT"
target_name = ["ends"]
data_type = "TYPE_INT32"
source_input = ["values"]
[[ensemble.steps]]
model = "m_onnx"
inputs = { values = "v" }
outputs = { y = "w" }
"""
SEEDS = [*4 * [TINY, FULL, TENSORS, RAGGED, spec(), spec(top='formats = ["onnx", "torchscript"]', more=TRITON)], *VALID]
SEEDS += 2 * [spec(more="[triton]\ndynamic_batching = {}")]
SEEDS += [text for text, _ in MISTAKES[::10]]
SEEDS += [*tensor_cases.VALID, *(text for text, _ in tensor_cases.MISTAKES[::6])]
VALUES = [
    *("nan", "inf", "-inf", "1e400", "0", "-1", "1", "true", "1.5", "10" * 9, "9" * 5000, "0x" + "f" * 4000, "65537"),
    *(
        '""',
        '"\\u0000"',
        '"a\\u0000b"',
        '"\\u001b]0;x\\u0007"',
        '"\\u2028"',
        '"' + "x" * 100_000 + '"',
        '"é"',
        "'''a\nb'''",
    ),
    *(
        '"/"',
        '"/etc/passwd"',
        '"../../../etc/passwd"',
        '"."',
        '".."',
        '"/dev/zero"',
        '"fifo"',
        '"loop"',
        '"a/' * 1 + '"',
    ),
    *('"package://__main__/x"', '"package://sys/x"', '"package://torch//etc/passwd"', '"package://torch/../x"'),
    *('"https://user:password@host/file"', '"http://host/file"', '"https://host/a?b=secret"', '"hf://a/../c"'),
    *('"("', '"(?P<a"', '"a{99999999999}"', '"' + "(" * 500 + '"', '"*"', '"[a-"'),
    *("[]", "{}", "[[]]", "[" * 1000 + "]" * 1000, "[" * 40 + "]" * 40, "[1, 'a', 2.5]", "{ a = { b = 1 } }", "[{}]"),
    *(
        "1979-05-27",
        "07:32:00",
        "1979-05-27T07:32:00Z",
        "[1000000000000, 3, 3]",
        "[3, 65536, 65536]",
        "[nan]",
        "1000000000",
    ),
    *('"random://99999999999999999999999"', '"random://²"', '"timm://../../x"', '"file:///etc/passwd"', '"://x"'),
]
KEYS = [
    "triton",
    "onnx",
    "triton.onnx",
    "triton.ensemble",
    "engine",
    "weights",
    "accuracy.gate",
    "input",
    '"a b"',
    '"\\u0000"',
]


TABLES = {
    "": [field for field in Spec.__struct_fields__ if field != "weights"],
    **{
        name: get_type_hints(Spec)[name].__struct_fields__
        for name in ("input", "output", "onnx", "engine", "aoti", "accuracy")
    },
    "torchscript": TorchScript.__struct_fields__,
    "triton": (*TritonKeys.__struct_fields__, *protobuf().ModelConfig.DESCRIPTOR.fields_by_name, *TRITON_MODELS),
    "dimensions.length": Dimension.__struct_fields__,
    "[inputs]": TensorInput.__struct_fields__,
    "[outputs]": TensorOutput.__struct_fields__,
    "ensemble": Ensemble.__struct_fields__,
    "[ensemble.steps]": EnsembleStep.__struct_fields__,
    "triton.onnx": tuple(protobuf().ModelConfig.DESCRIPTOR.fields_by_name),
}


def mutate(text: str, generator: random.Random) -> bytes:
    """Return a spec after one to three random edits. Most of them leave it valid TOML."""
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        lines = text.split("\n")
        keys = [index for index, line in enumerate(lines) if "=" in line]
        index = generator.choice(keys) if keys else 0
        edit = generator.randrange(12)
        if edit <= 5:
            lines[index] = f"{lines[index].partition('=')[0]}= {generator.choice(VALUES)}"
        elif edit <= 7:
            table = generator.choice(list(TABLES))
            key = generator.choice(TABLES[table])
            line, header = f"{key} = {generator.choice(VALUES)}", f"[{table}]"
            lines = [line, *lines] if not table else [*lines, header, line] if header not in lines else lines
            if table and header in lines[:-2]:
                lines.insert(lines.index(header) + 1, line)
        elif edit == 8:
            del lines[index]
        elif edit == 9:
            lines.insert(index, lines[generator.choice(keys) if keys else 0])
        elif edit == 10:
            lines.insert(index, generator.choice(KEYS) + " = " + generator.choice(VALUES))
        else:
            position = generator.randrange(len(lines[index]) + 1)
            character = chr(
                generator.choice((0, 7, 27, 34, 61, 91, 93, 123, 0x85, 0x2028, generator.randrange(0xD7FF)))
            )
            lines[index] = lines[index][:position] + character + lines[index][position + generator.randrange(3) :]
        text = "\n".join(lines)
    content = text.encode()
    if generator.random() < 0.02:
        position = generator.randrange(len(content) + 1)
        content = content[:position] + bytes([generator.randrange(256)]) + content[position:]
    return content


def stages(model: Any) -> Iterator[Any]:
    """Create the tasks of a model, as dodo.py does."""
    yield weights.task(model)
    yield reference.task(model)
    if model.spec.labels:
        yield from labels.tasks(model)
    if model.spec.has_engine:
        yield precision.task(model, "int8")
        yield measure.task_of_graph(model, "int8")
    if "tensorrt" in model.spec.formats:
        yield from (engine.task(model, plan) for plan in model.plans)
    if "onnx" in model.spec.formats:
        yield onnx.task(model)
        yield publish.task(model, "onnx", ["model.onnx"])
        yield config.task(model, "onnx", ["model.onnx"])
        yield client.task(model, "onnx", ["model.onnx"])
    if model.steps:
        steps = steps_of(model, [model])
        yield from (config.ensemble_task(model, steps), ensemble.task(model, steps))
    if isinstance(model.spec.ensemble, str):
        yield preprocess.task(model)
    yield from python_model.tasks(model)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a model, with files that lead astray. The project's sources are in place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build_tasks").symlink_to(ROOT / "build_tasks")
    folder = tmp_path / "models/m"
    for name in ("samples", "best"):
        (folder / name).mkdir(parents=True)
    for name in ("config.pbtxt", "model.py"):
        (folder / "best" / name).touch()
    (folder / "m.onnx").touch()
    (folder / "labels.txt").write_text("a\nb\n")
    (folder / "network.py").write_text("")
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to(".")
    (folder / "samples/loop").symlink_to("..")
    (folder / "samples/again").symlink_to(".")
    return folder


def check(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Load mutated specs, and return how many were accepted and refused."""
    generator = random.Random(seed)
    totals = {"accepted": 0, "refused": 0, "longest": 0, "milliseconds": 0}
    for number in range(count):
        content = mutate(generator.choice(SEEDS), generator)
        (folder / "model.toml").write_bytes(content)
        lines: list[str] = []
        started = time.perf_counter()
        try:
            for model in load():
                for task in stages(model):
                    assert not re.search(UNSAFE, task["doc"])
        except UserError as error:
            lines = str(error).split("\n")
        except Exception as error:
            raise AssertionError(f"spec {number} of seed {seed}: {content[:3000]!r}") from error
        seconds = time.perf_counter() - started
        totals["refused" if lines else "accepted"] += 1
        totals["longest"] = max(totals["longest"], *map(len, lines), 0)
        assert all(line.startswith("models/m") and len(line) <= MAX_LINE for line in lines), (number, lines)
        assert not re.search("user:password|b=secret", " ".join(lines)), (number, lines)
        assert not re.search(UNSAFE, "".join(lines)), (number, lines)
        totals["milliseconds"] = max(totals["milliseconds"], round(1000 * seconds))
        assert seconds < SECONDS, (number, content[:3000])
    return totals


def test_a_mutated_spec_is_accepted_or_refused_in_short_lines(folder: Path) -> None:
    totals = check(folder, 400, seed=17)
    assert totals["accepted"] > 10
    assert totals["refused"] > 100


@pytest.mark.long
def test_20_000_mutated_specs_are_accepted_or_refused_in_short_lines(folder: Path) -> None:
    totals = check(folder, 20_000, seed=0)
    print(totals)
    assert totals["accepted"] > 1000
