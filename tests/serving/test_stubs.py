"""`doit check --stubs` refuses what the backends of ONNX Runtime and PyTorch refuse, and goes on after a crash.

One server loads a repository of models that were built here, and of copies whose config or artifact was changed.
"""

import shutil
from pathlib import Path

import pytest

from tests.support import specs_served
from tests.support.project import Project, Run

# By name of the copy: (model, part of its config.pbtxt, replacement, reason of the server).
# Source of what the backend refuses: ValidateInputs and ValidateOutputs in src/onnxruntime.cc of onnxruntime_backend.
CONTRADICTIONS = {
    "other_dims_of_input": ("plain_onnx", "dims: 16\n}", "dims: 17\n}", "tensor 'INPUT__0': the model expects 4 dim"),
    "other_dims_of_output": (
        "plain_onnx",
        "dims: 4",
        "dims: 5",
        "shape [-1, 4]) but the model configuration specifies",
    ),
    "open_dims_of_output": ("plain_onnx", "dims: 4", "dims: -1", "(an initial batch dimension because max_batch_size"),
    "other_rank_of_input": (
        "plain_onnx",
        "  format: FORMAT_NCHW\n  dims: 3",
        "",
        "tensor 'INPUT__0': the model expects 4 dimensions (shape [-1, 3, 16, 16]) but",
    ),
    "other_rank_of_output": ("plain_onnx", "dims: 4", "dims: 4 dims: 1", "specifies 3 dimensions"),
    "other_type_of_input": (
        "plain_onnx",
        "TYPE_FP32",
        "TYPE_FP16",
        "configuration expects datatype TYPE_FP16 for input 'INPUT__0', model provides tensor(float)",
    ),
    "other_type_of_output": ("plain_onnx", "TYPE_FP32\n  dims: 4", "TYPE_INT32\n  dims: 4", "for output 'OUTPUT__0'"),
    "bf16_input": ("plain_onnx", "TYPE_FP32", "TYPE_BF16", "unsupported datatype TYPE_BF16 for input 'INPUT__0'"),
    "bf16_output": ("plain_onnx", "TYPE_FP32\n  dims: 4", "TYPE_BF16\n  dims: 4", "datatype TYPE_BF16 for output"),
    "other_name_of_input": ("plain_onnx", "INPUT__0", "image", "unexpected inference input 'image', allowed inputs"),
    "other_name_of_output": ("plain_onnx", "OUTPUT__0", "scores", "unexpected inference output 'scores', allowed"),
    "second_input": (
        "plain_onnx",
        "output {",
        'input { name: "MASK" data_type: TYPE_FP32 dims: 1 }\noutput {',
        "configuration expects 2 inputs, model provides 1",
    ),
    "batch_in_dims": ("plain_onnx", "  format: FORMAT_NCHW\n", "  dims: -1\n", "specifies 5 dimensions"),
    "no_batch_dimension": (
        "plain_onnx",
        "max_batch_size: 3",
        "max_batch_size: 0",
        "the model expects 4 dimensions (shape [-1, 3, 16, 16]) but the model configuration specifies 3 dimensions",
    ),
    "fixed_batch": (
        "fixed_onnx",
        "max_batch_size: 0",
        "max_batch_size: 2",
        "for the model to support batching the shape should have at least 1 dimension and the first",
    ),
    "control_of_sequences": (
        "sequences_onnx",
        "sequence_batching {",
        'sequence_batching { control_input { name: "START" control { kind: CONTROL_SEQUENCE_START '
        "int32_false_true: [0, 1] } }",
        "configuration specified sequence control 'START', but model does not provide that input",
    ),
    # Source: ValidateInputs, ValidateOutputs, Execute, ReadOutputTensors in src/pt/model_instance_state.cc of
    # pytorch_backend. A model that answers wrongly fails its warm-up.
    "torch_second_input": (
        "plain",
        "output {",
        'input { name: "INPUT__1" data_type: TYPE_FP32 dims: 1 }\noutput {',
        "configuration expects 2 inputs, model provides 1",
    ),
    "torch_index_of_input": ("plain", "INPUT__0", "INPUT__1", "the inputs INPUT__1 are not the arguments 0 to 0"),
    "torch_index_of_output": ("plain", "OUTPUT__0", "OUTPUT__1", "refers to an output index which doesn't exist"),
    "torch_bf16": ("plain", "TYPE_FP32", "TYPE_BF16", "unsupported datatype TYPE_BF16 for input 'INPUT__0'"),
    "torch_uint16": ("plain", "TYPE_FP32\n  dims: 4", "TYPE_UINT16\n  dims: 4", "unsupported datatype TYPE_UINT16 for"),
    "torch_other_type": (
        "plain",
        "TYPE_FP32\n  dims: 4",
        "TYPE_FP64\n  dims: 4",
        "configuration expects datatype TYPE_FP64 for output 'OUTPUT__0', model provides float32",
    ),
}

