"""Every wrong configuration in wrong_configs.py is refused before anything runs, with a line that names the reason."""

import re
import struct
from collections import Counter
from pathlib import Path

import pytest

from build_tasks.errors import UserError
from build_tasks.spec.loader import load
from tests.support.project import ROOT
from tests.support.triton_cases import spec
from tests.triton.wrong_configs import WRONG_CONFIGS, Wrong

PHOTOGRAPHS = ROOT / "build_tasks/verification/photographs"
PICTURE = (PHOTOGRAPHS / "coffee.jpg").read_bytes()


def write_warm_up_files(folder: Path) -> None:
    """Write the files that warm-up requests of the table name."""
    folder.mkdir(parents=True, exist_ok=True)
    element = struct.pack("<I", len(PICTURE)) + PICTURE
    (folder / "plain.jpg").write_bytes(PICTURE)
    (folder / "picture.bin").write_bytes(element)
    (folder / "two.bin").write_bytes(2 * element)
    (folder / "text.bin").write_bytes(struct.pack("<I", 4) + b"text")


@pytest.mark.parametrize("wrong", WRONG_CONFIGS, ids=lambda wrong: f"{wrong.kind}: {wrong.lines[:60]}")
def test_a_wrong_configuration_is_refused_before_anything_runs(
    wrong: Wrong, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_warm_up_files(tmp_path / "models/m/warmup")
    text = spec(
        f'[triton]\nrelease = "{wrong.release}"\n[triton.{wrong.model_format}]\n{wrong.lines}',
        'formats = ["torchscript", "onnx", "tensorrt"]\nensemble = "onnx"',
    )
    (tmp_path / "models/m/model.toml").write_text(text)
    with pytest.raises(UserError) as error:
        load()
    message = str(error.value)
    assert wrong.ours in message
    assert re.match(rf"models/m/model\.toml: triton\.{wrong.model_format}(\.|: )", message), message
    assert len(message) <= 300


def test_there_are_eighty_wrong_configurations_in_fourteen_kinds() -> None:
    kinds = Counter(wrong.kind for wrong in WRONG_CONFIGS)
    assert len(WRONG_CONFIGS) >= 80
    assert len(kinds) == 14
    assert min(kinds.values()) >= 4
    assert {wrong.triton.partition(":")[0] for wrong in WRONG_CONFIGS} == {
        *("refused", "ignored", "fails", "never loads", "ends")
    }
