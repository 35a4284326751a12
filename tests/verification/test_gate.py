"""The gate: the figures, the default limits, the rules of a spec, and samples that prove nothing."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from polygraphy.comparator import IterationResult

from build_tasks.errors import UserError
from build_tasks.spec.model import Model, Spec
from build_tasks.verification import gate, judged_artifacts, metrics, reference_outputs
from build_tasks.verification.class_outputs import class_outputs
from tests.support import tiny_network
from tests.support.project import ROOT, TINY, Project, failure_line

Array = np.ndarray

RANDOM = np.random.default_rng(20261125)
SCORES = RANDOM.standard_normal((20, 100)).astype(np.float32)


def off_by(error: float, of: Array = SCORES) -> Array:
    """Return outputs with this relative L2 error."""
    noise = RANDOM.standard_normal(of.shape)
    return (of + noise * (error * np.linalg.norm(of) / np.linalg.norm(noise))).astype(of.dtype)


def measured(
    found: Array | dict[str, Array],
    expected: Array | dict[str, Array] = SCORES,
    sensitivity: float = 1e-7,
    truth: dict[int, int] | None = None,
) -> metrics.Measurements:
    """Return the figures of some outputs, as the measure stage writes them."""
    found = {"scores": found} if isinstance(found, np.ndarray) else found
    expected = {"scores": expected} if isinstance(expected, np.ndarray) else expected
    perturbed = {
        name: off_by(sensitivity, np.nan_to_num(output.astype(np.float64), posinf=0))
        for name, output in expected.items()
    }
    count = len(next(iter(expected.values())))
    outputs = metrics.compare_outputs(
        IterationResult(found),
        IterationResult(expected),
        IterationResult(perturbed),
        [f"{index}.jpg" for index in range(count)],
        truth,
    )
    written = json.dumps({"samples": count, "distinct": count, "outputs": outputs}, allow_nan=False)
    figures: metrics.Measurements = json.loads(written)
    return figures


def settings(precision: str = "fp32", *rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    usual = {"format": "onnx", "allow_untestable": False, "random_weights": False}
    return {"precision": precision, "gate": list(rules), **usual, **more}


def gate_error(figures: metrics.Measurements, precision: str = "fp32", *rules: dict[str, Any], **more: Any) -> str:
    """Return why the gate refuses these figures. Empty if they pass."""
    return gate.gate_error(figures, settings(precision, *rules, **more), advice="") or ""


# Figures.


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.bool_])
def test_the_gate_holds_for_every_dtype(dtype: type) -> None:
    scale = {np.float16: 300, np.float32: 1e20, np.int64: 2**40, np.bool_: 1}.get(dtype, 1)
    normal = np.random.default_rng(0).standard_normal((6, 100))
    expected: Array = normal > 0 if dtype is np.bool_ else (normal * scale).astype(dtype)
    assert measured(expected, expected)["outputs"]["scores"]["relative_l2"] == 0
    assert gate_error(measured(expected, expected)) == ""
    wrong = ~expected if dtype is np.bool_ else (expected * 0.7).astype(dtype)
    message = gate_error(measured(wrong, expected))
    assert message.startswith("output scores: relative L2 error ")
    assert "limit 1.0e-04, worst at " in message


def test_figures_are_those_of_their_definitions() -> None:
    found = off_by(0.01)
    output = measured(found)["outputs"]["scores"]
    difference = found.astype(np.float64) - SCORES
    by_sample = np.linalg.norm(difference, axis=1)
    cosines = (found * SCORES).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(SCORES, axis=1)
    assert output["relative_l2"] == pytest.approx(0.01, rel=1e-4)
    assert output["max_absolute"] == pytest.approx(np.abs(difference).max())
    assert output["cosine"] == pytest.approx(cosines.min(), rel=1e-6)
    assert output["snr"] == pytest.approx(20 * np.log10(np.linalg.norm(SCORES, axis=1) / by_sample).min())
    assert output["worst"]["max_absolute"] == f"{np.abs(difference).max(axis=1).argmax()}.jpg"
    assert output["worst"]["relative_l2"] == f"{by_sample.argmax()}.jpg"
    assert output["errors"] == pytest.approx(by_sample * 20**0.5 / np.linalg.norm(SCORES), rel=1e-2)
    assert output["sensitivity"] == pytest.approx(1e-7, rel=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["artifact", "reference"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_nan_and_infinity_are_never_accurate(value: float, side: str, precision: str) -> None:
    bad = SCORES.copy()
    bad[3, 7] = value
    figures = measured(bad, SCORES) if side == "artifact" else measured(SCORES, bad)
    rule = {"relative_l2": 0.99, "top1": 0.0, "top5": 0.0, "max_absolute": 1e29}
    message = gate_error(figures, precision, rule, allow_untestable=True, random_weights=True)
    assert "NaN or infinity in 1 of 2000 values, in 1 of 20 samples, 3.jpg the first" in message
    assert ("the reference itself" in message) == (side == "reference")


def test_outputs_that_are_missing_or_have_another_shape_are_refused() -> None:
    both = {"scores": SCORES, "boxes": SCORES[:, :4]}
    assert "output boxes: the output is missing; the artifact has scores" in gate_error(measured(SCORES, both))
    message = gate_error(measured({**both, "boxes": SCORES[:, :5]}, both))
    assert "output boxes: shape [20, 4] expected, [20, 5] found" in message


# Default limits.


def test_every_output_is_judged_and_named() -> None:
    both = {"scores": SCORES, "features": SCORES[:, :4]}
    assert gate_error(measured(both, both)) == ""
    message = gate_error(measured({**both, "features": off_by(0.3, SCORES[:, :4])}, both))
    assert message.startswith("output features: relative L2 error 3.0e-01, limit 1.0e-04")


@pytest.mark.parametrize(
    ("precision", "limit"), [("fp32", 1e-4), ("tf32", 1e-2), ("fp16", 1e-2), ("bf16", 5e-2), ("int8", 0.5)]
)
def test_each_precision_has_its_own_default_limit(precision: str, limit: float) -> None:
    classes = {"top1": 0.0, "top5": 0.0}
    assert gate_error(measured(off_by(limit * 0.9)), precision, classes) == ""
    assert "relative L2 error" in gate_error(measured(off_by(limit * 1.1)), precision, classes)


@pytest.mark.parametrize(("precision", "error"), [("fp32", 2e-3), ("fp16", 7e-2), ("bf16", 0.2)])
def test_an_ill_conditioned_model_gets_a_wider_limit_and_still_has_one(precision: str, error: float) -> None:
    """One ulp of the inputs changes its fp32 outputs by 1e-3, and those of an ordinary model by 1e-7."""
    classes = {"top1": 0.0, "top5": 0.0}
    assert "relative L2 error" in gate_error(measured(off_by(error)), precision, classes)
    assert gate_error(measured(off_by(error), sensitivity=1e-3), precision, classes) == ""
    assert "relative L2 error" in gate_error(measured(off_by(0.4), sensitivity=1e-3), precision, classes)


def test_a_single_bad_sample_among_many_is_refused() -> None:
    many = RANDOM.standard_normal((2000, 100)).astype(np.float32)
    found = many.copy()
    found[1234, ::3] += 0.3
    figures = measured(found, many)
    assert figures["outputs"]["scores"]["relative_l2"] < 1e-2
    message = gate_error(figures, "fp16", {"top1": 0.0, "top5": 0.0})
    assert message.startswith("output scores: maximal absolute error")
    assert message.endswith("worst at 1234.jpg")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_class_that_changes_is_refused_unless_it_was_a_tie(precision: str) -> None:
    """The strongest class of sample 5 leads by 3 RMS, or by almost nothing, and the artifact names the second one."""
    for margin, agrees in ((3.0, False), (1e-3, True)):
        expected = SCORES.copy()
        expected[5, :2] = 20.0 + margin, 20.0
        found = expected.copy()
        found[5, 1] += 1.1 * margin
        figures = measured(found, expected)
        message = gate_error(figures, precision, {"relative_l2": 0.1, "max_absolute": 99})
        assert (message == "") == agrees
        if not agrees:
            assert "top-1 agreement 95%, limit " in message
            assert "worst at 5.jpg: class 1 for 0, which leads by " in message


def test_the_same_count_of_samples_stands_everywhere() -> None:
    """The gate, the comparison and the line of a task count a near tie as no change."""
    expected = SCORES.copy()
    expected[:3, 0] = 20.0
    expected[:3, 1] = [20.0 - 1e-5, 20.0 - 1e-5, 10.0]  # two near ties, and a real change
    found = expected.copy()
    found[:3, 1] = 20.1
    figures, rules = measured(found, expected), settings("fp32", {"relative_l2": 0.1})
    assert judged_artifacts.format_top1(figures, rules) == "19 of 20, with 2 near ties"
    artifact = judged_artifacts.JudgedArtifact("onnx", "fp32", "model.onnx")
    agreement = judged_artifacts.judge(artifact, cast(metrics.MeasuredFile, figures), rules)["outputs"]["scores"][
        "agreement"
    ]["top1"]
    assert (agreement["hits"], agreement["of"]) == (19, 20)
    assert metrics.key_figures(figures).keys() == {"error"}


def test_int8_may_change_the_class_of_one_sample_in_a_hundred() -> None:
    for count, agrees in ((200, True), (50, False)):
        expected = RANDOM.standard_normal((count, 10)).astype(np.float32)
        expected[0, :2] = 9, 5
        found = expected.copy()
        found[0, :2] = 5, 9
        assert (gate_error(measured(found, expected), "int8") == "") == agrees


# Rules.


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"relative_l2": 1e-3}, "relative L2 error 9.9e-03, limit 1.0e-03, worst at "),
        ({"max_absolute": 1e-3}, "maximal absolute error "),
        ({"cosine": 0.99999}, "cosine similarity 0.999"),
        ({"snr": 60}, "signal-to-noise ratio 3"),
        ({"top1": 1.0, "relative_l2": 9.95e-3}, ""),
        ({"output": "scores", "snr": 60}, " dB, limit 60.0 dB, worst at "),
    ],
)
def test_every_metric_can_be_limited(rule: dict[str, Any], message: str) -> None:
    found = gate_error(measured(off_by(0.0099)), "fp16", rule)
    assert message in found
    assert bool(message) == bool(found)


def test_the_last_rule_that_names_a_metric_wins() -> None:
    figures = measured(off_by(0.2))
    loose, strict = {"relative_l2": 0.5, "top1": 0.0, "top5": 0.0}, {"output": "scores", "relative_l2": 0.1}
    assert gate_error(figures, "fp16", loose) == ""
    assert "limit 1.0e-01" in gate_error(figures, "fp16", loose, strict)
    assert gate_error(figures, "fp16", strict, loose) == ""


def test_a_rule_on_an_output_or_metric_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(UserError, match=r"accuracy\.gate: there is no output 'boxes', only scores"):
        gate_error(measured(SCORES), "fp32", {"output": "boxes", "snr": 3})
    maps = SCORES.reshape(20, 10, 10)
    with pytest.raises(UserError, match=r"accuracy\.gate: top1 of scores: the output holds no classes"):
        gate_error(measured(maps, maps), "fp32", {"output": "scores", "top1": 1})
    with pytest.raises(UserError, match=r"accuracy\.gate: top1 of every output: the output holds no classes"):
        gate_error(measured(maps, maps), "fp32", {"top1": 1})
    both = {"maps": maps, "scores": SCORES}
    assert gate_error(measured(both, both), "fp32", {"top1": 1}) == "", "a rule for all outputs is for those that do"
    assert "output more: the reference has no such output" in gate_error(measured({**both, "more": SCORES}, both))


def test_rules_are_for_formats_and_precisions(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from build_tasks.spec.loader import load

    rules = [("snr = 1", ""), ("snr = 2", 'format = "onnx"'), ("snr = 3", 'precision = "int8"')]
    rules += [("snr = 4", 'format = "graph"\nprecision = "fp8"\noutput = "OUTPUT__1"')]
    text = "".join(f"\n[[accuracy.gate]]\n{fits}\n{limit}\n" for limit, fits in rules)
    project.model("m", TINY + text)
    monkeypatch.chdir(project.root)
    (model,) = load()
    assert gate.rules(model, "torchscript", "fp32") == [{"snr": 1}]
    assert gate.rules(model, "onnx", "fp32") == [{"snr": 1}, {"snr": 2}]
    project.model(
        "m",
        TINY.replace('"torchscript", "onnx"', '"onnx", "rtx"') + '[[accuracy.gate]]\nformat = "graph"\n'
        'snr = 5\n[engine]\nprecision = "fp32"\n',
    )
    (compiled,) = load()
    assert gate.rules(compiled, "onnx", "fp32") == [{"snr": 5}], "it is the graph that is compiled, too"
    assert gate.rules(model, "tensorrt", "int8") == [{"snr": 1}, {"snr": 3}]
    assert gate.rules(model, "graph", "fp8") == [{"snr": 1}, {"snr": 4, "output": "OUTPUT__1"}]


# Known classes.


def test_accuracy_is_judged_if_every_class_is_known() -> None:
    expected = RANDOM.standard_normal((200, 10)).astype(np.float32)
    truth = {index: int(value) for index, value in enumerate(expected.argmax(axis=1))}
    truth |= {index: (truth[index] + 1) % 10 for index in range(50)}  # fp32 is wrong in a quarter
    found = expected.copy()
    found[:40] = np.roll(found[:40], 1, axis=1)  # another class, and the right one
    figures = measured(found, expected, truth=truth)
    counts = figures["outputs"]["scores"]["truth"]
    assert (counts["labeled"], counts["reference_top1"], counts["artifact_top1"]) == (200, 150, 190)
    lax = {"relative_l2": 0.99}
    assert gate_error(figures, "int8", lax) == "", "40 samples change their class, all to the right one"
    partly = measured(found, expected, truth={index: truth[index] for index in range(199)})
    assert "top-1 agreement 80%, limit 99%" in gate_error(partly, "int8", lax)
    found[60:65] = np.roll(found[60:65], 1, axis=1)
    found[:40] = expected[:40]
    message = gate_error(measured(found, expected, truth=truth), "int8", lax)
    assert "loss of top-1 accuracy 2.5%, limit 1%, 145 of 200 for 150" in message
    assert gate_error(measured(found, expected, truth=truth), "int8", lax, {"top1_drop": 0.03, "top5_drop": 1}) == ""


def test_agreement_is_judged_if_the_network_misses_the_known_classes() -> None:
    expected = RANDOM.standard_normal((50, 10)).astype(np.float32)
    wrong = {index: int(value) for index, value in enumerate((expected.argmax(axis=1) + 1) % 10)}
    rolled = np.roll(expected, 2, axis=1)
    message = gate_error(measured(rolled, expected, truth=wrong), "int8", {"relative_l2": 0.99})
    assert "top1 of scores" in message, "a truth that is off by one proves nothing"
    with pytest.raises(
        UserError, match=r"accuracy\.truth: 7\.jpg shows class 10, but the network has 10 classes, 0 to 9"
    ):
        measured(expected, expected, truth={7: 10})


def test_truth_is_for_the_first_output_that_names_classes() -> None:
    both = {"maps": SCORES.reshape(20, 10, 10), "scores": SCORES, "embedding": SCORES[:, :8]}
    truth = {index: int(value) for index, value in enumerate(SCORES.argmax(axis=1))}
    outputs = measured(both, both, truth=truth)["outputs"]
    assert [name for name, output in outputs.items() if "truth" in output] == ["scores"]


def test_a_class_is_its_label_or_else_its_index(tmp_path: Path) -> None:
    from build_tasks.verification import accuracy_samples

    names, labels = ["1/a.jpg", "2/b.jpg"], ["3", "1", "2"]
    assert accuracy_samples.read_truth(accuracy_samples.FOLDERS, names, labels) == {0: 1, 1: 2}
    assert accuracy_samples.read_truth(accuracy_samples.FOLDERS, names, None) == {0: 1, 1: 2}
    file = tmp_path / "truth.csv"
    file.write_bytes(b"\xef\xbb\xbf1/a.jpg,0\r\n2/b.jpg,1\r\n")  # as spreadsheets write it
    assert accuracy_samples.read_truth(str(file), names, labels) == {0: 0, 1: 1}
    file.write_text("1/a.jpg,0\n1/a.jpg,1\n")
    with pytest.raises(UserError, match=r"line 2: an earlier line gives '1/a\.jpg' another class"):
        accuracy_samples.read_truth(str(file), names, None)
    with pytest.raises(UserError, match="cannot be read as lines"):
        accuracy_samples.read_truth(str(tmp_path), names, None)
    with pytest.raises(
        UserError, match=r"no sample lies in a folder that is named after its class; a\.jpg, for example, does not"
    ):
        accuracy_samples.read_truth(accuracy_samples.FOLDERS, ["a.jpg"], None)


# Samples that prove nothing.


def test_samples_that_prove_nothing_are_reported_with_the_reason() -> None:
    figures = measured(SCORES)
    assert gate.untestable_reason(figures, settings()) is None
    assert gate.untestable_reason(figures, settings(random_weights=True)) == "random weights"
    few: metrics.Measurements = {**figures, "distinct": 4}
    assert gate.untestable_reason(few, settings()) == "4 distinct samples, and at least 5 are needed"
    same = np.repeat(SCORES[:1], 20, axis=0)
    assert "is the same for all samples" in str(gate.untestable_reason(measured(same, same), settings()))
    alike = (same + 0.005 * SCORES).astype(np.float32)
    assert gate.untestable_reason(measured(alike, alike), settings("fp32")) is None
    assert "less than it may be wrong by (1.0e-02)" in str(
        gate.untestable_reason(measured(alike, alike), settings("fp16"))
    )
    assert gate_error(few).startswith("accuracy cannot be tested: 4 distinct samples")
    assert gate_error(few, allow_untestable=True) == gate_error(few, random_weights=True) == ""


def test_an_output_that_never_differs_leaves_the_others_testable() -> None:
    same = np.repeat(SCORES[:1], 20, axis=0)
    both = {"scores": SCORES, "anchors": same}
    figures = measured(both, both)
    assert gate.untestable_reason(figures, settings()) is None
    assert gate_error(figures) == ""
    assert gate.status(figures, settings()).startswith("ok, except that output anchors is the same for all samples")
    assert gate_error(measured({**both, "anchors": same * 1.1}, both)).startswith("output anchors: relative L2 error")
    assert gate_error(measured({**both, "scores": off_by(0.1)}, both)).startswith("output scores: relative L2 error")
    neither = {"scores": same, "anchors": same}
    assert gate.status(measured(neither, neither), settings()).startswith("not testable: output scores is the same")


@pytest.mark.parametrize(
    ("outputs", "class_names", "with_classes"),
    [
        (("scores",), [], set()),
        (("scores",), ["scores"], {"scores"}),
        (("boxes", "scores"), [], set()),
        (("boxes", "scores"), ["scores"], {"scores"}),
        (("boxes", "scores"), None, {"boxes"}),
    ],
)
def test_scores_are_classes_only_if_the_spec_says_so(
    outputs: tuple[str, ...], class_names: list[str] | None, with_classes: set[str]
) -> None:
    answers = IterationResult(dict.fromkeys(outputs, SCORES))
    names = [f"{index}.jpg" for index in range(20)]
    figures = metrics.compare_outputs(answers, answers, answers, names, class_names=class_names)
    assert {name for name, output in figures.items() if "top1_changes" in output} == with_classes


@pytest.mark.parametrize(
    ("lines", "outputs"),
    [
        ("", []),
        ('labels = "labels.txt"', ["OUTPUT__0"]),
        ('[architecture]\nnetwork = "network.py:build"', []),
        ('[architecture]\ntimm = "resnet18"', ["OUTPUT__0"]),
        ('[architecture]\ntimm = "resnet18"\narguments = { num_classes = 0 }', []),
        ('[architecture]\ntimm = "resnet18"\narguments = { features_only = true }', []),
        ("[[accuracy.gate]]\ntop5 = 0.9", None),
        ("[[accuracy.gate]]\ntop5 = 0.9\n[output]\nsoftmax = true", ["OUTPUT__0"]),
        ("[output]\nsoftmax = true", ["OUTPUT__0"]),
        ("[output]\ntop_k = 3", ["OUTPUT__0"]),
        ('[[accuracy.gate]]\noutput = "OUTPUT__1"\ntop1 = 0.9', ["OUTPUT__1"]),
        ('[[accuracy.gate]]\noutput = "OUTPUT__1"\nrelative_l2 = 0.9', []),
        ('[accuracy]\ntruth = "folders"', None),
    ],
)
def test_the_spec_says_which_outputs_are_classes(lines: str, outputs: list[str] | None) -> None:
    spec = msgspec.convert({"weights": {"source": "random://0"}, **tomllib.loads(lines)}, Spec)
    assert class_outputs(Model("net", spec)) == outputs


def test_classes_of_random_samples_have_no_limit_and_int8_is_not_testable_with_them() -> None:
    figures = measured(SCORES)
    usual, random = settings("int8"), settings("int8", random_samples=True)
    assert {"top1", "top5"} <= {*gate.limits("scores", figures["outputs"]["scores"], usual)}
    assert not {"top1", "top5"} & {*gate.limits("scores", figures["outputs"]["scores"], random)}
    assert (gate.untestable_reason(figures, random) or "").startswith("random samples, on which int8 may lose more")
    assert gate.untestable_reason(figures, settings("fp16", random_samples=True)) is None
    assert gate.status(figures, settings(random_samples=True)) == "ok on random samples"


def test_samples_that_are_the_same_count_once() -> None:
    assert reference_outputs.count_distinct([{"a": np.stack([SCORES[0], SCORES[1], SCORES[0]])}]) == 2
    both = {"a": np.array([1, 1, 1, 2]), "b": np.array(["x", "x", "y", "y"], object)}
    assert reference_outputs.count_distinct([both]) == 3


def test_reduced_precision_with_random_weights_is_measured_and_not_refused() -> None:
    bad = measured(off_by(0.9))
    assert gate_error(bad, "fp16", random_weights=True) == ""
    assert "relative L2 error" in gate_error(bad, "fp32", random_weights=True)
    assert "relative L2 error" in gate_error({**bad, "distinct": 1}, "fp16", allow_untestable=True), "bad is bad"


def test_fp32_that_a_gpu_computed_in_tf32_has_the_limits_of_tf32() -> None:
    on_gpu, bad = measured(off_by(2e-3)), measured(off_by(2e-2))
    for figures in (on_gpu, bad):
        figures["outputs"]["scores"]["arithmetic"] = "tf32"
    assert gate_error(on_gpu, "fp32") == ""
    assert "relative L2 error 2.0e-02, limit 1.0e-02" in gate_error(bad, "fp32")
    assert "limit 1.0e-02" in gate_error(bad, "fp16"), "other precisions keep their own"
    assert "limit 1.0e-04" in gate_error(measured(off_by(2e-3)), "fp32")
    assert gate_error(bad, "fp32", random_weights=True) == "", "rounding may change them by any factor"


def test_a_few_samples_prove_little() -> None:
    assert judged_artifacts.wilson_lower_bound(7, 7) == pytest.approx(0.721, abs=1e-3)
    assert judged_artifacts.wilson_lower_bound(1000, 1000) > 0.997
    assert judged_artifacts.wilson_lower_bound(950, 1000) == pytest.approx(0.937, abs=2e-3)


# Builds with doit.


def test_an_ill_conditioned_network_passes_by_default(project: Project) -> None:
    """One ulp of its inputs changes its outputs by about 1e-3, and so does another order of additions."""
    tiny_network.add(project, "chaotic", body="x = torch.sin(x * 3e4)", formats='"torchscript", "onnx", "rtx"')
    run = project.doit()
    assert {"publish:chaotic", "publish:chaotic_onnx"} <= {*run.ran}, run.out
    report = json.loads((project / "build/chaotic/accuracy.json").read_text())
    rows = {row["file"]: row for row in report["artifacts"]}
    output = rows["model.onnx"]["outputs"]["OUTPUT__0"]
    assert output["sensitivity"] > 1e-4
    assert output["limits"]["relative_l2"] > 4e-4
    assert rows["model.fp16.onnx"]["status"] == "refused", "and fp16 is noise"
    assert run.failed == ["accuracy:chaotic.fp16"]
    assert "relative L2 error" in failure_line(run, "accuracy:chaotic.fp16")
    assert "limit 1.0e-01" in failure_line(run, "accuracy:chaotic.fp16")
    assert "the error jumps at " in failure_line(run, "accuracy:chaotic.fp16")
    assert "error after it" in (project / "build/chaotic/logs/accuracy.chaotic.fp16.log").read_text()


def add_onnx_model(project: Project, accuracy: str, name: str = "net") -> Path:
    folder = tiny_network.add(project, name, formats='"onnx"')
    with (folder / "model.toml").open("a") as spec:
        spec.write(f"\n[accuracy]\n{accuracy}\n")
    return folder


@pytest.mark.parametrize("form", ["npz", "only", "json"])
def test_samples_may_be_tensors(project: Project, form: str) -> None:
    from polygraphy.json import save_json

    batch = RANDOM.standard_normal((9, 3, 16, 16)).astype(np.float32)
    file = "samples.json" if form == "json" else "samples.npz"
    folder = add_onnx_model(project, f'samples = "{file}"')
    if form == "json":
        save_json([{"INPUT__0": batch[:4]}, {"INPUT__0": batch[4:]}], str(folder / file))
    else:
        arrays: dict[str, Any] = {"INPUT__0" if form == "npz" else "x": batch}
        np.savez(folder / file, **arrays)
    run = project.built()
    assert "samples: 9" in run.out
    assert f"9 samples of {file}, 16 x 16" in project.built("summary:net").out
    report = json.loads((project / "build/net/accuracy.json").read_text())
    assert report["samples"] == {"source": file, "count": 9, "distinct": 9}


def test_files_without_usable_tensors_are_refused(project: Project) -> None:
    def saved(name: str, text: bytes | None = None, **arrays: Any) -> None:
        folder = add_onnx_model(project, 'samples = "samples.npz"', name)
        if text is not None:
            (folder / "samples.npz").write_bytes(text)
        elif arrays:
            np.savez(folder / "samples.npz", **arrays)

    good = np.zeros((9, 3, 16, 16), np.float32)
    saved("absent")
    saved("text", b"hello")
    saved("shape", x=good[:, :2])
    saved("two", x=good, y=good)
    saved("nan", x=good * np.nan)
    saved("pickle", x=np.array([{}, 1], dtype=object))
    run = project.doit("reference")
    where = "models/{}/samples.npz"
    for name, message in {
        "absent": f"{where} does not exist",
        "text": f"{where} cannot be read as samples",
        "shape": f"{where}: expected an array of shape [samples, 3, 16, 16], found [9, 2, 16, 16]",
        "two": f"{where}: expected the array INPUT__0, or a single one, found x, y",
        "nan": f"{where}: the samples contain a NaN or an infinity",
        "pickle": f"{where} cannot be read as samples",
    }.items():
        assert message.format(name) in failure_line(run, f"reference:{name}")


def test_the_folder_of_a_picture_may_be_its_class(project: Project) -> None:
    folder = add_onnx_model(project, 'samples = "pictures"\ntruth = "folders"\nallow_untestable = true')
    for index, name in enumerate(("brick", "camera", "chelsea", "coffee", "grass", "rocket")):
        (folder / f"pictures/{index % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f"build_tasks/verification/photographs/{name}.jpg", folder / f"pictures/{index % 3}")
    project.built()
    run = project.built("summary:net")
    truth = json.loads((project / "build/net/model.onnx.measured.json").read_text())["outputs"]["OUTPUT__0"]["truth"]
    assert truth["labeled"] == 6
    assert truth["reference_top1"] == truth["artifact_top1"]
    assert "PyTorch fp32" in run.out
    assert "top-1 accuracy" in run.out
    assert (project / "build/net/samples.txt").read_text().splitlines()[0] == "0/brick.jpg"


def test_a_mistake_in_the_truth_is_reported_with_its_line(project: Project) -> None:
    lines = {
        "nothing": ("", ": the file has no line `sample,class`"),
        "half": ("coffee.jpg", ", line 1: expected `sample,class`, found 'coffee.jpg'"),
        "picture": (
            "camera.jpg,1\ncofee.jpg,1",
            ", line 2: there is no sample 'cofee.jpg' (did you mean 'coffee.jpg'?)",
        ),
        "label": ("coffee.jpg,espreso", ", line 1: there is no class 'espreso' (did you mean 'espresso'?)"),
        "class": ("coffee.jpg,4", ", line 1: there is no class 4; the labels have the indices 0 to 3"),
        "twice": (
            "coffee.jpg,crane",
            ", line 1: 2 classes have the label 'crane'; write the index of the class instead",
        ),
    }
    for name, (text, _) in lines.items():
        folder = add_onnx_model(project, 'truth = "truth.csv"', name)
        (folder / "truth.csv").write_text(text)
        (folder / "labels.txt").write_text("espresso\ncrane\ncrane\ncat, or so\n")
        project.edit(f"models/{name}/model.toml", "max_batch_size", 'labels = "labels.txt"\nmax_batch_size')
    add_onnx_model(project, 'truth = "truth.csv"', "absent")
    run = project.doit("measure")
    for name, (_, message) in lines.items():
        assert f"models/{name}/truth.csv{message}" in failure_line(run, f"measure:{name}_onnx")
    assert "models/absent/truth.csv does not exist" in failure_line(run, "measure:absent_onnx")
    (project / "models/class/truth.csv").write_text('coffee.jpg,espresso\ncamera.jpg,"cat, or so"\nbrick.jpg,2\n')
    project.built("measure:class_onnx")


def test_preprocessing_is_published_for_the_client(built_tiny: Project) -> None:
    message = json.loads((built_tiny / "model_repository/tiny/preprocessing.json").read_text())
    assert message["input_size"] == [3, 160, 160]
    assert {"mean", "std", "interpolation", "crop_pct", "crop_mode", "steps"} <= message.keys()
    assert not [step for step in message["steps"] if " at 0x" in step]
