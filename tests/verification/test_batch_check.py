"""An artifact answers alike in every batch and slot, or the gate names the batch and the slot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from polygraphy.comparator import RunResults
from polygraphy.json import save_json

from build_tasks.errors import UserError
from build_tasks.tensors import INPUT, OUTPUT
from build_tasks.verification import batch_check, gate
from build_tasks.verification.reference_outputs import Reference
from tests.support import tiny_network
from tests.support.project import Project, failure_line

Run = Callable[[np.ndarray], list[np.ndarray]]

SAMPLES = np.random.default_rng(0).standard_normal((7, 12)).astype(np.float32)
MATRIX = np.random.default_rng(1).standard_normal((12, 5)).astype(np.float32)
SIZES = batch_check.batches_between(1, 8, 32)


def right(batch: np.ndarray) -> list[np.ndarray]:
    return [batch @ MATRIX]


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    save_json([{INPUT: SAMPLES}], str(tmp_path / "samples.json"))
    results = RunResults()
    for name in ("exact", "perturbed"):
        results.add([{OUTPUT.format(0): right(SAMPLES)[0]}], runner_name=name)
    results.save(str(tmp_path / "reference.json"))
    (tmp_path / "names").write_text("".join(f"{index}.jpg\n" for index in range(len(SAMPLES))))
    files = {"samples": "samples.json", "reference": "reference.json", "names": "names"}
    return Reference({name: str(tmp_path / file) for name, file in files.items()})


def gate_error(reference: Reference, run: Run, precision: str = "fp32") -> str:
    batches = batch_check.arrangements(len(SAMPLES), SIZES, repeated=SIZES)
    measured = reference.measure(lambda feed: run(feed[INPUT]), 1, 8, None, batches=batches)
    settings = {"precision": precision, "gate": [], "allow_untestable": False, "random_weights": False}
    return gate.gate_error(measured, settings, advice="") or ""


def changed(run: Run, change: Callable[[np.ndarray], object], *, at: Callable[[int], bool]) -> Run:
    """A model whose answer is changed in some batches."""

    def wrong(batch: np.ndarray) -> list[np.ndarray]:
        (answer,) = run(batch)
        if at(len(batch)):
            change(answer)
        return [answer]

    return wrong


def test_the_smallest_the_tuned_an_odd_and_the_largest_batch_are_run() -> None:
    assert SIZES == [1, 8, 17, 32]
    assert batch_check.batches_between(1, 8, 4) == [1, 3, 4]
    assert batch_check.batches_between(1, 8, 1) == [1]
    assert batch_check.batches_between(4, 8, 8) == [4, 7, 8]
    assert batch_check.batches_between(2, 2, 2) == [2]
    shape = {"min": [2, 3], "opt": [4, 3], "max": [16, 3]}
    plan = {"inputs": [{"name": "X", "dtype": "float32", "shape": [-1, 3]}], "outputs": [], "profile": {"X": shape}}
    assert batch_check.batches_of(plan, 0) == [2, 4, 9, 16]  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_model_that_answers_alike_everywhere_passes(reference: Reference, precision: str) -> None:
    assert gate_error(reference, right, precision) == ""


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("size", SIZES[:1] + SIZES[2:])
def test_a_model_that_is_wrong_at_one_batch_size_is_refused(reference: Reference, size: int, precision: str) -> None:
    wrong = changed(right, lambda answer: np.multiply(answer, 2, out=answer), at=lambda batch: batch == size)
    message = gate_error(reference, wrong, precision)
    assert message.startswith(f"output OUTPUT__0: a batch of {size}, ")


@pytest.mark.parametrize("slot", [0, 5, 31])
def test_a_model_that_is_wrong_in_one_slot_is_refused(reference: Reference, slot: int) -> None:
    def change(answer: np.ndarray) -> None:
        answer[slot] = np.nan if slot == 5 else answer[slot] + 1

    message = gate_error(reference, changed(right, change, at=lambda batch: batch > max(slot, 8)))
    assert f"in slot {slot} differs from that in another batch by" in message


def test_rows_of_other_samples_are_named(reference: Reference) -> None:
    wrong = changed(right, lambda answer: answer.__setitem__(slice(None), answer[::-1].copy()), at=lambda n: n == 17)
    message = gate_error(reference, wrong)
    assert "a batch of 17, the samples in another order" in message
    assert ", and is the answer to " in message


def test_a_batch_that_fails_or_has_another_shape_is_an_error(reference: Reference) -> None:
    with pytest.raises(UserError, match=r"output 0 of a batch of 32 has shape \[1, 5\], expected \[32, 5\]"):
        gate_error(reference, lambda batch: [right(batch)[0][: 1 if len(batch) == 32 else None]])

    def fails(batch: np.ndarray) -> list[np.ndarray]:
        if len(batch) == 17:
            raise RuntimeError("no kernel")
        return right(batch)

    with pytest.raises(UserError, match="a batch of 17 fails: no kernel"):
        gate_error(reference, fails)


def test_a_network_that_is_wrong_at_one_batch_is_not_published(project: Project) -> None:
    """The stage torchscript compares model.pt with the network, which is wrong there, too."""
    folder = tiny_network.add(project, "net", body="x = scaled(x)", formats='"torchscript"')
    network = folder / "network.py"
    scaled = "@torch.jit.script\ndef scaled(x):\n    return x * 2 if x.shape[0] == 3 else x\n"
    network.write_text(network.read_text().replace("class Network", f"{scaled}\n\nclass Network"))
    project.edit("models/net/model.toml", "max_batch_size = 3", "max_batch_size = 32")
    run = project.doit()
    assert run.code == 1
    line = failure_line(run, "accuracy:net")
    assert "output OUTPUT__0: a batch of 3, the samples in another order: the answer to " in line
    assert not (project / "model_repository/net").exists()
