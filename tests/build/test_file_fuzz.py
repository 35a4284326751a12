"""Mutated files of each kind that a build reads: they are read, or refused in a short line, in no time.

a small valid file ─► one to three random edits ─► the code that reads such files ─► a result, or a UserError

They are read in a process that worker.call starts, as those of stages are: a crash of native code is a failed task.
"""

import base64
import io
import os
import pickle
import random
import re
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image, PngImagePlugin

from build_tasks.errors import MAX_LINE, UNSAFE, UserError
from build_tasks.formats import checkpoints, lock_file, picture_transform, state_dicts
from build_tasks.report.sample_table import thumbnail
from build_tasks.runtime import worker
from build_tasks.spec.model import Model, Spec
from build_tasks.spec.tables import Input, Weights
from build_tasks.stages import labels, weights
from build_tasks.triton.preprocess_model.preprocessing import PictureError, preprocess
from build_tasks.verification import accuracy_samples
from tests.support.project import ROOT, fork_server

SECONDS = 5  # that one file may take
SIDE = 8
CONFIG: dict[str, Any] = {
    "input_size": (3, SIDE, SIDE), "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center",
    "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
}  # fmt: skip
LABELS = [f"class {index}" for index in range(20)]
NAMES = [f"{index}.jpg" for index in range(20)]
NOT_FITTING = ("empty.pth", "pickle.pth", "b.safetensors")  # seeds that are valid files, and no weights of STATE
TOTALS = ("accepted", "refused", "crashed", "longest", "milliseconds")
STATE = {
    "conv.weight": (4, 3, 3, 3),
    "conv.bias": (4,),
    **{f"norm.{name}": (4,) for name in ("weight", "bias", "running_mean", "running_var")},
}
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1]
WORDS = [
    b"\0", b"\x1b[31m", b"\xff\xfe", "\u2028".encode(), b"\xef\xbb\xbf", b"\r", b"\n\n", b"\t", b'"', b"'", b",", b"=",
    b"[" * 3000, b"{" * 3000, b'{"a":' * 3000, b"9" * 5000, b"-1", b"nan", b"1e999", b"null", b"true", b"a" * 200_000,
]  # fmt: skip


class Kind(NamedTuple):
    """A kind of file: valid ones by name, what reads them, and edits of its inner parts besides those of any bytes."""

    seeds: Callable[[], dict[str, bytes]]
    read: Callable[[Path], object]
    edit: Callable[[bytes, random.Random], bytes] | None = None


# ---------------------------------------------------------------------------------------------------------------
# Edits


def edit_bytes(content: bytes, generator: random.Random) -> bytes:
    """Return any content with one random edit."""
    data, kind = bytearray(content), generator.randrange(9)
    start = generator.randrange(len(data) + 1)
    end = min(len(data), start + generator.choice((1, 2, 4, 8, 64, 1000)))
    if kind <= 2:
        for _ in range(generator.choice((1, 1, 4, 16))):
            if data:
                data[generator.randrange(len(data))] = generator.randrange(256)
    elif kind == 3:
        del data[start:]
    elif kind == 4:
        del data[start:end]
    elif kind == 5:
        data[start:start] = data[start:end] * generator.choice((1, 2, 300))
    elif kind == 6:
        length, order = generator.choice((1, 2, 4, 8)), generator.choice(("<", ">"))
        number = generator.choice(NUMBERS) % 2 ** (8 * length)
        data[start : start + length] = struct.pack(order + {1: "B", 2: "H", 4: "I", 8: "Q"}[length], number)
    elif kind == 7:
        data[start:start] = generator.choice(WORDS)
    else:
        data[start:end] = generator.randbytes(end - start)
    return bytes(data)