# The PyTorch backend does not compare dims, and takes names of one's own in the order of the config.
ACCEPTED = {
    "torch_own_names": ("plain", "OUTPUT__0", "scores"),
    "torch_other_dims": ("plain", "dims: 4", "dims: 5"),
    "torch_by_backend": ("plain", 'platform: "pytorch_libtorch"', 'backend: "pytorch"'),
}

# Python models that end the server: while it loads them, and when it has loaded them.
CRASH = """\
import os, signal, threading, time


class TritonPythonModel:
    def initialize(self, args):
        {action}

    def execute(self, requests):
        return []


def end_server():
    os.kill(os.getppid(), signal.SIGKILL)


def end_server_later():
    # the server loads the next model
    while True:
        with open("build/check.log") as file:
            if "loading: " in file.read().partition("successfully loaded 'ends_later'")[2]:
                return end_server()
        time.sleep(0.01)
"""
CRASHES = {
    "ends_at_once": "end_server()",
    "ends_later": "threading.Thread(target=end_server_later, daemon=True).start()",
}
CRASH_CONFIG = """\
name: "{name}"
backend: "python"
input {{ name: "X" data_type: TYPE_FP32 dims: 1 }}
output {{ name: "Y" data_type: TYPE_FP32 dims: 1 }}
"""

GOOD = ("fixed_onnx", "plain", "plain_onnx", "sequences", "sequences_onnx")


def copy_model(project: Project, name: str, original: str, old: str, new: str) -> Path:
    """Copy a published model under another name, with a change in its config. Return the new folder."""
    folder = project / f"model_repository/{name}"
    shutil.copytree(project / f"model_repository/{original}", folder)
    config = f"model_repository/{name}/config.pbtxt"
    project.edit(config, old, new)
    project.edit(config, f'name: "{original}"', f'name: "{name}"')
    return folder


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`doit check --stubs` over everything above, in one run."""
    import torch

    class List(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> list[torch.Tensor]:
            return [batch.mean(dim=(2, 3))]

    project = Project(tmp_path_factory.mktemp("stubs") / "project")
    for name in ("plain", "fixed", "sequences"):
        specs_served.add(project, name)
    project.built()
    project.built("tritonserver")
    for name, (original, old, new, _) in CONTRADICTIONS.items():
        copy_model(project, name, original, old, new)
    for name, (original, old, new) in ACCEPTED.items():
        copy_model(project, name, original, old, new)
    folder = copy_model(project, "torch_list", "plain", "max_batch_size", "max_batch_size")
    torch.jit.script(List()).save(folder / "1/model.pt")
    for name, action in CRASHES.items():
        folder = project / f"model_repository/{name}"
        (folder / "1").mkdir(parents=True)
        (folder / "1/model.py").write_text(CRASH.format(action=action))
        (folder / "config.pbtxt").write_text(CRASH_CONFIG.format(name=name))
    return project.doit("check", "--server", "core", "--stubs")


def result(run: Run, name: str) -> str:
    """The result of one model in the output of `doit check`."""
    line = next(line for line in run.out.splitlines() if line.startswith(f"  {name}: "))
    return line.removeprefix(f"  {name}: ")


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_config_that_contradicts_its_artifact_is_refused(checked: Run, name: str) -> None:
    message = result(checked, name)
    assert message.startswith("refused: ")
    assert CONTRADICTIONS[name][-1] in message


def test_a_torchscript_model_that_answers_with_a_list_is_refused(checked: Run) -> None:
    message = result(checked, "torch_list")
    assert message.startswith("refused: ")
    assert "output must be of type Tensor or List[str], received List[Tensor]" in message


@pytest.mark.parametrize("name", [*ACCEPTED, *GOOD])
def test_what_the_backends_load_is_loaded(checked: Run, name: str) -> None:
    assert result(checked, name).startswith("ok (by a stub: ")


def test_no_process_of_a_server_that_was_killed_stays(checked: Run) -> None:
    assert checked.code == 1
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert [command for command in commands if b"triton_python_backend_stub" in command and b"/ends_" in command] == []


def test_the_model_that_ends_the_server_is_named_and_the_others_are_loaded(checked: Run) -> None:
    assert result(checked, "ends_at_once") == "refused: the server ended with SIGKILL while it loaded this model"
    lines = [line for line in checked.out.splitlines() if line.startswith("  ends_later: ")]
    assert lines == ["  ends_later: ok", "  ends_later: refused: the server ended after it had loaded this model"]
    assert checked.code == 1
    refused = {*CONTRADICTIONS, *CRASHES, "torch_list"}
    (line,) = [line for line in checked.out.splitlines() if "Triton refuses " in line]
    names = line.partition("Triton refuses ")[2].partition(";")[0].split(", ")
    assert refused <= set(names), checked.out
    # The core of 24.10 also crashes some time after it has refused a wrong TorchScript model. If another model was
    # loaded meanwhile, that one is named.
    for name in set(names) - refused:
        assert f"  {name}: refused: the server ended after it had loaded this model" in checked.out, checked.out
    assert len(names) <= len(refused) + 2, checked.out
