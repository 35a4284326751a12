"""Samples of any inputs from files of arrays: what they may hold, and the line for each that is damaged."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from polygraphy.json import save_json

from build_tasks.errors import UserError
from build_tasks.tensors import InputTensor, Range
from build_tasks.verification.tensor_samples import Sample, group, read_samples


def tensor(name: str, dtype: str, *shape: int | str, low: int | None = None, high: int | None = None) -> InputTensor:
    return {
        **{"layout": None, "values": None, "batch_dimension": 0},  # type: ignore[typeddict-item]
        "name": name, "dtype": dtype, "shape": [*shape], "low": low, "high": high,
    }  # fmt: skip


IDS = tensor("ids", "int64", "length", low=0, high=99)
MASK = tensor("mask", "bool", "length")
VECTOR = tensor("vector", "float32", 3)
LENGTH: dict[str, Range] = {"length": {"min": 2, "opt": 4, "max": 8}}


def read(path: Path, *inputs: InputTensor, name: str = "") -> list[Sample]:
    return [*read_samples([str(path)], [name], inputs, LENGTH)]


def test_a_file_holds_one_sample_or_many(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, ids=np.arange(5), mask=np.ones(5, bool), comment="not an input")
    [sample] = read(path, IDS, MASK, name="a.npz")
    assert (sample.name, sample.arrays["ids"].tolist()) == ("a.npz", [0, 1, 2, 3, 4])
    np.savez(path, ids=np.arange(6, dtype=np.int32).reshape(2, 3), mask=np.ones((2, 3), bool))
    samples = read(path, IDS, MASK, name="a.npz")
    assert [sample.name for sample in samples] == ["a.npz[0]", "a.npz[1]"]
    assert [sample.arrays["ids"].tolist() for sample in samples] == [[0, 1, 2], [3, 4, 5]]
    assert samples[0].arrays["ids"].dtype == np.int64
    np.savez(path, anything=np.zeros((2, 3)))
    assert [sample.name for sample in read(path, VECTOR)] == ["0", "1"]


def test_the_runs_of_polygraphy_may_differ_in_length(tmp_path: Path) -> None:
    path = tmp_path / "inputs.json"
    feeds = [{"ids": np.arange(2 * n).reshape(2, n), "mask": np.ones((2, n), bool)} for n in (3, 5, 3)]
    save_json(feeds, str(path))
    groups = group(read(path, IDS, MASK))
    assert [names for names, _ in groups] == [["0", "1", "4", "5"], ["2", "3"]]
    assert [arrays["ids"].shape for _, arrays in groups] == [(4, 3), (2, 5)]


def test_strings_are_texts(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", text=np.array(["one", "two"]))
    [(names, arrays)] = group(read(tmp_path / "a.npz", tensor("text", "string")))
    assert names == ["0", "1"]
    assert arrays["text"].tolist() == ["one", "two"]


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def lying_header() -> bytes:
    """Return an .npz whose array has a header of more values than there are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = io.BytesIO()
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (10**13, 3)})
        archive.writestr("vector.npy", member.getvalue() + bytes(12))
    return buffer.getvalue()


BOTH = {"ids": np.arange(4), "mask": np.ones(4, bool)}
WRONG: dict[str, tuple[bytes, tuple[InputTensor, ...], str]] = {
    "nothing": (b"", (VECTOR,), "cannot be read as samples (EOFError: "),
    "text": (b"hello", (VECTOR,), "cannot be read as samples (ValueError: "),
    "half a file": (npz(vector=np.zeros((500, 3)))[:3000], (VECTOR,), "cannot be read as a zip archive: "),
    "an .npy": (b"\x93NUMPY" + bytes(50), (VECTOR,), "cannot be read as samples ("),
    "objects": (npz(vector=np.array([{}, []], object)), (VECTOR,), "cannot be read as samples (ValueError: Object "),
    "more than it holds": (lying_header(), (VECTOR,), "cannot be read as samples ("),
    "a missing input": (npz(ids=np.arange(4), masks=np.ones(4)), (IDS, MASK),
                        "expected the arrays ids, mask, found ids, masks (did you mean 'masks'?)"),
    "another rank": (npz(vector=np.zeros((2, 2, 3))), (VECTOR,),
                     "expected vector of shape [samples, 3] in all arrays, or [3] for one sample, found [2, 2, 3]"),
    "a batch in one array": (npz(ids=np.arange(4)[None], mask=np.ones(4, bool)), (IDS, MASK),
                             "expected ids of shape [samples, length] in all arrays, or [length] for one sample"),
    "other numbers of samples": (npz(ids=np.zeros((2, 4), int), mask=np.ones((3, 4), bool)), (IDS, MASK),
                                 "expected the same number of samples in each array, at least 1, found ids 2, mask 3"),
    "no samples": (npz(vector=np.zeros((0, 3))), (VECTOR,), "at least 1, found vector 0"),
    "another length": (npz(vector=np.zeros((2, 4))), (VECTOR,),
                       "expected vector with the dimension 3, found 4 in [2, 4]"),
    "too long": (npz(**{**BOTH, "ids": np.arange(9)}), (IDS, MASK),
                 "expected ids with a length from 2 to 8 (dimensions.length), found 9"),
    "lengths that differ": (npz(**{**BOTH, "mask": np.ones(5, bool)}), (IDS, MASK),
                            "expected mask with the length of ids, 4, found 5"),
    "another type": (npz(**{**BOTH, "ids": np.zeros(4)}), (IDS, MASK), "expected ids of type int64, found float64"),
    "an id that does not exist": (npz(**{**BOTH, "ids": np.arange(98, 102)}), (IDS, MASK),
                                  "expected ids with values of at most 99 (high), found 101"),
    "a negative id": (npz(**{**BOTH, "ids": -np.arange(4)}), (IDS, MASK), "at least 0 (low), found -3"),
    "values that a type lacks": (npz(v=np.array([[300]])), (tensor("v", "int8", 1),),
                                 "expected v of type int8, found values of int64 that it does not have"),
    "a NaN": (npz(vector=np.full((2, 3), np.nan)), (VECTOR,), "vector contains a NaN or an infinity"),
    "values beyond fp16": (npz(v=np.array([[1e6]])), (tensor("v", "float16", 1),),
                           "v contains values beyond those of float16"),
    "numbers for texts": (npz(v=np.array([1])), (tensor("v", "string"),), "expected v of type string, found int64"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(("content", "inputs", "line"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: bytes, inputs: tuple[InputTensor, ...], line: str) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.npz", *inputs)
    assert str(error.value).startswith(f"{tmp_path / 'a.npz'}")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[", "3", json.dumps({"a": 1}), json.dumps([{"a": 1}]), json.dumps([3])])
def test_json_that_is_not_of_polygraphy_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json( cannot be read as samples|: expected vector of)"):
        read(tmp_path / "a.json", VECTOR)


def test_many_files_unpack_to_no_more_than_one_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD_UNPACKED_SIZE", "0.001")
    for index in range(3):
        np.savez(tmp_path / f"{index}.npz", vector=np.zeros((40_000, 3), np.float32))
    paths = [str(tmp_path / f"{index}.npz") for index in range(3)]
    with pytest.raises(UserError, match=r"2\.npz: the samples have 0\.00 GB, more than the 0\.001 GB that"):
        [*read_samples(paths, paths, [VECTOR], {})]
