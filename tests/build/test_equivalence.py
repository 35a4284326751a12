"""After any sequence of edits and runs, the repository equals that of a clean build, byte for byte."""

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.support.project import CONVERTER, ROOT, Project, add_tiny

PICTURES = ("brick", "camera", "chelsea", "coffee")


class RandomEdits:
    """Random edits of a project with the model `tiny`: of its spec, its files and its targets."""

    def __init__(self, project: Project, weights: Path, seed: int):
        self.project, self.weights, self.random = project, weights, random.Random(seed)
        self.choices: dict[str, str] = {}
        add_tiny(project, weights)
        (project / "models/tiny/samples").mkdir()
        shutil.copy(ROOT / "build_tasks/verification/photographs/rocket.jpg", project / "models/tiny/samples")
        (project / "models/tiny/convert.py").write_text(CONVERTER)
        self.write_spec()

    def write_spec(self) -> None:
        choice = self.choices.get
        text = f"""
            formats = {choice("formats", '["torchscript", "onnx"]')}
            max_batch_size = {choice("max_batch_size", "3")}
            labels = "labels.txt"
            [architecture]
            timm = "test_efficientnet"
            [weights]
            source = "weights.safetensors"
            converter = "convert.py:convert"
            [onnx]
            opset = {choice("opset", "17")}
            dynamic_axes = {choice("dynamic_axes", "true")}
            external_data = {choice("external_data", "false")}
            [accuracy]
            samples = "samples"
            allow_untestable = true
            [triton]
            {choice("triton", "")}
        """
        folder = self.project / "models/tiny"
        folder.mkdir(exist_ok=True)
        (folder / "model.toml").write_text(text)

    def edit_key(self) -> str:
        name, values = self.random.choice(
            [
                ("formats", ['["torchscript"]', '["onnx"]', '["torchscript", "onnx"]']),
                ("max_batch_size", ["3", "4"]),
                ("opset", ["13", "17"]),
                ("dynamic_axes", ["true", "false"]),
                ("external_data", ["true", "false"]),
                ("triton", ["", "instance_group = [{ count = 2 }]", "dynamic_batching = {}"]),
            ]
        )
        self.choices[name] = self.random.choice(values)
        if self.choices.get("dynamic_axes") == "false":  # Triton's batching needs an open batch
            self.choices["triton"] = ""
        self.write_spec()
        return f"{name} = {self.choices[name]}"

    def edit_label(self) -> str:
        path = self.project / "models/tiny/labels.txt"
        lines = path.read_text().splitlines()
        lines[self.random.randrange(1000)] = f"renamed {self.random.random()}"
        path.write_text("\n".join(lines) + "\n")
        return "a label"

    def edit_converter(self) -> str:
        factor = self.random.choice(["1", "2"])
        scaled = f"{{k: v * {factor} if 'classifier' in k else v for k, v in state.items()}}"
        code = f"def convert(state):\n    return {scaled}\n"
        (self.project / "models/tiny/convert.py").write_text(code)
        return f"converter times {factor}"

    def edit_picture(self) -> str:
        name = self.random.choice(PICTURES)
        path = self.project / f"models/tiny/samples/{name}.jpg"
        if path.exists():
            path.unlink()
        else:
            shutil.copy(ROOT / f"build_tasks/verification/photographs/{name}.jpg", path)
        return f"picture {name}"

    def damage_target(self) -> str:
        files = [
            p for top in ("build/tiny", "model_repository") for p in (self.project / top).rglob("*") if p.is_file()
        ]
        files = [p for p in sorted(files) if p.suffix != ".log"]
        if not files:
            return "nothing to damage yet"
        path = self.random.choice(files)
        how = self.random.choice(["delete", "truncate", "corrupt"])
        if how == "delete":
            path.unlink()
        elif how == "truncate":
            os.truncate(path, path.stat().st_size // 2)
        else:
            data = bytearray(path.read_bytes() or b"x")
            data[len(data) // 2] ^= 0xFF
            path.write_bytes(data)
        return f"{how} {path.relative_to(self.project.root)}"

    def edit(self) -> str:
        """Make one random edit, and return what it was."""
        return self.random.choice(
            [self.edit_key, self.edit_key, self.edit_label, self.edit_converter, self.edit_picture, self.damage_target]
        )()


def run_sequence(tmp_path: Path, weights: Path, seed: int, edits: int) -> None:
    """Edit a project and run doit in random order, then compare it with a clean build of the same models."""
    project = Project(tmp_path / f"edited-{seed}")
    random_edits = RandomEdits(project, weights, seed)
    project.built()
    history = []
    for _ in range(edits):
        history.append(random_edits.edit())
        if random_edits.random.random() < 0.5:
            project.built()
            history.append("doit")
    project.built()
    clean = Project(tmp_path / f"clean-{seed}")
    shutil.rmtree(clean / "models")
    shutil.copytree(project / "models", clean / "models")
    clean.built()
    assert project.tree() == clean.tree(), f"seed {seed}: {history}"


@pytest.mark.parametrize("seed", [1])
def test_a_sequence_of_edits_ends_where_a_clean_build_does(tmp_path: Path, tiny_weights: Path, seed: int) -> None:
    run_sequence(tmp_path, tiny_weights, seed, edits=6)


@pytest.mark.long
@pytest.mark.parametrize("seed", [2, *range(10, 30)])
def test_many_sequences_of_edits_end_where_a_clean_build_does(tmp_path: Path, tiny_weights: Path, seed: int) -> None:
    run_sequence(tmp_path, tiny_weights, seed, edits=12)
