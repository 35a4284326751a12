"""The models of timm through TorchScript, ONNX and the fp16 graph, with the default spec and their own input size."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.project import ROOT

FEW = ["test_efficientnet", "test_vit", "levit_128s"]
# Stages that may refuse a network for its own sake: fp16 changes the answers of some random weights too much.
MAY_REFUSE = ("repair", "gate of the fp16 graph after repair")


def rows_of(folder: Path, *arguments: str) -> list[dict[str, Any]]:
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
def test_a_refused_fp16_graph_is_repaired(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "mobilenetv4_hybrid_medium_075")
    assert row["stage"] == ""
    assert row["notes"]["gate of the fp16 graph"].startswith("output OUTPUT__0: ")
    assert "nodes excluded" in row["notes"]["repair"]["fp16"]
    assert row["notes"]["gate of the fp16 graph after repair"]["accuracy"] == "ok"


def test_the_page_has_a_line_for_each_family(tmp_path: Path) -> None:
    def row(model: str, stage: str = "", reason: str = "", **notes: dict[str, str]) -> str:
        figures = {"model": model, "stage": stage, "reason": reason}
        return json.dumps({**figures, "notes": notes, "tools": {"torch": "2.14"}})

    reason = "output OUTPUT__0: a | b; `doit repair:model` finds the nodes"
    rows = [
        row("resnet18", "onnx", "an error that is gone"),
        row("resnet18"),
        row("resnet50", "gate of model.onnx", reason),
        row("resnet200d", "too large"),
        row("dla34", repair={"fp16": "1 of 277 nodes excluded (0.4%), 2 steps"}),
    ]
    (tmp_path / "rows").write_text("\n".join(rows))
    program = [sys.executable, str(ROOT / "benchmarks/timm_models.py"), "--rows", str(tmp_path / "rows")]
    subprocess.run([*program, "--page", str(tmp_path / "page.md")], check=True)
    page = (tmp_path / "page.md").read_text()
    assert "2 of 3 architectures" in page
    assert "| dla | 1 of 1 | `dla34`: 1 of 277 |  |" in page
    assert "| resnet | 1 of 2 |  | `resnet50`: gate of model.onnx, output OUTPUT__0: a \\| b |" in page
    assert "| 3 | torch 2.14 |" in page


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
