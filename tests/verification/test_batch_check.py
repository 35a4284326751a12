"""An artifact answers alike in every batch and slot, or the gate names the batch and the slot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from polygraphy.comparator import RunResults
from polygraphy.json import save_json

from build_tasks.errors import UserError
from build_tasks.tensors import INPUT, OUTPUT, Feed, OptimizationProfile, Range
from build_tasks.triton.optimization_profiles import find_uncovered, nearest_profile
from build_tasks.verification import batch_check, gate, profile_batches
from build_tasks.verification.reference_outputs import Batch, Reference
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

    def run_feed(feed: Feed) -> list[np.ndarray]:
        return run(feed[INPUT])

    measured = reference.measure(run_feed, 1, 8, None, batches=[Batch(run_feed, batch) for batch in batches])
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
    plan = {"inputs": [{"name": "X", "dtype": "float32", "shape": [-1, 3]}], "outputs": [], "profiles": [{"X": shape}]}
    assert batch_check.batches_of(plan, 0) == [2, 4, 9, 16]  # type: ignore[arg-type]


SHORT = {"X": {"min": [1, 2], "opt": [4, 3], "max": [8, 4]}}
LONG = {"X": {"min": [1, 2], "opt": [1, 9], "max": [2, 9]}}


def test_a_request_uses_the_nearest_profile_that_takes_it() -> None:
    chosen = {(1, 3): 0, (2, 4): 0, (4, 4): 0, (2, 5): 1, (3, 5): None, (1, 1): None, (1, 10): None, (1, 8): 1}
    for shape, profile in chosen.items():
        assert nearest_profile([SHORT, LONG], {"X": shape}) == profile  # type: ignore[list-item]
    assert nearest_profile([LONG, LONG], {"X": [1, 9]}) == 0  # type: ignore[list-item]


def test_ranges_that_no_profile_takes_are_found() -> None:
    def profile(batch: int, least: int, most: int) -> OptimizationProfile:
        lengths: Range = {"min": least, "opt": least, "max": most}
        return {"batch": {"min": 1, "opt": 1, "max": batch}, "dimensions": {"n": lengths}}

    promised = {"batch": (1, 8), "n": (2, 9)}
    assert find_uncovered(promised, [profile(8, 2, 5), profile(8, 6, 9)]) is None
    assert find_uncovered(promised, [profile(8, 2, 5), profile(4, 3, 9)]) == {"batch": (5, 8), "n": (6, 9)}
    assert find_uncovered(promised, [profile(8, 2, 5), profile(8, 7, 9)]) == {"batch": (1, 8), "n": (6, 6)}
    assert find_uncovered(promised, []) == promised


def test_every_profile_is_run_at_its_sizes_with_samples_of_its_lengths(reference: Reference) -> None:
    """A profile that no sample is nearest to has kernels of its own, which may be wrong."""
    wide = {INPUT: {"min": [1, 12], "opt": [4, 12], "max": [8, 12]}}
    small = {INPUT: {"min": [1, 12], "opt": [1, 12], "max": [2, 12]}}
    ran: set[tuple[int, int]] = set()

    def run(feed: Feed, profile: int = 0) -> list[np.ndarray]:
        batch = feed[INPUT]
        ran.add((profile, len(batch)))
        return [batch @ MATRIX * (1 + (profile == 1 and len(batch) == 2))]

    batches = profile_batches.batches_of_profiles(run, [wide, small], reference.groups)  # type: ignore[list-item]
    measured = reference.measure(run, 1, 8, None, batches=batches)
    assert ran == {(0, 1), (0, 4), (0, 5), (0, 8), (1, 1), (1, 2), (0, 7)}
    settings = {"precision": "fp16", "gate": [], "allow_untestable": False, "random_weights": False}
    assert "a batch of 2, " in (gate.gate_error(measured, settings, advice="") or "")
    long = {INPUT: {"min": [1, 13], "opt": [1, 13], "max": [2, 13]}}
    assert profile_batches.untried_profiles([wide, long], reference.groups) == [1]  # type: ignore[list-item]
    assert profile_batches.untried_profiles([long], reference.groups) == []  # type: ignore[list-item]


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
