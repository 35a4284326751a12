"""The models of timm through TorchScript, ONNX and the fp16 graph, with the default spec and their own input size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import ROOT

FEW = ["test_efficientnet", "test_vit", "levit_128s"]
# Stages that may refuse a network for its own sake: fp16 changes the answers of some random weights too much.
MAY_REFUSE = ("gate of the fp16 graph",)


def rows_of(folder: Path, *arguments: str) -> list[dict[str, str]]:
    command = [sys.executable, str(ROOT / "benchmarks/timm_models.py"), "--rows", str(folder / "rows"), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "rows").read_text().splitlines()]


def test_a_few_models_are_built(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, *FEW)
    assert {row["model"]: row["stage"] for row in rows} == dict.fromkeys(FEW, "")


def test_a_refusal_names_its_stage_and_its_reason(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "no_such_model")
    assert row["stage"] == "weights"
    assert "no_such_model" in row["reason"]


@pytest.mark.long
def test_a_model_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "--limit", "0.1", "resnet18")
    assert (row["stage"], row["reason"]) == ("weights", "not ended after 0.1 s")


@pytest.mark.long
def test_nearly_all_of_80_models_at_regular_distances_are_built(tmp_path: Path) -> None:
    rows = [row for row in rows_of(tmp_path, "--every", "15", "--first", "5") if row["stage"] != "too large"]
    refused = [row for row in rows if row["stage"] and row["stage"] not in MAY_REFUSE]
    assert len(rows) > 50
    assert not [row for row in refused if row["reason"].startswith("FAULT")]
    assert len(refused) <= len(rows) / 50, refused
