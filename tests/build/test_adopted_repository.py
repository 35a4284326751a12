"""A repository of three models that people wrote answers the same after doit has taken it over, in Triton's core.

The stub backends run the artifacts, the originals and those that doit built.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build_tasks.doit_plugin import adoption
from build_tasks.doit_plugin.adopt_command import Adopt
from build_tasks.serving import triton_server
from build_tasks.triton import config_fields
from build_tasks.triton.existing_repository import read_config
from tests.support.existing_models import write_model
from tests.support.project import OTHER, Project

BATCH = 3
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(BATCH, 3, 32, 32)).astype(np.float32)
IDS = RANDOM.integers(0, 100, (BATCH, 5)).astype(np.int64)
FEEDS: dict[str, dict[str, Any]] = {
    "named_tensors": {"images": IMAGES},
    "open_length": {"input_ids": IDS, "attention_mask": np.ones_like(IDS)},
    "torch_outputs": {"INPUT__0": IMAGES[:, :, :16, :16].copy()},
}
Answers = dict[str, Any]


@pytest.fixture
def adopted(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose model_repository/ holds three models of a person, in version 7 of one of them."""
    project.model("other", OTHER)
    project.built("tritonserver")
    monkeypatch.chdir(project.root)
    for name in FEEDS:
        write_model(Path("model_repository"), name)
    os.rename("model_repository/named_tensors/1", "model_repository/named_tensors/7")
    return project


def ask_triton() -> Answers:
    """Load the repository in Triton's core, and return its answers: version, tensors and classes of each model."""
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
    from tritonclient.utils import np_to_triton_dtype

    answers: Answers = {}
    with (
        triton_server.start("core", "24.10", triton_server.free_ports(), "build/core.log", stubs=True) as server,
        contextlib.closing(InferenceServerClient(server.http)) as client,
    ):
        for name, feed in FEEDS.items():
            assert server.load(name) is None
            inputs = [
                InferInput(key, list(value.shape), np_to_triton_dtype(value.dtype)) for key, value in feed.items()
            ]
            for tensor, value in zip(inputs, feed.values(), strict=True):
                tensor.set_data_from_numpy(value)
            result = client.infer(name, inputs)
            response = result.get_response()
            tensors = {output["name"]: result.as_numpy(output["name"]) for output in response["outputs"]}
            answers[name] = (response["model_version"], tensors)
        images = InferInput("images", list(IMAGES.shape), "FP32")
        images.set_data_from_numpy(IMAGES)
        classes = client.infer("named_tensors", [images], outputs=[InferRequestedOutput("logits", class_count=2)])
        answers["classes"] = classes.as_numpy("logits").tolist()
    return answers


def test_three_models_answer_the_same_before_and_after(adopted: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project = adopted
    before, files = ask_triton(), project.tree()
    expected = {each.existing.name: each.after for each in adoption.adopt("model_repository")}

    assert Adopt().parse_execute(["model_repository", "--write"]) == 0
    assert project.tree() == files
    assert Adopt().parse_execute(["model_repository", "--replace"]) == 1
    assert "build/named_tensors/model.onnx is not there: `doit named_tensors` builds it" in capsys.readouterr().err
    run = project.doit(*FEEDS)
    assert run.failed == [f"publish:{name}" for name in FEEDS], run.out
    assert project.tree() == files, "a model of a person is not overwritten"

    assert Adopt().parse_execute(["model_repository", "--replace"]) == 0
    out = capsys.readouterr().out
    assert [line.partition(", ")[0] for line in out.splitlines()[:3]] == [f"{name}: answers the same" for name in FEEDS]
    assert project.tree("build/.adopted") == files
    project.built(*FEEDS)
    for name, config in expected.items():
        published = read_config(f"model_repository/{name}/config.pbtxt")
        model_format = "torchscript" if name == "torch_outputs" else "onnx"
        assert config_fields.normalized(published, name, model_format) == config
    assert not list(Path("model_repository").rglob(".replaceable"))

    after = ask_triton()
    assert after["classes"] == before["classes"]
    for name in FEEDS:
        (version, tensors), (old_version, old_tensors) = after[name], before[name]
        assert (version, tensors.keys()) == (old_version, old_tensors.keys())
        for key, value in old_tensors.items():
            np.testing.assert_allclose(tensors[key], value, rtol=1e-5, atol=1e-6)
    assert after["named_tensors"][0] == "7"
    assert project.built(*FEEDS).ran == []
