"""A graph that the gate refuses: where its error begins, and the fewest nodes to exclude."""

import json
import re
import tomllib
from collections.abc import Callable
from typing import Any

import onnx
import pytest

from tests.support import tiny_network
from tests.support.project import Project, Run, failure_line

PLANTED = """\
formats = ["rtx"]
max_batch_size = 2

[architecture]
timm = "test_vit"

[weights]
source = "weights.safetensors"

[engine]
{engine}
"""


def add_overflow(project: Project, name: str, scale: float, engine: str = "") -> None:
    """Add a vision transformer in which fp16 overflows.

    The values of one attention block are scaled up, and its projection down. In fp32 that changes nothing. The values
    in timm's test_vit are up to about 3; at a scale of 1e5 they exceed 65504.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network: Any = timm.create_model("test_vit")
    attention = network.blocks[3].attn
    values = slice(2 * attention.qkv.weight.shape[0] // 3, None)
    with torch.no_grad():
        attention.qkv.weight[values] *= scale
        attention.qkv.bias[values] *= scale
        attention.proj.weight /= scale
    save_file(network.state_dict(), project.model(name, PLANTED.format(engine=engine)) / "weights.safetensors")


def locked(project: Project, name: str) -> dict[str, list[str]]:
    text = (project / f"models/{name}/keep_fp32.lock").read_text()
    return {precision: table["keep_fp32"] for precision, table in tomllib.loads(text).items()}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Run]:
    project = Project(tmp_path_factory.mktemp("repair") / "project")
    add_overflow(project, "planted", 1e5)
    add_overflow(project, "sound", 1)
    return project, project.doit()


@pytest.fixture(scope="module")
def repaired(refused: tuple[Project, Run]) -> tuple[Project, Run]:
    project, _ = refused
    return project, project.built("repair:planted")


def test_a_planted_overflow_is_caught_by_the_default_gate(refused: tuple[Project, Run]) -> None:
    project, run = refused
    assert run.failed == ["accuracy:planted.fp16"]
    line = failure_line(run, "accuracy:planted.fp16")
    assert re.search(r"OUTPUT__0: NaN or infinity in \d+ of 7000 values, in \d of 7 samples, \w+.jpg the first", line)
    assert "`doit repair:planted` finds the nodes to exclude from fp16" in line
    assert re.search(r"the error jumps at /MatMul_\d+ \(MatMul\), from \S+ to NaN or infinity", line)
    assert {"accuracy:sound.fp16", "rtx:sound"} <= {*run.ran}
    assert not (project / "build/planted/model.rtx").exists()


def test_a_refused_graph_is_in_the_summary(refused: tuple[Project, Run]) -> None:
    project, run = refused
    assert "summary:planted" in run.ran
    (row,) = json.loads((project / "build/planted/accuracy.json").read_text())["artifacts"]
    assert (row["artifact"], row["status"]) == ("fp16 graph", "refused")
    assert row["reason"].startswith("output OUTPUT__0: NaN or infinity")
    assert "NaN or infinity: fp16 graph" in (project / "build/planted/accuracy.svg").read_text()


def test_layers_has_the_error_after_each_node(refused: tuple[Project, Run]) -> None:
    project, _ = refused
    run = project.built("layers:sound", "layers:planted")
    layers = json.loads((project / "build/sound/model.fp16.onnx.layers.json").read_text())
    nodes = {node.name: node for node in onnx.load(project / "build/sound/model.onnx").graph.node}
    errors = [layer["error"] for layer in layers["layers"]]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) > 0.9 * len(nodes)
    assert all(nodes[layer["node"]].op_type == layer["operator"] for layer in layers["layers"])
    last = max(layers["layers"], key=lambda layer: layer["place"])
    measured = json.loads((project / "build/sound/model.fp16.onnx.measured.json").read_text())
    assert last["error"] == pytest.approx(measured["outputs"]["OUTPUT__0"]["relative_l2"], rel=0.5), (
        "layers uses four samples"
    )
    broken = json.loads((project / "build/planted/model.fp16.onnx.layers.json").read_text())
    jump = next(layer for layer in broken["layers"] if layer["node"] == broken["first_jump"])
    assert (jump["error"], jump["operator"]) == (None, "MatMul")
    assert jump["before"] < 0.01
    assert jump["largest"] > 65504, "the largest number of fp16"
    assert "no jump" in run.out
    assert run.ran == ["layers:planted", "layers:sound"]


def test_repair_keeps_at_most_a_twentieth_of_the_nodes_in_fp32(repaired: tuple[Project, Run]) -> None:
    project, run = repaired
    (names,) = locked(project, "planted").values()
    graph = onnx.load(project / "build/planted/model.onnx").graph
    assert 1 <= len(names) <= 0.05 * len(graph.node)
    assert f"fp16: {len(names)} of {len(graph.node)} nodes excluded" in run.out
    assert all(name in run.out for name in names)
    assert "step 1 of at most 48, nodes excluded: 0: output OUTPUT__0: NaN or infinity" in run.out
    assert ", 0 steps" not in run.out


def test_the_next_build_uses_the_lock_file(
    repaired: tuple[Project, Run], copy_of: Callable[[Project], Project]
) -> None:
    project = copy_of(repaired[0])
    run = project.built()
    assert run.ran == sorted(
        [*(f"{stage}:planted.fp16" for stage in ("precision", "measure", "accuracy")), "rtx:planted", "summary:planted"]
    )
    assert json.loads((project / "build/planted/model.fp16.onnx.verdict.json").read_text())["status"] == "ok"
    assert project.built().ran == []
    (names,) = locked(project, "planted").values()
    nodes = {node.name: node for node in onnx.load(project / "build/planted/model.fp16.onnx").graph.node}
    assert {*names} <= {*nodes}, "excluded nodes keep their names"
    (project / "models/planted/keep_fp32.lock").unlink()
    assert project.doit().failed == ["accuracy:planted.fp16"], "without the lock file, the gate fails again"


def test_no_node_of_the_set_can_be_left_out(
    repaired: tuple[Project, Run], copy_of: Callable[[Project], Project]
) -> None:
    project = copy_of(repaired[0])
    lock = project / "models/planted/keep_fp32.lock"
    text = lock.read_text()
    (names,) = locked(project, "planted").values()
    for name in (names[0], names[-1]):
        lock.write_text(text.replace(f"    {json.dumps(name)},\n", ""))
        assert project.doit("rtx:planted").failed == ["accuracy:planted.fp16"]


def test_a_search_is_not_repeated(repaired: tuple[Project, Run], copy_of: Callable[[Project], Project]) -> None:
    project = copy_of(repaired[0])
    lock = (project / "models/planted/keep_fp32.lock").read_bytes()
    assert project.built("repair:planted").ran == [], "nothing has changed"
    run = project.built("repair:planted", "sound")
    (project / "models/planted/keep_fp32.lock").unlink()
    steps = {path.name: path.stat().st_mtime_ns for path in (project / "build/planted/repair").iterdir()}
    run = project.built("repair:planted")
    assert run.ran == ["repair:planted"]
    assert (project / "models/planted/keep_fp32.lock").read_bytes() == lock
    assert {path.name: path.stat().st_mtime_ns for path in (project / "build/planted/repair").iterdir()} == steps
    project.edit("models/planted/model.toml", "[engine]", "[[accuracy.gate]]\nrelative_l2 = 0.02\n[engine]")
    run = project.built("repair:planted")
    assert run.ran == ["repair:planted"]
    assert ", 0 steps" in run.out, "the locked nodes are still enough"
    assert (project / "models/planted/keep_fp32.lock").read_bytes() == lock


def test_if_the_gate_holds_no_node_is_locked(refused: tuple[Project, Run]) -> None:
    project, _ = refused
    run = project.built("repair:sound")
    assert "the gate holds as it is: no node is excluded" in run.out
    assert locked(project, "sound") == {}


def test_with_engine_repair_a_build_repairs_its_graph(project: Project) -> None:
    add_overflow(project, "planted", 1e5, "repair = true")
    run = project.built()
    assert {"repair:planted", "precision:planted.fp16", "accuracy:planted.fp16", "rtx:planted"} <= {*run.ran}
    assert locked(project, "planted")["fp16"]
    assert project.built().ran == []
    lock = (project / "models/planted/keep_fp32.lock").read_bytes()
    import shutil

    shutil.rmtree(project / "build")
    run = project.built()
    assert ", 1 steps" in run.out, "another machine tests the nodes in the lock file only"
    assert (project / "models/planted/keep_fp32.lock").read_bytes() == lock
    project.built("clean")
    assert (project / "models/planted/keep_fp32.lock").exists(), "the lock file is the user's"


@pytest.mark.parametrize(
    ("lock", "message"),
    [
        ('[fp16]\nkeep_fp32 = ["/Nowhere"]\n', "fp16: the graph has no node '/Nowhere', because it has changed"),
        ("fp16", "is not what `doit repair` writes"),
        ("fp16 = 3", "is not what `doit repair` writes"),
        ("[fp16]\nkeep_fp32 = 3", "is not what `doit repair` writes"),
    ],
)
def test_a_lock_file_that_does_not_fit_is_an_error(project: Project, lock: str, message: str) -> None:
    folder = tiny_network.add(project, "net")
    (folder / "keep_fp32.lock").write_text(lock)
    run = project.doit()
    assert run.failed == ["precision:net.fp16"]
    assert f"models/net/keep_fp32.lock{'' if message.startswith('is') else ':'} {message}" in run.out


def test_infinities_in_fp32_are_no_error(project: Project) -> None:
    """Attention masks have them."""
    mask = 'x = torch.softmax(x.masked_fill(x > 0.5, float("-inf")), dim=1)'
    tiny_network.add(project, "masked", body=mask)
    project.built("layers:masked")
    report = json.loads((project / "build/masked/model.fp16.onnx.layers.json").read_text())
    assert all(layer["error"] is not None for layer in report["layers"])
    assert any(layer["operator"] == "Where" for layer in report["layers"])


def test_the_other_precisions_of_a_lock_file_are_kept(project: Project) -> None:
    folder = tiny_network.add(project, "net")
    (folder / "keep_fp32.lock").write_text('[bf16]\nkeep_fp32 = ["/Conv"]\n\n[int8]\n')
    project.built("repair:net")
    assert locked(project, "net") == {"bf16": ["/Conv"]}
    (folder / "keep_fp32.lock").write_text("[bf16]\nkeep_fp32 = 3\n")
    run = project.doit("repair:net")
    assert "is not what `doit repair` writes" in failure_line(run, "repair:net")
    assert (folder / "keep_fp32.lock").read_text() == "[bf16]\nkeep_fp32 = 3\n"


def test_a_lock_file_with_comments_of_a_person_is_not_rewritten(project: Project) -> None:
    folder = tiny_network.add(project, "net")
    text = '# Ana: the first convolution overflows\n[fp16]\nkeep_fp32 = ["/Conv"]\n'
    (folder / "keep_fp32.lock").write_text(text)
    project.built("repair:net")
    assert (folder / "keep_fp32.lock").read_text() == text, "its nodes are enough"
    with (folder / "model.toml").open("a") as spec:
        spec.write('\n[[accuracy.gate]]\nformat = "graph"\nsnr = 190\n')
    line = failure_line(project.doit("repair:net"), "repair:net")
    assert "models/net/keep_fp32.lock has comments that `doit repair` did not write, and is not replaced" in line
    assert (folder / "keep_fp32.lock").read_text() == text


def test_a_graph_that_cannot_be_repaired_is_an_error(project: Project) -> None:
    folder = tiny_network.add(project, "net")
    with (folder / "model.toml").open("a") as spec:
        spec.write('\n[[accuracy.gate]]\nformat = "graph"\nsnr = 190\n')
    tiny_network.add(project, "untested")
    project.edit("models/untested/model.toml", "weights.safetensors", "random://0")
    with (project / "models/untested/model.toml").open("a") as spec:
        spec.write('\n[[accuracy.gate]]\nformat = "graph"\nsnr = 190\n')
    run = project.doit("repair")
    assert run.code == 1
    line = failure_line(run, "repair:net")
    assert "the gate fails even with every node excluded, so the precision is not the cause: output OUTPUT__0: " in line
    assert ": signal-to-noise ratio " in line
    assert not (project / "models/net/keep_fp32.lock").exists()
    assert run.ran.count("repair:untested") == 1, "random weights are not judged, so nothing fails"