def edit_png(content: bytes, generator: random.Random) -> bytes:
    """Return a PNG with one of its chunks edited, and valid checksums."""
    if not content.startswith(b"\x89PNG"):
        return edit_bytes(content, generator)
    chunks, position = [], 8
    while position + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        chunks.append((content[position + 4 : position + 8], content[position + 8 : position + 8 + length]))
        position += 12 + length
    index = generator.randrange(len(chunks))
    name, data = chunks[index]
    chunks[index] = name, edit_bytes(data, generator)
    if generator.random() < 0.2:
        chunks.insert(generator.randrange(len(chunks)), chunks[index])
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def edit_zip(content: bytes, generator: random.Random) -> bytes:
    """Return an archive with one of its members edited, and valid checksums."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError, RuntimeError, zlib.error):
        return edit_bytes(content, generator)
    index = generator.choice([index for index, (name, _) in enumerate(members) if name.endswith(("pkl", "npy"))] or [0])
    members[index] = members[index][0], edit_bytes(members[index][1], generator)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", generator.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def edit_header(content: bytes, generator: random.Random) -> bytes:
    """Return a safetensors file with its header edited, and the length of the header as it is then."""
    length = int.from_bytes(content[:8], "little")
    header = edit_bytes(content[8 : 8 + length], generator)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def edit_array(content: bytes, generator: random.Random) -> bytes:
    """Return a file of Polygraphy's with one of its encoded arrays edited; other samples as `edit_zip` does."""
    if content.startswith(b"PK"):
        return edit_zip(content, generator)
    found = [*re.finditer(rb'"(?:array|tensor)": "([A-Za-z0-9+/]*)=*"', content)]
    if not found:
        return edit_bytes(content, generator)
    match = generator.choice(found)
    array = edit_bytes(base64.b64decode(match[1][: len(match[1]) // 4 * 4]), generator)
    return content[: match.start(1)] + base64.b64encode(array) + content[match.end(1) :]


def mutate(kind: Kind, content: bytes, generator: random.Random) -> bytes:
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        edit = kind.edit if kind.edit and generator.random() < 0.6 else edit_bytes
        content = edit(content, generator)
    return content


# ---------------------------------------------------------------------------------------------------------------
# Valid files


def pictures() -> dict[str, bytes]:
    files = {}
    photograph = Image.open(ROOT / accuracy_samples.SHIPPED_PHOTOGRAPHS / "coffee.jpg").resize((40, 30))
    second = photograph.rotate(180)
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 1000, zip=True)
    text.add_itxt("c", "d" * 1000, zip=True)
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010E: "description", 0x8769: {0x9000: b"0230"}})
    variants: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("JPEG", photograph, {"exif": exif, "icc_profile": bytes(500), "comment": "a"}),
        ("JPEG", photograph, {"progressive": True, "dpi": (300, 300)}),
        ("JPEG", photograph.convert("CMYK"), {}),
        ("JPEG", photograph.convert("L"), {}),
        ("MPO", photograph, {"save_all": True, "append_images": [second]}),
        ("PNG", photograph, {"pnginfo": text, "exif": exif, "icc_profile": bytes(500)}),
        ("PNG", photograph.quantize(16), {"transparency": bytes(16)}),
        ("PNG", photograph.convert("RGBA"), {"save_all": True, "append_images": [second.convert("RGBA")]}),
        ("PNG", Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), {}),
        ("PNG", photograph.convert("1"), {}),
        ("WEBP", photograph, {"save_all": True, "append_images": [second], "exif": exif}),
        ("WEBP", photograph, {"lossless": True}),
        ("BMP", photograph, {}),
        ("BMP", photograph.quantize(16), {}),
    ]
    for index, (file_format, image, options) in enumerate(variants):
        buffer = io.BytesIO()
        image.save(buffer, file_format, **options)
        files[f"{index}.{ {'JPEG': 'jpg', 'MPO': 'jpg'}.get(file_format, file_format.lower()) }"] = buffer.getvalue()
    return files


def tensors() -> dict[str, Any]:
    import torch

    return {key: torch.zeros(shape) for key, shape in STATE.items()}


def checkpoint_files() -> dict[str, bytes]:
    import torch

    states = {
        "zip": (tensors(), {}),
        "wrapped": ({"epoch": 7, "state_dict": tensors(), "args": ["a", 1.5, None]}, {}),
        "old": (tensors(), {"_use_new_zipfile_serialization": False}),
        "empty": ({}, {}),
    }
    files = {}
    for name, (state, options) in states.items():
        buffer = io.BytesIO()
        torch.save(state, buffer, **options)
        files[f"{name}.pth"] = buffer.getvalue()
    return {**files, "pickle.pth": pickle.dumps({"a": [1, 2.5, "b"]}, protocol=2)}


def safetensors() -> dict[str, bytes]:
    from safetensors.torch import save

    return {"a.safetensors": save(tensors(), {"format": "pt"}), "b.safetensors": save({})}


