"""Limits of time and size: a stage without end is ended, and an archive is refused before it is unpacked."""

import gzip
import io
import pickle
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm.models  # noqa: F401  # before the clock of a test runs
from onnx import TensorProto, helper

from build_tasks.errors import UserError
from build_tasks.formats import checkpoints
from build_tasks.runtime import worker
from build_tasks.runtime.limits import DEFAULTS, STAGE_TIME, UNPACKED_SIZE, limit
from build_tasks.verification.accuracy_samples import load_tensors
from tests.support.processes import add_with_converter, session_ended
from tests.support.project import OTHER, Project

# ---------------------------------------------------------------------------------------------------------------
# Archives


def deflated(path: Path, size: int) -> None:
    """Write a checkpoint of PyTorch that is compressed and holds `size` bytes of zeros."""
    import torch

    torch.save({"state_dict": {"a": torch.zeros(size // 4)}}, path.with_suffix(".stored"))
    with zipfile.ZipFile(path.with_suffix(".stored")) as stored, zipfile.ZipFile(path, "w", 8) as archive:
        for name in stored.namelist():
            archive.writestr(name, stored.read(name))


def overlapping(path: Path, size: int) -> None:
    """Write an archive that lists the same uncompressed bytes many times."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data/0", bytes(size // 50))
        archive.filelist *= 50


def claiming(path: Path, size: int) -> None:
    """Write an archive whose directory says that a few bytes unpack to `size`."""
    with zipfile.ZipFile(path, "w", 8) as archive:
        archive.writestr("INPUT__0.npy", b"a")
        archive.filelist[0].file_size = size


def samples(path: Path, size: int) -> None:
    np.savez_compressed(path, INPUT__0=np.zeros((size // 192, 8, 8, 3), np.uint8))


def read_checkpoint(path: Path) -> Any:
    return checkpoints.read_checkpoint(str(path))


def read_samples(path: Path) -> Any:
    return load_tensors(str(path), (3, 8, 8), "uint8_nhwc")


BOMBS = [
    (deflated, "a.pth", read_checkpoint),
    (overlapping, "a.pth", read_checkpoint),
    (claiming, "a.pth", read_checkpoint),
    (samples, "a.npz", read_samples),
    (claiming, "a.npz", read_samples),
]


@pytest.mark.parametrize(("write", "name", "read"), BOMBS, ids=[f"{write.__name__} {name}" for write, name, _ in BOMBS])
def test_an_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, int], None],
    name: str,
    read: Callable[[Path], Any],
) -> None:
    path = tmp_path / name
    write(path, 200_000_000)
    monkeypatch.setenv(UNPACKED_SIZE, "0.1")
    started = time.perf_counter()
    with pytest.raises(UserError) as error:
        read(path)
    assert time.perf_counter() - started < 1
    start, _, end = str(error.value).partition(" MB that unpack to 0.20 GB, ")
    assert start == f"{path}: {path.stat().st_size / 1e6:.1f}"
    assert end == "more than the 0.1 GB that BUILD_UNPACKED_SIZE allows; set it to more, or to 0 for no limit"


@pytest.mark.parametrize(("write", "name", "read"), [BOMBS[0], BOMBS[3]], ids=["checkpoint", "samples"])
@pytest.mark.parametrize("value", [None, "0", "0.21"])
def test_an_archive_within_the_limit_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, int], None],
    name: str,
    read: Callable[[Path], Any],
    value: str | None,
) -> None:
    write(tmp_path / name, 200_000_000)
    if value is not None:
        monkeypatch.setenv(UNPACKED_SIZE, value)
    assert len(read(tmp_path / name))


@pytest.mark.parametrize(("name", "read"), [("a.pth", read_checkpoint), ("a.npz", read_samples)])
def test_the_default_limit_refuses_a_bomb(tmp_path: Path, name: str, read: Callable[[Path], Any]) -> None:
    claiming(tmp_path / name, 10**12)
    with pytest.raises(UserError, match=r"0\.0 MB that unpack to 1,000\.00 GB, more than the 4 GB that BUILD_UNP"):
        read(tmp_path / name)


def test_an_archive_without_compression_may_be_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv(UNPACKED_SIZE, "1e-9")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pth")
    np.savez(tmp_path / "a.npz", np.zeros((2, 8, 8, 3), np.uint8))
    assert read_checkpoint(tmp_path / "a.pth")["a"].shape == (1000,)
    assert read_samples(tmp_path / "a.npz").shape == (2, 8, 8, 3)


def lying(path: Path, size: int) -> None:
    """Write an archive whose directory says that 200 MB of zeros are `size` bytes."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((200_000_000 // 192, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(path, "w", 8) as archive:
        archive.writestr("INPUT__0.npy", buffer.getvalue())
        archive.filelist[0].file_size = size


def tar(path: Path, size: int) -> None:
    """Write an archive in the oldest format of PyTorch, with a member that is much larger than the file."""
    member = tarfile.TarInfo("storages")
    member.size = size
    path.write_bytes(member.tobuf() + bytes(10240))


def gzipped(path: Path, size: int) -> None:
    path.write_bytes(gzip.compress(bytes(size)))


def array(path: Path, size: int) -> None:
    """Write an uncompressed archive with an array whose header says that it is of `size` bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "|u1", "fortran_order": False, "shape": (size // 192, 8, 8, 3)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("INPUT__0.npy", buffer.getvalue())


def header(path: Path, size: int) -> None:
    """Write a safetensors file whose header says that it is as long as `size` bytes."""
    path.write_bytes(struct.pack("<Q", size) + b"{}")


def tensor(path: Path, size: int) -> None:
    """Write a safetensors file whose header says that it holds a tensor of `size` bytes."""
    text = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def storage(path: Path, size: int) -> None:
    """Write a pickle that asks for a buffer of `size` bytes."""
    path.write_bytes(pickle.dumps(Buffer(size), protocol=2))


class Buffer:
    def __init__(self, size: int):
        self.size = size

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return bytearray, (self.size,)


@pytest.mark.parametrize(
    ("write", "name", "read"),
    [
        (lying, "a.npz", read_samples),
        (array, "a.npz", read_samples),
        (lying, "a.npz", read_checkpoint),
        (tar, "a.pth", read_checkpoint),
        (gzipped, "a.pth", read_checkpoint),
        (header, "a.safetensors", read_checkpoint),
        (tensor, "a.safetensors", read_checkpoint),
        (storage, "a.pth", read_checkpoint),
    ],
)
def test_a_file_that_claims_another_size_is_refused(
    tmp_path: Path, write: Callable[[Path, int], None], name: str, read: Callable[[Path], Any]
) -> None:
    write(tmp_path / name, 1000 if write is lying else 10**6 if write is gzipped else 10**15)
    started = time.perf_counter()
    with pytest.raises(UserError, match="cannot be read as"):
        read(tmp_path / name)
    assert time.perf_counter() - started < 2


# ---------------------------------------------------------------------------------------------------------------
# Time


def endless(path: Path) -> None:
    """Write an ONNX file whose loop runs 2**63 times."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["again"]), helper.make_node("Add", ["x", "x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 8, 8]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["", "true", "image"], ["scores"], body=body)],
        "endless",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor("true", TensorProto.BOOL, [], [True])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


ONNX_SPEC = (
    'formats = ["onnx"]\n[weights]\nsource = "net.onnx"\n[input]\nshape = [3, 8, 8]\nmean = [0.5]\nstd = [0.5]\n'
)


@pytest.mark.skipif(sys.platform != "linux", reason="lists the processes of a session")
def test_a_stage_without_end_is_ended_and_other_models_are_built(project: Project, tiny_weights: Path) -> None:
    """One loops in ONNX Runtime's native code, one in Python, and one waits."""
    endless(project.model("native", ONNX_SPEC) / "net.onnx")
    add_with_converter(project, tiny_weights, "while True: pass", name="python")
    add_with_converter(project, tiny_weights, "import time; time.sleep(3600)", name="waiting")
    project.model("other", OTHER)
    tasks = [f"weights:{name}" for name in ("native", "python", "waiting", "other")]
    process = project.start("-n", "3", *tasks, BUILD_STAGE_TIME="0.25")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1, out
    for name in ("native", "python", "waiting"):
        log = f"build/{name}/logs/weights.{name}.log"
        reason = (
            "it takes longer than 0.25 minutes, as BUILD_STAGE_TIME allows for a stage; set it to more, or to 0 for no "
            f"limit (the log: {log})"
        )
        assert reason in out
    assert session_ended(process.pid)
    assert (project / "build/other/weights.safetensors").exists()
    assert not [path for path in project.tree("build") if "scratch" in path or "weights.onnx" in path]


def test_the_limit_of_a_stage_s_time_can_be_off(project: Project) -> None:
    project.model("other", OTHER)
    assert project.built("weights:other", BUILD_STAGE_TIME="0").ran == ["weights:other"]


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


@pytest.mark.parametrize("minutes", ["0", "0.5", "1e300", "inf"])
def test_a_call_within_the_limit_has_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: str) -> None:
    monkeypatch.setenv(STAGE_TIME, minutes)
    assert worker.call(sleep, 0.1, log=str(tmp_path / "log")) == "done"


def test_defaults_hold_without_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, (default, _) in DEFAULTS.items():
        monkeypatch.delenv(variable, raising=False)
        assert limit(variable) == default
        monkeypatch.setenv(variable, "0")
        assert limit(variable) == float("inf")
