"""[[ensemble.steps]] of a spec: what one spec shows, and which models its steps may name."""

# ruff: noqa: E501  (one mistake a line)

from pathlib import Path

import pytest

from build_tasks.errors import UserError
from build_tasks.spec.loader import load

SPEC = """\
formats = ["onnx"]
[architecture]
timm = "test_efficientnet"
[weights]
source = "random://0"
"""
STEPS = """\
[[ensemble.steps]]
model = "m_preprocess"
[[ensemble.steps]]
model = "other_onnx"
[[ensemble.steps]]
python = "best"
inputs = { SCORES = "OUTPUT__0" }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("m", "other"):
        (tmp_path / f"models/{name}").mkdir(parents=True)
        (tmp_path / f"models/{name}/model.toml").write_text(SPEC)
    best = tmp_path / "models/m/best"
    best.mkdir()
    for file in ("model.py", "config.pbtxt"):
        (best / file).touch()
    return best


def test_an_ensemble_adds_its_python_models_and_the_preprocessing_that_a_step_names(folder: Path) -> None:
    (folder.parent / "model.toml").write_text(SPEC + STEPS)
    [model, _] = load()
    assert [*model.triton_models] == ["m_onnx", "m_preprocess", "m_ensemble", "m_best"]
    (folder.parent / "model.toml").write_text(SPEC + STEPS.replace("m_preprocess", "m_onnx"))
    assert [*load()[0].triton_models] == ["m_onnx", "m_ensemble", "m_best"]


WRONG = [
    ('[[ensemble.steps]]\nmodel = "other_onxx"', "ensemble.steps[0].model: expected a model of Triton's that a spec describes"),
    ('[[ensemble.steps]]\nmodel = "other"', "found 'other' (did you mean 'other_onnx'?)"),
    ('[[ensemble.steps]]\nmodel = "m_ensemble"', "ensemble.steps[0].model: expected another model than the ensemble itself"),
    ("[[ensemble.steps]]\n", "ensemble.steps[0]: expected either `model` or `python`, found neither"),
    ('[[ensemble.steps]]\nmodel = "m_onnx"\npython = "best"', "expected either `model` or `python`, found both"),
    (
        '[[ensemble.steps]]\npython = "nothere"',
        "ensemble.steps[0].python: expected a folder with config.pbtxt and model.py, found no nothere/config.pbtxt",
    ),
    ('[[ensemble.steps]]\npython = "../m/best"', "ensemble.steps[0].python: expected str matching regex"),
    (
        '[[ensemble.steps]]\nmodel = "m_onnx"\noutputs = { OUTPUT__0 = "x" }\n'
        '[[ensemble.steps]]\nmodel = "other_onnx"\noutputs = { OUTPUT__0 = "x" }',
        "ensemble.steps[1].outputs.OUTPUT__0: expected another name than that of steps[0].outputs.OUTPUT__0, found 'x'",
    ),
    (
        '[ensemble]\noutputs = ["OUTPUT__0", "OUTPUT__0"]\n[[ensemble.steps]]\nmodel = "m_onnx"',
        "ensemble.outputs: expected each tensor once, found OUTPUT__0, OUTPUT__0",
    ),
    ('[ensemble]\nsamples = "x.json"\n[[ensemble.steps]]\nmodel = "m_onnx"', "ensemble.samples: expected an .npz file, found 'x.json'"),
    (
        '[[ensemble.steps]]\nmodel = "m_onnx"\noutputs = { OUTPUT__0 = \'a"b\' }',
        "ensemble.steps[0].outputs.OUTPUT__0: expected str matching regex '^[A-Za-z_][A-Za-z0-9_.:/-]*$', found 'a\"b'",
    ),
    ("[ensemble]\nsteps = []", "ensemble.steps: expected `array` of length >= 1"),
    ('[ensemble]\nsamples = "x.npz"', "ensemble: expected the key 'steps', found nothing"),
    ('[[ensemble.steps]]\nmodel = "m_onnx"\ninput = {}', "ensemble.steps[0]: expected one of model, python, inputs, outputs"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line"), WRONG, ids=[line[:50] for _, line in WRONG])
def test_wrong_steps_are_refused_with_one_line(folder: Path, text: str, line: str) -> None:
    (folder.parent / "model.toml").write_text(SPEC + text)
    with pytest.raises(UserError) as error:
        load()
    message = str(error.value)
    assert line.replace("`", "") in message.replace("`", ""), message
    assert message.startswith("models/m/model.toml: ")
    assert "\n" not in message


def test_an_ensemble_is_a_step_of_another_unless_they_contain_each_other(folder: Path) -> None:
    (folder.parent / "model.toml").write_text(SPEC + STEPS)
    other = folder.parent.parent / "other/model.toml"
    other.write_text(f'{SPEC}[[ensemble.steps]]\nmodel = "m_ensemble"\n')
    _, outer = load()
    assert [step.model for step in outer.steps] == ["m_ensemble"]
    (folder.parent / "model.toml").write_text(SPEC + STEPS.replace("other_onnx", "other_ensemble"))
    with pytest.raises(UserError) as error:
        load()
    cycle = "ensemble.steps: expected steps without a cycle, found one among m_ensemble, other_ensemble"
    assert str(error.value).split("\n") == [f"models/{name}/model.toml: {cycle}" for name in ("m", "other")]
