"""The two models that ship, with real weights where no download is needed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Project

LITE0 = "efficientnet_lite0"


def shipped(project: Project, *names: str) -> Project:
    import shutil

    for name in names:
        shutil.copytree(ROOT / f"models/{name}", project / f"models/{name}")
    return project


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """efficientnet_lite0 built with one hash seed …"""
    project = shipped(Project(tmp_path_factory.mktemp("here") / "project"), LITE0)
    project.built(LITE0, PYTHONHASHSEED="1")
    return project


def state_of_the_build(path: str) -> bool:
    return path.startswith(".") or "/logs/" in path


def test_clean_builds_in_two_places_under_two_hash_seeds_are_identical(lite0: Project, tmp_path: Path) -> None:
    """… and in another place with another one."""
    there = shipped(Project(tmp_path / "a" / "longer" / "path"), LITE0)
    there.built(LITE0, PYTHONHASHSEED="20261123")
    assert there.tree() == lite0.tree()
    here, other = (
        {path: data for path, data in p.tree("build").items() if not state_of_the_build(path)} for p in (lite0, there)
    )
    assert other == here


def test_it_recognises_what_the_photographs_show(lite0: Project) -> None:
    import onnxruntime
    from polygraphy.json import load_json

    samples = load_json(str(lite0 / f"build/{LITE0}/samples.json"))[0]["INPUT__0"]
    labels = (lite0 / f"model_repository/{LITE0}_onnx/labels.txt").read_text().splitlines()
    model = str(lite0 / f"model_repository/{LITE0}_onnx/1/model.onnx")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"INPUT__0": samples})
    pictures = sorted(path.stem for path in (ROOT / "build_tasks/samples").glob("*.jpg"))
    answers = {picture: labels[index] for picture, index in zip(pictures, np.argmax(scores, axis=1), strict=True)}
    assert "espresso" in answers["coffee"]
    assert "tripod" in answers["camera"]
    assert "cat" in answers["chelsea"]


def test_its_accuracy_is_measured_and_ok(lite0: Project) -> None:
    for artifact, limit in (("model.pt", 1e-4), ("model.onnx", 1e-4), ("model.fp16.onnx", 1e-2)):
        verdict = json.loads((lite0 / f"build/{LITE0}/{artifact}.accuracy.json").read_text())
        assert verdict["status"] == "ok"
        assert 0 < verdict["outputs"]["OUTPUT__0"]["relative_l2"] < limit
        assert verdict["outputs"]["OUTPUT__0"]["top1"] == 1.0


def test_its_fp16_graph_names_the_same_class_for_every_photograph(lite0: Project) -> None:
    import onnxruntime
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    build = lite0 / f"build/{LITE0}"
    samples = load_json(str(build / "samples.json"))[0]["INPUT__0"]
    reference = next(iter(RunResults.load(str(build / "reference.json")).values()))[0]["OUTPUT__0"]
    session = onnxruntime.InferenceSession(str(build / "model.fp16.onnx"), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"INPUT__0": samples})
    assert len(scores) == len(list((ROOT / "build_tasks/samples").glob("*.jpg")))
    assert (scores.argmax(axis=1) == reference.argmax(axis=1)).all()
    assert not np.array_equal(scores, reference), "it is another graph"


def test_without_the_hub_b3_says_where_to_put_the_weights_and_lite0_stays(
    lite0: Project, copy_of: Callable[[Project], Project]
) -> None:
    project = shipped(copy_of(lite0), "efficientnet_b3")
    run = project.doit(HF_HUB_OFFLINE="1", HF_HOME=str(project / "no-cache"))
    assert run.code == 1
    assert run.failed == ["weights:efficientnet_b3"]
    (line,) = [line for line in run.out.splitlines() if line.startswith("✗")]
    assert line.endswith("put the file at models/efficientnet_b3/model.safetensors")
    assert "14 up to date" in run.out, "the other model is complete"


def test_b3_is_built_as_in_the_guide_from_weights_put_in_place(project: Project, tmp_path: Path) -> None:
    """Opset 11, dynamic batch, exported at batch 32; its weights come from a file where the hub's would be."""
    import onnx

    shipped(project, "efficientnet_b3")
    spec = project / "models/efficientnet_b3/model.toml"
    as_shipped = spec.read_text()
    # b3 at batch 64 takes a minute on two cores
    spec.write_text(as_shipped.replace("max_batch_size = 64\n\n[arch", "max_batch_size = 2\n\n[arch"))
    hub = 'source = "hf://timm/efficientnet_b3.ra2_in1k/model.safetensors@main"'
    project.edit("models/efficientnet_b3/model.toml", hub, 'source = "random://0"')
    project.built("weights:efficientnet_b3")
    (project / "build/efficientnet_b3/weights.safetensors").rename(project / "models/efficientnet_b3/model.safetensors")
    project.edit("models/efficientnet_b3/model.toml", 'source = "random://0"', hub)
    project.built("weights:efficientnet_b3", "onnx:efficientnet_b3", HF_HUB_OFFLINE="1")
    graph = onnx.load(project / "build/efficientnet_b3/model.onnx")
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [11]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert len(graph.graph.node) < 400


HEAVY = (
    *("torch", "onnx", "numpy", "polygraphy", "tensorrt", "tensorrt_rtx", "timm", "onnxruntime", "modelopt"),
    *("google.protobuf", "rich"),
)


@pytest.mark.parametrize("command", [["list"], ["list", "--all", "--status"], ["info", "onnx:tiny"], []])
def test_listing_and_doing_nothing_import_nothing_heavy(
    built_tiny: Project, copy_of: Callable[[Project], Project], command: list[str]
) -> None:
    import subprocess

    project = copy_of(built_tiny)
    program = (
        "import sys; from doit.doit_cmd import DoitMain; "
        f"code = DoitMain().run({command!r}); "
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules]); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=project.root, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stderr  # `doit info` exits with 1 for a task that would run
    assert "HEAVY []" in run.stdout, run.stdout


def test_the_list_reads_like_a_table_of_contents(tiny: Project) -> None:
    tiny.model("made_up", 'formats = ["onnx"]\n[architecture]\ntimm = "test_vit"\n[weights]\nsource = "random://3"\n')
    lines = tiny.built("list").out.splitlines()
    names = [line.split()[0] for line in lines]
    stages = ["weights", "labels", "reference", "torchscript", "onnx", "precision", "engine", "rtx"]
    assert names == ["made_up", "tiny", *stages, "accuracy", "config", "publish", "container", "prune"]
    assert all(len(line.split()) > 1 for line in lines), "every task has a doc line"
    assert "RANDOM" in lines[0]
    everything = tiny.built("list", "--all").out
    assert "weights:made_up" in everything
    assert "RANDOM weights, for structure tests only" in everything
