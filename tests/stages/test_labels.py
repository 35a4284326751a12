"""Label files: one class a line, for every reader of them."""

import re
from pathlib import Path

import pytest

from build_tasks.errors import MAX_LINE, UserError
from build_tasks.formats import label_file
from build_tasks.stages import client, labels
from build_tasks.tensors import TensorSignature
from tests.support.project import TINY, Project

SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines splits, besides CR and LF


def read(tmp_path: Path, content: bytes) -> list[str]:
    file = tmp_path / "labels.txt"
    file.write_bytes(content)
    return labels.read_labels(str(file))


@pytest.mark.parametrize("character", [*SEPARATORS, "\0", "\x1b", "\x7f", "\x9b", "\ufeff"], ids=ascii)
def test_a_label_with_a_separator_or_a_control_character_is_refused(tmp_path: Path, character: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, f"cat\nsea{character}lion\ndog\n".encode())
    assert str(error.value) == (
        f"{tmp_path}/labels.txt: line 2 contains U+{ord(character):04X}, a control character or a separator of lines; "
        "remove it"
    )


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"\xef\xbb\xbfcat\ndog\n", ["cat", "dog"]),
        (b"cat\r\ndog\r\n", ["cat", "dog"]),
        (b"cat\rdog", ["cat", "dog"]),
        (b"n01\tcat\ndog", ["n01 cat", "dog"]),
        ("\u05d7\u05ea\u05d5\u05dc\u200f\n\u732b\n".encode(), ["\u05d7\u05ea\u05d5\u05dc\u200f", "\u732b"]),
    ],
)
def test_other_ends_of_lines_and_a_byte_order_mark_are_normalized(
    tmp_path: Path, content: bytes, names: list[str]
) -> None:
    assert read(tmp_path, content) == names
    outputs = {"labels": str(tmp_path / "out.txt")}
    labels.build({"labels": str(tmp_path / "labels.txt")}, outputs, {})
    assert (tmp_path / "out.txt").read_bytes() == "".join(f"{name}\n" for name in names).encode()


def test_a_label_file_without_an_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_file, "MAX_CHARACTERS", 10)
    with pytest.raises(UserError, match="expected at most 10 characters, found more"):
        read(tmp_path, b"x" * 11)


def test_a_client_splits_labels_at_newlines_alone(tmp_path: Path) -> None:
    """An older labels.txt may contain what read_labels refuses now."""
    image: TensorSignature = {"name": "INPUT__0", "dtype": "float32", "shape": [-1, 3, 8, 8]}
    scores: TensorSignature = {"name": "OUTPUT__0", "dtype": "float32", "shape": [-1, 3]}
    settings = {"name": "m", "top_k": None, "sequences": False, "classes": True, "by_name": False, "ragged": False}
    settings["whole"] = False
    text = client.render("http", settings, [image], [scores], "preprocessed images", {"INPUT__0": ()}, labels=True)
    (tmp_path / "labels.txt").write_text(f"cat\nsea{SEPARATORS}lion\ndog\n", encoding="utf-8")
    [line] = re.findall("^labels = .*$", text, re.MULTILINE)
    names: dict[str, list[str]] = {}
    exec(line, {"Path": Path, "__file__": str(tmp_path / "client.py")}, names)
    assert names["labels"][:3] == ["cat", f"sea{SEPARATORS}lion", "dog"]


def test_the_labels_stage_refuses_such_a_file_in_one_line(project: Project) -> None:
    project.model("tiny", TINY, labels_txt="a\u2028b\nc\n")
    run = project.doit("labels:tiny")
    assert run.code == 1
    [line] = [line for line in run.out.splitlines() if line.startswith("✗")]
    assert line.endswith("line 1 contains U+2028, a control character or a separator of lines; remove it")
    assert len(line) <= MAX_LINE
    assert "\u2028" not in run.out
    assert project.tree("build").keys() & {"tiny/labels.txt"} == set()
