"""`doit farm` and `doit worker`: a Dask cluster on loopback addresses, workers in checkouts of their own.

The stages are light ones, and the GPUs made up (tests/support/fakes). Everything else is real: the scheduler, the
workers, their processes of doit, the build cache.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import fakes
from tests.support.cache_server import free_port, wait_for_port
from tests.support.light_stages import use_light_stages
from tests.support.project import DOIT, ENVIRONMENT, ROOT, TINY, Project

NO_NVML = {"DASK_DISTRIBUTED__DIAGNOSTICS__NVML": "False"}  # the fake one has only what this project calls
CPU_SPEC = TINY.replace("weights.safetensors", "random://0").replace('labels = "labels.txt"\n', "")
PLANS = CPU_SPEC.replace('["torchscript", "onnx"]', '["torchscript", "tensorrt", "aoti"]') + (
    "[engine]\ncompute_capabilities = ['8.6', '9.0', '12.0']\n[aoti]\ncompute_capabilities = ['8.6', '9.0']\n"
)


CERTIFICATES = ROOT / "docs/how-to/farm.md"  # shows how to make them


def project_of(root: Path, *models: str, spec: str = CPU_SPEC) -> Project:
    """A project with light stages, whose models share no step."""
    project = Project(root)
    use_light_stages(project, processes=True)
    for index, model in enumerate(models):
        project.model(
            model, spec.replace("max_batch_size = 4", f"max_batch_size = {4 + index}").replace("//0", f"//{index}")
        )
    return project


class Cluster:
    """A scheduler on 127.0.0.1, and workers on 127.0.0.2, 127.0.0.3, …

    Attributes:
        environment: The variables of the head.

    Args:
        seconds: That each stage sleeps.
        first: The number of its first worker.
        tls: The folder with the configuration of Dask for TLS, None for no TLS.
    """

    def __init__(
        self, folder: Path, stack: contextlib.ExitStack, seconds: str = "0", first: int = 2, tls: Path | None = None
    ):
        self.first = first
        self.folder = folder
        self.stack = stack
        self.port = free_port()
        protocol = "tls" if tls else "tcp"
        self.address = f"{protocol}://127.0.0.1:{self.port}"
        self.tls = {"DASK_CONFIG": str(tls)} if tls else {}
        self.environment = {"BUILD_SCHEDULER": self.address, "BUILD_CACHE": f"file://{folder}/cache", **self.tls}
        self.seconds = seconds
        self.workers: list[subprocess.Popen[bytes]] = []
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--protocol", protocol, "--no-dashboard"]
        self.scheduler = self.start([sys.executable, "-m", "distributed.cli.dask_scheduler", *options], folder, {})
        wait_for_port(self.port)

    def start(self, command: list[str], cwd: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        log = self.stack.enter_context((self.folder / f"log{time.monotonic_ns()}").open("wb"))
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**ENVIRONMENT, **NO_NVML, "LIGHT_STAGE_SECONDS": self.seconds, **self.tls, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self.stack.callback(process.wait)
        self.stack.callback(end, process)
        return process

    def add_worker(self, environment: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
        number = len(self.workers) + self.first
        checkout = project_of(self.folder / f"worker{number}")
        command = [DOIT, "worker", self.address, "--host", f"127.0.0.{number}", "--name", f"worker{number}"]
        self.workers.append(self.start(command, checkout.root, environment or {}))
        return self.workers[-1]


def end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def wait_for_workers(cluster: Cluster) -> None:
    """Wait until the scheduler knows all workers: `doit farm` uses those that are there."""
    count = len(cluster.workers)
    code = f"from distributed import Client; Client({cluster.address!r}).wait_for_workers({count}, timeout=120)"
    subprocess.run([sys.executable, "-c", code], env={**ENVIRONMENT, **cluster.tls}, check=True, timeout=200)


def read_lines(farm: "subprocess.Popen[str]", count: int, of: str) -> None:
    """Read the output of a farm until a worker has built some stages."""
    assert farm.stdout is not None
    for line in farm.stdout:
        count -= "✓" in line and f"[{of}]" in line
        if not count:
            return
    raise AssertionError("the farm ended before")


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def actions(cluster: Cluster, stage: str) -> list[dict[str, object]]:
    paths = (cluster.folder / "cache/v1/actions").rglob("*.json")
    return [action for path in paths if (action := json.loads(path.read_text()))["stage"] == stage]


@pytest.mark.parametrize("each", [1, pytest.param(2, marks=pytest.mark.long)])
def test_each_plan_is_built_once_on_its_kind_of_gpu(each: int, tmp_path: Path, stack: contextlib.ExitStack) -> None:
    """With one or two workers of each kind. Only on those of 9.0 can PyTorch use the GPU."""
    cluster = Cluster(tmp_path, stack)
    kinds = {"8.6": range(2, 2 + each), "9.0": range(2 + each, 2 + 2 * each)}
    gpus = {
        capability: fakes.machine(tmp_path / capability, gpus=f"GPU of {capability}, {capability}", cuda=cuda)
        for capability, cuda in (("8.6", None), ("9.0", fakes.CUDA))
    }
    for capability, numbers in kinds.items():
        for _ in numbers:
            cluster.add_worker(gpus[capability])
    wait_for_workers(cluster)
    head = project_of(tmp_path / "head", "one", "two", spec=PLANS)
    without = fakes.machine(tmp_path / "none", tensorrt=None, gpus=None, torch=False)
    run = head.built("farm", **cluster.environment, **without)
    for model in ("one", "two"):
        assert f"– {model} not for this cluster: no worker has tensorrt:12.0 (engine:{model}.sm120" in run.out
        assert f"– {model} not for this cluster: no worker has torch:8.6 (aoti:{model}.sm86" in run.out
        for stage, capability in (("engine", "8.6"), ("engine", "9.0"), ("aoti", "9.0")):
            name = f"{model}.sm{capability.replace('.', '')}"
            lines = re.findall(rf"✓ {stage} +{re.escape(name)} .*\[worker(\d)\]", run.out)
            assert [int(number) in kinds[capability] for number in lines] == [True], run.out
    engines = actions(cluster, "engine")
    assert sorted(str(engine["tools"]["GPU"]) for engine in engines) == ["GPU of 8.6"] * 2 + ["GPU of 9.0"] * 2  # type: ignore[index]
    # The same as a build on one machine would give: everything but the plans, and each plan as on its kind.
    local = project_of(tmp_path / "local", "one", "two", spec=PLANS)
    for capability in kinds:
        local.built(**gpus[capability])
    assert head.tree() == local.tree()
    assert head.built("farm", **cluster.environment, **without).out.count("✓") == 0


@pytest.mark.parametrize(
    ("tensorrt", "cuda", "expected"),
    [
        (None, fakes.CUDA, ["torch:9.0"]),
        (None, fakes.CUDA - 1, []),
        (fakes.TENSORRT, None, ["tensorrt:9.0"]),
        (fakes.TENSORRT, fakes.CUDA, ["tensorrt:9.0", "torch:9.0"]),
    ],
)
def test_a_worker_declares_what_can_use_its_gpu(
    tensorrt: str | None, cuda: int | None, expected: list[str], tmp_path: Path
) -> None:
    machine = fakes.machine(tmp_path, tensorrt=tensorrt, gpus="NVIDIA H200, 9.0", cuda=cuda)
    code = "from build_tasks.farm import cluster; print(*sorted(cluster.resources_here()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**ENVIRONMENT, **machine}, capture_output=True)
    assert {*run.stdout.decode().split()} == {"build", "torch", *expected}, run


def test_an_address_without_tls_is_refused_unless_it_is_loopback(tmp_path: Path) -> None:
    project = project_of(tmp_path / "project", "one")
    for command in (["farm"], ["worker", "tcp://192.0.2.1:8786"]):
        run = project.doit(*command, BUILD_SCHEDULER="tcp://192.0.2.1:8786", BUILD_CACHE=f"file://{tmp_path}/cache")
        assert run.code == 3
        assert "tcp://192.0.2.1:8786 has no TLS: whoever reaches it can run code on its workers" in run.out
    run = project.doit("farm", BUILD_SCHEDULER=f"tcp://127.0.0.1:{free_port()}", BUILD_CACHE=f"file://{tmp_path}/cache")
    assert (run.code, len(run.out.splitlines())) == (3, 1), run.out
    for words, variables, message in (
        (["--local", "-1"], {}, "--local: expected a number of workers, found -1"),
        ([], {"BUILD_CACHE_MODE": "read"}, "BUILD_CACHE_MODE=read: a farm stores the project's files in the cache"),
    ):
        run = project.doit("farm", *words, BUILD_CACHE=f"file://{tmp_path}/cache", **variables)
        assert (run.code, run.out.strip()) == (3, f"ERROR: {message}")
    assert "BUILD_CACHE is not set" in project.doit("farm", BUILD_SCHEDULER="tls://10.0.0.1:1").out


@pytest.mark.long
def test_a_worker_with_other_versions_is_refused(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    cluster = Cluster(tmp_path, stack)
    metadata = tmp_path / "other/onnxslim-0.0.1.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: onnxslim\nVersion: 0.0.1\n")
    cluster.add_worker({"PYTHONPATH": str(tmp_path / "other")})
    wait_for_workers(cluster)
    run = project_of(tmp_path / "head", "one").doit("farm", **cluster.environment)
    assert run.code == 3
    assert re.search(r"worker worker2 has other versions: onnxslim 0\.0\.1, here [\d.]+; install the same", run.out), (
        run.out
    )


@pytest.mark.long
def test_a_worker_and_the_scheduler_are_killed(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    models = [f"m{index}" for index in range(4)]
    expected = project_of(tmp_path / "expected", *models)
    expected.built()
    cluster = Cluster(tmp_path, stack, seconds="1")
    workers = [cluster.add_worker() for _ in range(2)]
    wait_for_workers(cluster)
    head = project_of(tmp_path / "head", *models)
    farm = head.start("farm", **cluster.environment)
    read_lines(farm, 2, of="worker2")
    os.killpg(workers[0].pid, signal.SIGKILL)
    read_lines(farm, 4, of="worker3")
    os.killpg(cluster.scheduler.pid, signal.SIGKILL)
    rest, _ = farm.communicate(timeout=120)
    assert farm.returncode == 3
    assert "the scheduler has gone; what was finished is in the build cache" in rest.splitlines()[-1]
    again = Cluster(tmp_path, stack, first=4)
    again.add_worker()
    wait_for_workers(again)
    run = head.built("farm", **again.environment)
    built = [line for line in run.out.splitlines() if line.endswith("[worker4]") and "fetched (" not in line]
    assert len(built) <= 6 * len(models) - 4, run.out  # what one of the first workers told may not have been stored yet
    assert head.tree() == expected.tree()


@pytest.mark.long
def test_a_worker_that_dies_costs_its_unit_again_and_no_more(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    cluster = Cluster(tmp_path, stack, seconds="1")
    workers = [cluster.add_worker() for _ in range(2)]
    wait_for_workers(cluster)
    head = project_of(tmp_path / "head", "one", "two")
    farm = head.start("farm", **cluster.environment)
    read_lines(farm, 2, of="worker2")
    os.killpg(workers[0].pid, signal.SIGKILL)
    rest, _ = farm.communicate(timeout=200)
    assert farm.returncode == 0, rest
    expected = project_of(tmp_path / "expected", "one", "two")
    expected.built()
    assert head.tree() == expected.tree()


@pytest.mark.long
def test_a_unit_whose_workers_die_again_and_again_fails(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    """It starts again three times, and not a fourth time. The other model is built."""
    cluster = Cluster(tmp_path, stack, seconds="1")
    workers = {f"worker{2 + index}": cluster.add_worker() for index in range(5)}
    wait_for_workers(cluster)
    head = project_of(tmp_path / "head", "bad", "good")
    farm = head.start("farm", **cluster.environment)
    assert farm.stdout is not None
    output, killed = "", set[str]()
    for line in farm.stdout:
        output += line
        found = re.search(r"✓ \w+ +bad.*\[(worker\d)\]", line)
        if found and found[1] not in killed:
            killed.add(found[1])
            os.killpg(workers[found[1]].pid, signal.SIGKILL)
    farm.communicate(timeout=60)
    assert farm.returncode == 1, output
    assert "✗ bad on torch: Attempted to run task 'bad on torch" in output
    assert len(killed) == 4, output
    assert (head / "model_repository/good/1/model").exists()
    assert not (head / "model_repository/bad").exists()


@pytest.mark.long
def test_a_cluster_with_the_certificates_of_the_docs(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    page = CERTIFICATES.read_text()
    commands = re.findall(r"^    (openssl .+)$", page, re.MULTILINE)
    assert len(commands) == 3
    tls = tmp_path / "tls"
    tls.mkdir()
    for command in commands:
        subprocess.run(command, shell=True, cwd=tls, check=True, capture_output=True)
    (configuration,) = re.findall(r"```yaml\n(distributed:.+?)```", page, re.DOTALL)
    (tls / "tls.yaml").write_text(configuration.replace("/etc/farm", str(tls)))
    cluster = Cluster(tmp_path, stack, tls=tls)
    cluster.add_worker()
    wait_for_workers(cluster)
    head = project_of(tmp_path / "head", "one")
    run = head.built("farm", **cluster.environment)
    assert re.search(r"✓ onnx +one .*\[worker2\]", run.out), run.out
    stranger = head.doit("farm", **{**cluster.environment, "DASK_CONFIG": str(tmp_path)})
    assert (stranger.code, len(stranger.out.splitlines())) == (3, 1), stranger.out


@pytest.mark.long
def test_a_farm_in_a_network_namespace_of_its_own() -> None:
    tests = f"{sys.executable} -m pytest -n 0 -q -p no:cacheprovider {__file__} -m long -k each_plan"
    command = f"ip link set lo up && {tests}"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this machine does not permit a network namespace")
    run = subprocess.run(
        ["unshare", "--net", "sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