def graphs() -> dict[str, bytes]:
    float32 = TensorProto.FLOAT
    image = helper.make_tensor_value_info("image", float32, ["n", 3, SIDE, SIDE])
    scores = helper.make_tensor_value_info("scores", float32, ["n", 4])
    weight = helper.make_tensor("weight", float32, (4, 3, 3, 3), np.ones(108, np.float32).tobytes(), raw=True)
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["a"], name="conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["scores"], axis=1),
    ]
    then = helper.make_graph([helper.make_node("Relu", ["c"], ["d"])], "then", [], [_info("d")])
    other = helper.make_graph([helper.make_node("Neg", ["c"], ["e"])], "else", [], [_info("e")])
    branches = [
        *nodes[:3],
        helper.make_node("If", ["yes"], ["f"], then_branch=then, else_branch=other),
        helper.make_node("Flatten", ["f"], ["scores"], axis=1),
    ]
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    files = {}
    for name, parts, constants in (("plain", nodes, [weight]), ("branches", branches, [weight, yes])):
        graph = helper.make_graph(parts, name, [image], [scores], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        files[f"{name}.onnx"] = model.SerializeToString()
    return files


def _info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def label_files() -> dict[str, bytes]:
    names = [*LABELS, "tench, Tinca tinca", "猫", "sea lion"]
    return {"a.txt": "\n".join(names).encode(), "b.txt": b"\xef\xbb\xbf" + "\r\n".join(names).encode("utf-8")}


def truth_files() -> dict[str, bytes]:
    pairs = [*zip(NAMES, LABELS, strict=True)]
    return {
        "a.csv": "\n".join(f"{name},{label}" for name, label in pairs).encode(),
        "b.csv": "\r\n".join(f'"{name}",{index}' for index, (name, _) in enumerate(pairs)).encode(),
    }


def sample_files() -> dict[str, bytes]:
    from polygraphy.json import to_json

    batch = np.zeros((2, 3, SIDE, SIDE), np.float32)
    files = {}
    for name, save in (("a", np.savez), ("b", np.savez_compressed)):
        buffer = io.BytesIO()
        save(buffer, INPUT__0=batch)
        files[f"{name}.npz"] = buffer.getvalue()
    import torch

    files["a.json"] = to_json([{"INPUT__0": batch}]).encode()
    files["b.json"] = to_json([{"INPUT__0": torch.from_numpy(batch)}]).encode()
    return files


def lock_files() -> dict[str, bytes]:
    lists = '\n[int8]\nkeep_fp32 = [\n    "/conv/Conv",\n    "b",\n]\n[fp16]\nkeep_fp32 = []\n'
    return {"keep_fp32.lock": (lock_file.HEADER.format("m") + lists).encode()}


# ---------------------------------------------------------------------------------------------------------------
# Readers


def read_picture(path: Path) -> object:
    """Read a picture as the published model, the report, and the reference do."""
    message = ""
    try:
        preprocess(path.read_bytes(), {"format": "fp32_nchw", **CONFIG})
    except PictureError as error:
        message = str(error)
    assert len(message) < MAX_LINE
    assert "\n" not in message
    thumbnail(str(path))
    return accuracy_samples.preprocess([[str(path)]], picture_transform.transform(CONFIG, "fp32_nchw"), CONFIG)


def read_weights(path: Path) -> object:
    import torch

    network = torch.nn.Module()
    network.conv = torch.nn.Conv2d(3, 4, 3)
    network.norm = torch.nn.BatchNorm2d(4)
    return state_dicts.fit(checkpoints.read_checkpoint(str(path)), network, str(path), path=str(path))


def read_graph(path: Path) -> object:
    spec = Spec(weights=Weights(source="m.onnx"), input=Input(shape=[3, SIDE, SIDE]), formats=["onnx"])
    settings = weights.stage(Model("m", spec)).settings
    settings["weights"]["source"] = str(path)
    return weights.build_from_onnx({"source": str(path)}, {"weights": str(path.parent / "draft.onnx")}, settings)


def read_truth(path: Path) -> object:
    return accuracy_samples.read_truth(str(path), NAMES, LABELS)


def read_samples(path: Path) -> object:
    return accuracy_samples.load_tensors(str(path), (3, SIDE, SIDE), "fp32_nchw")


def read_lock(path: Path) -> object:
    tables = lock_file.read_lock(str(path))
    lock_file.overwrite_error(str(path))
    return tables


def read_labels(path: Path) -> object:
    return labels.read_labels(str(path))


KINDS = {
    "pictures": Kind(pictures, read_picture, edit_png),
    "checkpoints": Kind(checkpoint_files, read_weights, edit_zip),
    "safetensors": Kind(safetensors, read_weights, edit_header),
    "onnx": Kind(graphs, read_graph),
    "labels": Kind(label_files, read_labels),
    "truth": Kind(truth_files, read_truth),
    "samples": Kind(sample_files, read_samples, edit_array),
    "lock files": Kind(lock_files, read_lock),
}


@pytest.fixture(autouse=True)
def preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of stages come from the fork server of the tests, which has imported the heavy libraries."""
    server: Any = forkserver._forkserver
    monkeypatch.setattr(server, "_forkserver_address", fork_server())
    monkeypatch.setattr(server, "_forkserver_alive_fd", os.pipe()[1])
    monkeypatch.setattr(server, "ensure_running", resource_tracker.ensure_running)


def read_files(name: str, folder: Path, numbers: range, seed: int) -> dict[str, int]:
    """Read mutated files of a kind, and return how many were accepted and refused. It runs in a process of its own."""
    warnings.simplefilter("ignore")
    kind = KINDS[name]
    seeds = kind.seeds()
    for file, content in seeds.items():  # the valid ones are read, which also loads the libraries
        (folder / file).write_bytes(content)
        if file not in NOT_FITTING:
            kind.read(folder / file)
    totals = dict.fromkeys(TOTALS, 0)
    for number in numbers:
        (folder / "number").write_text(str(number))
        generator = random.Random(f"{seed} {number}")
        file = generator.choice(list(seeds))
        path, message = folder / file, ""
        path.write_bytes(mutate(kind, seeds[file], generator))
        started = time.perf_counter()
        try:
            kind.read(path)
        except UserError as error:
            message = str(error)
        except Exception as error:
            raise AssertionError(f"{name} {number} of seed {seed}: {type(error).__name__}: {error}") from error
        milliseconds = round(1000 * (time.perf_counter() - started))
        totals["refused" if message else "accepted"] += 1
        totals["longest"] = max(totals["longest"], len(message))
        totals["milliseconds"] = max(totals["milliseconds"], milliseconds)
        assert len(message) <= MAX_LINE, (number, message)
        assert "Traceback" not in message, (number, message)
        assert not re.search(UNSAFE + "|\n", message), (number, message)
        assert milliseconds < 1000 * SECONDS, (number, file, milliseconds)
    return totals


def check(name: str, folder: Path, count: int, seed: int) -> dict[str, int]:
    """Read mutated files of a kind, and return what became of them.

    A file that crashes native code ends the process, as it would end a stage. Another process reads the rest.
    """
    totals, first = dict.fromkeys(TOTALS, 0), 0
    while first < count:
        try:
            found = worker.call(read_files, name, folder, range(first, count), seed, log=str(folder / "log"))
        except worker.CrashError as error:
            message = str(error)
            assert re.match("the stage's process was killed by SIG(SEGV|ABRT|BUS|FPE)\n", message), message
            assert "Traceback" not in message
            found = dict.fromkeys(TOTALS, 0) | {"crashed": 1}
            first = int((folder / "number").read_text()) + 1
        else:
            first = count
        for key in ("accepted", "refused", "crashed"):
            totals[key] += found[key]
        for key in ("longest", "milliseconds"):
            totals[key] = max(totals[key], found[key])
    return totals


@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_file_is_read_or_refused_in_a_short_line(name: str, tmp_path: Path) -> None:
    totals = check(name, tmp_path, 60, seed=17)
    assert totals["refused"] > 10
    assert totals["accepted"] + totals["refused"] + totals["crashed"] == 60


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_2000_mutated_files_are_read_or_refused_in_a_short_line(name: str, tmp_path: Path) -> None:
    totals = check(name, tmp_path, 2000, seed=0)
    print(name, totals)
    assert totals["refused"] > 100


def named(name: str) -> bytes:
    """Return a pickle that asks for a class with this name."""
    return b"\x80\x02c" + name.encode() + b"\nb\n."


def zipped(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def before_zip(pickled: bytes) -> bytes:
    """Return a checkpoint in the format before PyTorch 1.6: a magic number, a version, facts, and the content."""
    return b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})) + pickled


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.pth", zipped(named("a" * 200_000)), "expected names of at most 1000 characters, found 'aaaa"),
        ("a.pth", before_zip(named("a" * 200_000)), "expected names of at most 1000 characters, found 'aaaa"),
        ("a.pth", zipped(named("os")), "wants the class os.b, and could execute code"),
        ("a.pth", before_zip(named("os")), "wants the class os.b, and could execute code"),
        ("a.csv", b"1.jpg," + b"9" * 5000, "line 1: expected the index of a class, found 999"),
        ("a.lock", b"a = " + b"[" * 3000 + b"]" * 3000, "is not what `doit repair` writes (maximum recursion depth"),
        ("a.lock", b"a = " + b"9" * 5000, "is not what `doit repair` writes (Exceeds the limit"),
    ],
)
def test_what_the_mutations_found_is_refused(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    path = _written(tmp_path / file, content)
    read_weights(_written(tmp_path / "b.pth", checkpoint_files()["zip.pth"]))  # loads the libraries
    started = time.perf_counter()
    with pytest.raises(UserError) as error:
        {".pth": read_weights, ".lock": read_lock, ".csv": read_truth}[path.suffix](path)
    assert message in str(error.value)
    assert len(str(error.value)) <= MAX_LINE
    assert time.perf_counter() - started < SECONDS
