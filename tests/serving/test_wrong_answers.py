"""`doit smoke` refuses a server that answers wrongly only in some batches, slots, or under concurrent requests.

The server is Triton's core. A deliberately wrong backend takes the place of the stub for ONNX Runtime.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from build_tasks.serving import triton_core, triton_server
from tests.support import specs_served, tiny_network
from tests.support.project import ROOT, Project, Run

# By name: code that changes the outputs of all requests that the backend executes at once, before it answers. Each is
# the only output of one request.
FAULTS = {
    "rows of other requests": """
    if len(outputs) > 1 and len({len(output) for output in outputs}) > 1:
        rows = np.concatenate(outputs)[::-1]
        ends = np.cumsum([len(output) for output in outputs])
        return np.split(rows, ends[:-1])
    return outputs
""",
    "one slot": """
    return [np.concatenate([output[:2], output[2:] + 1]) if len(output) > 2 else output for output in outputs]
""",
    "batch 1": """
    return [output + (1 if len(output) == 1 and batches == 1 else 0) for output in outputs]
""",
    "none": """
    return outputs
""",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the server's core and three models, built."""
    project = Project(tmp_path_factory.mktemp("wrong") / "project")
    specs_served.add(project, "plain")
    specs_served.add(project, "sequences")
    for name, body in (("best", "return self.head(x.mean(dim=(2, 3))).argmax(1)"),):
        folder = tiny_network.add(project, name, body=body, formats='"torchscript", "onnx"')
        network = (folder / "network.py").read_text()
        assert "argmax" in network
    folder = tiny_network.add(project, "steps", formats='"onnx"')
    spec = (folder / "model.toml").read_text()
    (folder / "model.toml").write_text(f'ensemble = "onnx"\n{spec}\n[triton.onnx]\nsequence_batching = {{}}\n')
    project.built()
    project.built("tritonserver")
    return project


@pytest.fixture
def serving(
    built: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], triton_server.Server]]:
    """Starts the server with a fault in its backend for ONNX."""
    with contextlib.ExitStack() as running:

        def start(fault: str) -> triton_server.Server:
            stubs = tmp_path / "stubs"
            shutil.copytree(ROOT / triton_core.STUBS, stubs)
            path = stubs / "onnxruntime/model.py"
            text = path.read_text()
            text += "\n\nimport numpy as np\n\n\ndef changed(outputs, batches):" + FAULTS[fault]
            answer = "[response for part in self.batches.split(requests) for response in self.respond(part)]"
            assert answer in text
            path.write_text(
                text.replace(
                    f"return {answer}",
                    "import time\n"
                    "        time.sleep(0.02)  # other requests arrive meanwhile\n"
                    f"        responses = {answer}\n"
                    "        answers = [response.output_tensors()[0].as_numpy() for response in responses]\n"
                    "        name = self.batches.outputs[0]\n"
                    "        return [\n"
                    "            pb_utils.InferenceResponse([pb_utils.Tensor(name, np.array(output))])\n"
                    "            for output in changed(answers, len(requests))\n"
                    "        ]",
                )
            )
            monkeypatch.chdir(built.root)
            monkeypatch.setattr(triton_core, "STUBS", str(stubs))
            ports = triton_server.free_ports()
            return running.enter_context(triton_server.start("core", "26.08", ports, "build/test.log", stubs=True))

        yield start


@pytest.mark.parametrize("name", ["sequences", "sequences_onnx"])
def test_the_example_clients_of_a_model_with_sequences_get_an_answer_for_each_picture(
    built: Project, serving: Callable[[str], triton_server.Server], name: str
) -> None:
    """The server's sequence batcher refuses a request without a correlation ID, and one of several samples."""
    server = serving("none")
    assert server.load(name) is None
    pictures = sorted(map(str, (ROOT / "build_tasks/verification/photographs").glob("*.jpg")))[:3]
    answers = []
    for protocol, url in (("http", server.http), ("grpc", server.grpc)):
        run = subprocess.run(
            [sys.executable, built / f"build/sequences/clients/{name}/{protocol}_client.py", *pictures],
            env={**os.environ, "TRITON_URL": url}, text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        answers.append(run.stdout)
    assert answers[0] == answers[1]
    assert [line for line in answers[0].splitlines() if line in pictures] == pictures


def smoke(project: Project, server: triton_server.Server, model: str) -> Run:
    return project.doit("smoke", "--url", server.http, "--grpc", server.grpc, "--model", model)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("rows of other requests", "plain_onnx (HTTP): 8 requests at a time: output OUTPUT__0: a batch of "),
        ("one slot", "in slot 2 differs from that in another batch by "),
        ("batch 1", "plain_onnx (HTTP): output OUTPUT__0: a batch of 1, "),
    ],
)
def test_a_backend_that_is_wrong_in_one_way_is_refused(
    built: Project, serving: Callable[[str], triton_server.Server], fault: str, message: str
) -> None:
    server = serving(fault)
    assert server.load("plain_onnx") is None
    run = smoke(built, server, "plain_onnx")
    assert run.code == 1, run.out
    assert message in run.out


def test_what_is_right_passes(built: Project, serving: Callable[[str], triton_server.Server]) -> None:
    """Also one value per sample, which Triton serves as (batch, 1), and models with sequences, one request each."""
    server = serving("none")
    for name in ("plain_onnx", "best", "best_onnx", "sequences_onnx", "steps_ensemble"):
        assert server.load(name) is None
        run = smoke(built, server, name)
        assert run.code == 0, run.out
        assert len([line for line in run.out.splitlines() if line.split()[:1] == [name] and "ok" in line]) == 2
    samples = built / "build/plain/samples.json"
    samples.rename(samples.with_suffix(".kept"))
    run = smoke(built, server, "plain_onnx")
    samples.with_suffix(".kept").rename(samples)
    assert "plain_onnx (HTTP): build/plain/samples.json does not exist; `doit plain` builds it; " in run.out
    assert "Traceback" not in run.out
    options = ("--formats", "onnx", "--seconds", "0.1", "--batches", "1,2", "--concurrency", "2")
    run = built.doit("bench:sequences", "--url", server.http, *options)
    assert run.code == 0, run.out
    assert "onnx         batch   1 x 2" in run.out, "Triton refuses several samples in a request of a sequence"
    run = built.doit("bench:sequences", "--url", server.http, *options[:-3], "2", *options[-2:])
    assert "sequences_onnx takes at most 1 images, and none of [2]" in run.out
