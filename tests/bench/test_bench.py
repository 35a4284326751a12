"""`doit bench`: artifacts and servers under a short load, the comparisons between runs, and the proposals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from build_tasks.bench import duration, nvidia_tools, recommendation, results
from build_tasks.bench.records import Point, Proposal, read_runs
from build_tasks.bench.workload import Sweep
from build_tasks.errors import UserError
from build_tasks.runtime import hardware
from build_tasks.serving import triton_server
from tests.support import fakes, tiny_network
from tests.support.project import Project, Run

SHORT = ("--seconds", "0.05", "--batches", "1,3", "--concurrency", "1,2")
BOTH = '"torchscript", "onnx"'


# Random values of 64 bits would be no rows of the table. Clients see the mask and the scalar in other dims.
TEXT = """\
formats = ["torchscript", "onnx"]
max_batch_size = 4
[architecture]
network = "network.py:build"
[weights]
source = "weights.safetensors"
[[inputs]]
name = "ids"
dtype = "int64"
shape = ["length"]
high = 29
[[inputs]]
name = "mask"
dtype = "bool"
shape = ["length"]
dims = ["length", 1]
values = [true]
[[inputs]]
name = "scale"
shape = []
low = 1
high = 2
[dimensions.length]
max = 6
[triton.torchscript]
max_batch_size = 0
"""
TEXT_NETWORK = """\
from torch import nn


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 4)

    def forward(self, ids, mask, scale):
        return (self.table(ids) * mask[..., None]).sum(1) * scale[:, None]


def build():
    return Text()
"""


def add_text(project: Project) -> None:
    import torch
    from safetensors.torch import save_file

    folder = project.model("text", TEXT, network_py=TEXT_NETWORK)
    torch.manual_seed(0)
    save_file({"table.weight": torch.randn(30, 4)}, folder / "weights.safetensors")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A plain model, one whose ONNX has a fixed batch, one with open image sizes, a text; and the server's core."""
    project = Project(tmp_path_factory.mktemp("bench") / "project")
    tiny_network.add(project, "net", formats=BOTH)
    tiny_network.add(project, "fixed", formats=BOTH, onnx="dynamic_axes = false\nbatch_size = 2")
    tiny_network.add(project, "sizes", formats='"onnx"', input_table="min_size = [16, 16]\nmax_size = [32, 24]")
    add_text(project)
    project.built()
    project.built("tritonserver")
    return project


def read_bench_json(project: Project, model: str = "net") -> list[dict[str, Any]]:
    """The runs of bench.json, as JSON."""
    runs: list[dict[str, Any]] = json.loads((project / f"build/{model}/bench.json").read_text())["runs"]
    return runs


def loads(run: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(format, batch, concurrency) of each point."""
    return [(point["format"], point["batch"], point["concurrency"]) for point in run["points"]]


def test_every_format_is_measured_beside_the_plain_trace_and_the_last_run(built: Project) -> None:
    first = built.built("bench:net", *SHORT)
    foretold = re.search(r"12 points, at least 0.05 s each, and a warm-up: about (\d+) s", first.out)
    took = re.search(r"✓ bench +net +([\d.]+) s", first.out)
    assert foretold
    assert took
    assert float(took[1]) / 3 - 1 < int(foretold[1]) < float(took[1]) * 3 + 1, "a factor of two, and noise"
    (run,) = read_bench_json(built)
    expected = [(f, b, n) for f in ("trace", "torchscript", "onnx") for n in (1, 2) for b in (1, 3)]
    assert loads(run) == expected
    for point in run["points"]:
        assert 0 < point["p50_ms"] <= point["p99_ms"]
        assert point["requests"] >= 3 * point["concurrency"]
        assert point["threads"] == max(results.cores() // point["concurrency"], 1)
        assert point["vs_trace"] > 0
        assert "vs_last" not in point
    assert run["machine"] == {
        "cpu": results.cpu(), "cores": results.cores(), "gpu": None, "server": None,
    }  # fmt: skip
    assert {"torch", "onnxruntime"} <= run["tools"].keys()
    assert run["measured"]["onnx"].keys() == {"device", "timed_by", "sha256"}
    assert (built / "build/net/bench.svg").read_text().startswith("<?xml")
    spec = (built / "models/net/model.toml").read_text()

    second = built.built("bench:net", *SHORT)
    assert second.ran == ["bench:net"], "it is never up to date"
    (again,) = read_bench_json(built)
    for before, now in zip(run["points"], again["points"], strict=True):
        ratio = now["images_per_s"] / before["images_per_s"]
        assert now["vs_last"] == pytest.approx(ratio, rel=1e-2, abs=1e-3)  # it has three decimals
    assert f"the last run: {run['date']}\n" in second.out
    assert (built / "models/net/model.toml").read_text() == spec, "the spec is not changed"


def test_torch_compile_is_measured_on_request_for_every_batch(built: Project) -> None:
    run = built.built(
        "bench:net",
        "--formats",
        "torchscript,torch.compile",
        "--seconds",
        "0.05",
        "--batches",
        "1,2,3,4,5,6,7,8,9,10",
        "--concurrency",
        "1",
    )
    (measured,) = read_bench_json(built)
    rates = {(p["format"], p["batch"], p["concurrency"]): p["images_per_s"] for p in measured["points"]}
    assert {name for name, *_ in rates} == {"torchscript", "torch.compile"}
    for point in measured["points"]:
        compiled = rates["torch.compile", point["batch"], point["concurrency"]]
        assert point["vs_compile"] == pytest.approx(point["images_per_s"] / compiled, rel=1e-2, abs=1e-3)
    assert "vs torch.compile" in run.out
    assert "torch.compile" not in measured["proposals"]
    assert "best: torchscript" in run.out, "Triton cannot serve torch.compile"
    log = (built / "build/net/logs/bench.net.torch.compile.log").read_text()
    assert "recompile" not in log, "beyond a limit, PyTorch compiles no more batches and warns"


@pytest.mark.parametrize(
    ("per_image", "seconds"),
    [
        (1e-3, 2 * (1 + 2 * 2.5)),  # the measuring time decides
        (0.2, 2 + (0.6 + 2) + (4.8 + 4.8) + (1.2 + 2) + (9.6 + 9.6)),  # three batches, however long they take
    ],
)
def test_the_duration_follows_from_the_time_of_one_batch(per_image: float, seconds: float) -> None:
    sweep = Sweep("onnx", batches=[1, 8], concurrency=[1, 2], seconds=2)
    assert duration.seconds_of(sweep, duration.Pace(loading=1, per_image=per_image)) == pytest.approx(seconds)


def test_a_run_of_another_machine_is_kept_and_not_compared(built: Project) -> None:
    built.built("bench:net", *SHORT, "--formats", "onnx")
    path = built / "build/net/bench.json"
    cpu = results.cpu()
    path.write_text(path.read_text().replace(json.dumps(cpu), '"Another"').replace('"torch": "', '"torch": "0.'))
    run = built.built("bench:net", *SHORT, "--formats", "onnx")
    assert "the last run" not in run.out
    assert [each["machine"]["cpu"] for each in read_bench_json(built)] == ["Another", cpu]
    assert not any("vs_last" in point for each in read_bench_json(built)[1:] for point in each["points"])
    path.write_text(path.read_text().replace(json.dumps(cpu), '"A third"').replace('"Another"', json.dumps(cpu)))
    run = built.built("bench:net", *SHORT, "--formats", "onnx")
    assert re.search(r"the last run: \S+, with torch 0\.(\S+) -> \1\n", run.out), (
        "the line names the tools that changed"
    )
    path.write_text("damaged")
    built.built("bench:net", *SHORT, "--formats", "onnx")
    assert len(read_bench_json(built)) == 1


def test_a_bench_json_of_an_older_version_is_read(built: Project) -> None:
    """Keys that have gone or come since are no error, and a run that cannot be read does not hide the others."""
    machine = {"cpu": "Another", "cores": 2, "gpu": None, "server": None}
    point = {"format": "onnx", "batch": 1, "concurrency": 1, "p50_ms": 2, "p99_ms": 3, "images_per_s": 500}
    run = {"machine": machine, "tools": {}, "date": "2025-01-01T00:00:00Z", "points": [{**point, "mean_ms": 2}]}
    path = built / "build/net/bench.json"
    path.write_text(json.dumps({"model": "net", "runs": [run, {"machine": "unreadable"}, 7]}))
    (first,) = read_runs(str(path))
    assert first.points == [Point(model_format="onnx", batch=1, concurrency=1, p50_ms=2, p99_ms=3, images_per_s=500)]
    built.built("bench:net", *SHORT, "--formats", "onnx")
    before, after = read_bench_json(built)
    assert before == {
        **run, "measured": {}, "points": [point], "failed": [], "left out": [], "proposals": {}
    }  # fmt: skip
    assert after["machine"]["cpu"] == results.cpu()


def test_it_is_no_part_of_a_build(built: Project) -> None:
    assert built.plan()["to run"] == []
    assert "bench:" not in built.built("info", "net").out
    assert built.plan("bench:net")["to run"] == ["bench:net"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "1,x"], "--batches: expected whole numbers from 1 on, such as 1,8,32, found '1,x'"),
        (["--batches", "0"], "--batches: expected whole numbers from 1 on"),
        (["--concurrency", "-1"], "--concurrency: expected whole numbers from 1 on"),
        (["--seconds", "0"], "--seconds: expected a number above 0, found '0'"),
        (["--seconds", "nan"], "--seconds: expected a number above 0"),
        (["--latency", "fast"], "--latency: expected a number above 0, found 'fast'"),
        (
            ["--formats", "onx"],
            "expected some of trace, torchscript, onnx, torch.compile, found 'onx' (did you mean 'onnx'?)",
        ),
        (["--url", "nonsense"], "--url: expected host:port, found 'nonsense'"),
        (["--url", "h:1", "--formats", "trace"], "--formats: expected some of torchscript, onnx, found 'trace'"),
    ],
)
def test_an_impossible_option_is_one_line(built: Project, options: list[str], message: str) -> None:
    run = built.doit("bench:net", *options)
    assert run.code == 1
    (line,) = [line for line in run.out.splitlines() if line.startswith("✗")]
    assert message in line


def test_a_fixed_batch_is_measured_at_it_alone(built: Project) -> None:
    built.built("bench:fixed", "--seconds", "0.02", "--concurrency", "1")
    (run,) = read_bench_json(built, "fixed")
    assert loads(run) == [(f, b, 1) for f in ("trace", "torchscript") for b in (1, 2, 3)] + [("onnx", 2, 1)]
    assert run["points"][-1]["vs_trace"] > 0
    assert run["proposals"]["onnx"]["lines"][1:2] == ["instance_group = [{ count = 1 }]"]
    before = (built / "build/fixed/bench.json").read_bytes()
    failed = built.doit("bench:fixed", "--formats", "onnx", "--batches", "1,3")
    assert failed.code == 1
    assert "onnx: it takes none of the batches 1, 3" in failed.out
    assert (built / "build/fixed/bench.json").read_bytes() == before


def test_a_batch_that_fails_does_not_lose_the_others(project: Project) -> None:
    """The network accepts batches up to 8. The build uses no larger ones."""
    tiny_network.add(project, "net", formats=BOTH, body="x = x + torch.zeros(8, 1, 1, 1)[: x.shape[0]]")
    run = project.doit("bench:net", "--seconds", "0.02", "--batches", "1,9", "--concurrency", "1")
    assert run.code == 1
    assert loads(read_bench_json(project)[0]) == [
        (model_format, 1, 1) for model_format in ("trace", "torchscript", "onnx")
    ]
    (line,) = [line for line in run.out.splitlines() if line.startswith("✗")]
    assert all(f"{model_format}: batch 9 x 1: " in line for model_format in ("trace", "torchscript", "onnx"))


def test_an_engine_that_cannot_be_loaded_costs_its_own_format(project: Project) -> None:
    """The machine has a fake GPU, for which the engines are built first, and no CUDA to run them with."""
    tiny_network.add(project, "net", formats='"onnx", "tensorrt", "rtx"')
    environment = fakes.machine(project.root.parent)
    run = project.doit("bench:net", "--formats", "onnx,tensorrt,rtx", *SHORT, **environment)
    assert run.code == 1
    (result,) = read_bench_json(project)
    assert loads(result) == [("onnx", b, n) for n in (1, 2) for b in (1, 3)]
    assert result["machine"]["gpu"] == "NVIDIA RTX A4000"
    (line,) = [line for line in run.out.splitlines() if line.startswith("✗ bench")]
    assert re.search(r"tensorrt: TensorRT \S+ cannot load build/net/model.plan on this machine: ", line)
    assert re.search(r"rtx: TensorRT-RTX \S+ cannot load build/net/model.rtx on this machine: ", line)


def test_a_benchmark_that_is_cut_short_leaves_the_last_one(built: Project) -> None:
    built.built("bench:net", *SHORT, "--formats", "onnx")
    before = (built / "build/net/bench.json").read_bytes()
    with built.start("bench:net", "--seconds", "60", "--formats", "onnx") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if " points, " in line:
                break
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert (built / "build/net/bench.json").read_bytes() == before


def point(batch: int, concurrency: int, images_per_s: float, p50_ms: float, threads: int | None = None) -> Point:
    return Point(
        model_format="onnx",
        batch=batch,
        concurrency=concurrency,
        threads=threads,
        p50_ms=p50_ms,
        p99_ms=p50_ms * 1.5,
        images_per_s=images_per_s,
    )


# On a GPU: the throughput hardly rises from batch 32 on, and from two instances on.
GPU = [
    point(1, 1, 250, 4), point(8, 1, 1600, 5), point(32, 1, 3200, 10), point(128, 1, 3400, 37),
    point(1, 2, 400, 5), point(8, 2, 2400, 6.7), point(32, 2, 3900, 16), point(128, 2, 4000, 64),
    point(1, 4, 420, 9), point(8, 4, 2500, 13), point(32, 4, 3950, 32), point(128, 4, 4050, 126),
]  # fmt: skip


def propose(points: list[Point], model_format: str = "onnx", **more: Any) -> Proposal:
    settings = {"limit_ms": None, "fixed_batch": False, "at_server": False, "cores": 8, **more}
    return recommendation.propose(model_format, points, **settings)


def test_the_smallest_load_that_is_nearly_the_best_is_proposed() -> None:
    proposal = propose(GPU)
    # 3900 of 4050 images/s. A batch fills in 31 / 3900 s, and saves 32 x 5 ms - 16 ms.
    assert proposal.lines == [
        "[triton.onnx]",
        "max_batch_size = 32",
        "instance_group = [{ count = 2 }]",
        "dynamic_batching = { max_queue_delay_microseconds = 7900 }",
    ]
    assert proposal.reasons[0] == "batch 32 x 2 gives 3900.0 images/s, 96% of the best (4050.0, batch 128 x 4)"
    assert "a batch fills in 7.95 ms at 3900.0 images/s" in proposal.reasons[1]
    assert "a batch of 32 saves 144 ms (32 x 5 ms - 16 ms)" in proposal.reasons[1]


def test_a_limit_of_latency_bounds_all_three() -> None:
    proposal = propose(GPU, limit_ms=11)
    assert proposal.lines[1:3] == ["max_batch_size = 8", "instance_group = [{ count = 2 }]"]
    # p99 is 10.05 ms: 0.95 ms are left, and a batch fills in 2.9 ms.
    assert proposal.lines[3] == "dynamic_batching = { max_queue_delay_microseconds = 950 }"
    assert "2400.0 images/s, the best with p99 within 11 ms" in proposal.reasons[0]
    assert propose(GPU, limit_ms=1) == Proposal([], ["no point is within 1 ms; the fastest has p99 6 ms"])


def test_no_queue_delay_is_proposed_if_batches_save_no_time() -> None:
    """On a CPU every image takes the same time."""
    points = [point(b, n, 20 * n, 50 * b, threads=8 // n) for n in (1, 2, 4) for b in (1, 8)]
    proposal = propose(points, "torchscript")
    assert proposal.lines == [
        "[triton.torchscript]",
        "max_batch_size = 1",
        "instance_group = [{ count = 4 }]",
        "dynamic_batching = false",
        "parameters = { INTRA_OP_THREAD_COUNT = 2 }",
    ]
    assert "count: no larger number of instances was measured (--concurrency)" in proposal.reasons


def test_a_thread_count_for_the_whole_server_is_said_to_be_that() -> None:
    """PyTorch's backend has one setting for the process, ONNX Runtime's has one for each model."""
    points = [point(1, n, 20 * n, 50, threads=8 // n) for n in (1, 2, 4)]
    for model_format, count in (("torchscript", 1), ("onnx", 0)):
        reasons = propose(points, model_format).reasons
        assert sum("holds for all PyTorch models of the server" in reason for reason in reasons) == count
    points = [point(1, 1, 100, 10, threads=8)]
    assert not any("INTRA_OP_THREAD_COUNT" in reason for reason in propose(points, "torchscript").reasons)


def test_one_instance_for_each_core_is_said_to_be_what_the_key_cores_gives() -> None:
    reason = 'instance_group and parameters: device = "cpu" and cores = 8 in [triton] do the same'
    points = [point(1, n, 20 * n, 50, threads=8 // n) for n in (1, 2, 4, 8)]
    assert reason in propose(points).reasons
    assert reason not in propose(points[:3]).reasons


def test_what_was_not_varied_is_not_proposed() -> None:
    proposal = propose(GPU, at_server=True)
    assert proposal.lines == []
    assert proposal.reasons[0].startswith("batch 32 x 2 gives 3900.0 images/s")
    assert "the server builds batches itself" in proposal.reasons[1]
    assert propose([point(2, 1, 100, 20), point(2, 2, 190, 21)], fixed_batch=True).lines == [
        "[triton.onnx]",
        "instance_group = [{ count = 2 }]",
    ]


def test_what_is_proposed_is_a_spec(project: Project) -> None:
    """The proposed lines are valid in a spec, and reach config.pbtxt."""
    tiny_network.add(project, "net", formats=BOTH)
    spec = project / "models/net/model.toml"
    several = [point(1, 1, 100, 10, threads=2), point(3, 1, 200, 15, threads=2)]
    single = [point(1, 2, 100, 20, threads=1), point(3, 2, 100, 60, threads=1)]
    lines = [*propose(several, "torchscript", cores=2).lines, *propose(single, cores=2).lines]
    text = "\n".join([spec.read_text(), *lines, ""])
    assert set(tomllib.loads(text)["triton"]) == {"torchscript", "onnx"}
    spec.write_text(text)
    project.built()
    config = (project / "model_repository/net/config.pbtxt").read_text()
    assert "max_batch_size: 3" in config
    assert "max_queue_delay_microseconds: 10000" in config
    config = (project / "model_repository/net_onnx/config.pbtxt").read_text()
    assert "max_batch_size: 1" in config
    assert "dynamic_batching" not in config
    assert re.search(r'key: "intra_op_thread_count"\s+value {\s+string_value: "1"', config)


def test_the_output_of_trtexec_is_parsed() -> None:
    """The lines are those of TensorRT's samples/common/sampleReporting.cpp."""
    output = (
        "[11/26/2026-09:00:00] [I] Throughput: 507.399 qps\n"
        "[11/26/2026-09:00:00] [I] Latency: min = 1.9 ms, max = 2.2 ms, mean = 2 ms, median = 2 ms, "
        "percentile(99%) = 2.1 ms\n"
        "[11/26/2026-09:00:00] [I] GPU Compute Time: min = 1.8 ms, max = 2.1 ms, mean = 1.9 ms, median = 1.87363 ms, "
        "percentile(99%) = 2.01 ms\n"
    )
    assert nvidia_tools.parse_trtexec(output, batch=8, streams=2) == Point(
        model_format="trtexec", batch=8, concurrency=2, p50_ms=1.87363, p99_ms=2.01, images_per_s=4059.19
    )
    with pytest.raises(UserError, match="trtexec: Error Code 1: Serialization"):
        nvidia_tools.parse_trtexec("[11/26/2026-09:00:00] [E] Error Code 1: Serialization\n&&&& FAILED", 8, 2)


def test_a_tool_that_does_not_end_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_tools, "TOOL_TIMEOUT", 0.5)
    tool, row = tmp_path / "perf_analyzer", tmp_path / "perf.csv"
    tool.write_text("""#!/bin/sh
echo . >> "$0.starts"
[ "$(wc -l < "$0.starts")" -ge "$1" ] || sleep 60
printf 'Concurrency,p50 latency\n1,20\n' > "$4"
""")
    tool.chmod(0o755)
    assert nvidia_tools.measure_longer([str(tool), "2"], 3, str(row)) == {"Concurrency": "1", "p50 latency": "20"}
    with pytest.raises(UserError, match=r"perf_analyzer did not end within 0\.5 s"):
        nvidia_tools.measure_longer([str(tool), "9"], 3, str(row))


def test_trtexec_gets_the_shape_and_the_values_of_every_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script prints its arguments in the place of trtexec's figures."""
    (tmp_path / "trtexec").write_text("#!/bin/sh\nprintf '%s\\n' \"$*\"\n")
    (tmp_path / "trtexec").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    shapes = {"ids:0": [4, 7], "scale": [4]}
    with pytest.raises(UserError) as error:
        nvidia_tools.trtexec_point(
            "m.plan", shapes, 4, 1, 1, profile=2, files={"ids:0": "/t/0.bin", "scale": "/t/1.bin"}
        )
    assert "--shapes='ids:0':4x7,scale:4 --useProfile=2 --loadInputs='ids:0':/t/0.bin,scale:/t/1.bin" in str(
        error.value
    )


@pytest.mark.gpu
@pytest.mark.skipif(hardware.missing_requirements() is not None, reason=f"lacks {hardware.missing_requirements()}")
def test_on_a_gpu_cuda_events_are_the_timer(project: Project) -> None:
    tiny_network.add(project, "net", formats='"torchscript", "onnx", "tensorrt"')
    project.built("bench:net", *SHORT)
    (run,) = read_bench_json(project)
    timings = {name: (timing["device"], timing["timed_by"]) for name, timing in run["measured"].items()}
    assert timings["trace"] == timings["torchscript"] == timings["tensorrt"] == ("cuda", "CUDA events")
    assert {("tensorrt", 3, 2), ("torchscript", 3, 2)} <= {*loads(run)}
    assert not any("threads" in point for point in run["points"] if point["format"] != "onnx")


@pytest.fixture(scope="module")
def perf_analyzer(built: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the PATH with NVIDIA's perf_analyzer.

    It is the one that came with Triton's client until 24.10: it runs with older C libraries than the package
    perf-analyzer needs. The server's core has two libraries that it needs.
    """
    folder = tmp_path_factory.mktemp("perf_analyzer")
    download = ["pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "tritonclient==2.51.0"]
    subprocess.run([sys.executable, "-m", *download], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (folder / "binary").write_bytes(archive.read("tritonclient-2.51.0.data/data/bin/perf_analyzer"))
    libraries = built / "build/.tritonserver/package/nvidia_pytriton.libs"
    for name, pattern in (("libb64.so.0d", "libb64-*"), ("libcudart.so.12", "libcudart-*")):
        (folder / name).symlink_to(next(libraries.glob(pattern)))
    script = folder / "perf_analyzer"
    script.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={folder} exec {folder}/binary "$@"\n')
    for file in (script, folder / "binary"):
        file.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def url(built: Project) -> Iterator[str]:
    """host:port of Triton's core, which serves the three models."""
    ports = triton_server.free_ports()
    options = [word for name, port in ports._asdict().items() for word in (f"--{name}", str(port))]
    with built.start("serve", "--server", "core", *options) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("serving:"):
                break
        try:
            yield f"127.0.0.1:{ports.http}"
        finally:
            process.terminate()


def at_server(project: Project, url: str, path: Path | str, model: str = "net", *more: str) -> Run:
    return project.doit(f"bench:{model}", "--url", url, *SHORT, *more, PATH=f"{path}{os.pathsep}{os.environ['PATH']}")


def test_perf_analyzer_measures_a_running_server(built: Project, url: str, perf_analyzer: Path) -> None:
    first = at_server(built, url, perf_analyzer)
    assert first.code == 0, first.out
    run = read_bench_json(built)[-1]
    assert run["machine"]["server"] == url
    assert run["tools"] == {"Triton": "2.51.0", "perf_analyzer": "2.51.0 (commit unknown)"}
    assert loads(run) == [
        (model_format, b, n) for model_format in ("torchscript", "onnx") for n in (1, 2) for b in (1, 3)
    ]
    assert all(0 < point["p50_ms"] <= point["p99_ms"] and point["compute_ms"] > 0 for point in run["points"])
    assert {timing["timed_by"] for timing in run["measured"].values()} == {"perf_analyzer"}
    assert "# nothing is proposed: the server builds batches itself" in first.out
    assert at_server(built, url, perf_analyzer).code == 0
    assert all(point["vs_last"] > 0 for point in read_bench_json(built)[-1]["points"])


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        ("fixed", [("torchscript", 1), ("torchscript", 3), ("onnx", 2)]),
        ("sizes", [("onnx", 1), ("onnx", 3)]),
        ("text", [("torchscript", 1), ("torchscript", 3), ("onnx", 1), ("onnx", 3)]),
    ],
)
def test_perf_analyzer_gets_the_shapes_that_the_config_leaves_open(
    built: Project, url: str, perf_analyzer: Path, model: str, batches: list[tuple[str, int]]
) -> None:
    """Open image sizes; a batch that is the first of the dims, where perf_analyzer counts requests, not images; and
    several inputs of which random values would be wrong."""
    sizes = ",".join(sorted({str(batch) for _, batch in batches}))
    run = at_server(built, url, perf_analyzer, model, "--batches", sizes, "--concurrency", "1")
    assert run.code == 0, run.out
    result = read_bench_json(built, model)[-1]
    measured = [(point["format"], point["batch"]) for point in result["points"]]
    assert [each for each in measured if each in batches] == batches
    for point in result["points"]:
        assert point["images_per_s"] * point["p50_ms"] / 1e3 == pytest.approx(point["batch"], rel=0.9)


@pytest.mark.parametrize("option", ["--request-count", "--measurement-interval"])
def test_where_perf_analyzer_finds_no_request_it_measures_longer(
    built: Project, url: str, perf_analyzer: Path, tmp_path: Path, option: str
) -> None:
    """The real perf_analyzer, whose first measurement prints what it prints on a busy machine."""
    script = tmp_path / "perf_analyzer"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *{option}*) echo "$*" >> {tmp_path}/calls; [ $(wc -l < {tmp_path}/calls) -gt 1 ] || '
        f"{{ echo failed to find the requested model version; exit 1; }};; esac\n"
        f'exec {perf_analyzer}/perf_analyzer "$@"\n'
    )
    script.chmod(0o755)
    run = at_server(built, url, tmp_path, "net", "--batches", "1", "--concurrency", "1", "--formats", "onnx")
    assert run.code == 0, run.out
    lengths = [int(line.split(f"{option} ")[1].split()[0]) for line in (tmp_path / "calls").read_text().splitlines()]
    assert lengths[1] == pytest.approx(4 * lengths[0], abs=2)


def test_without_it_the_client_for_python_measures(built: Project, url: str) -> None:
    run = built.doit("bench:net", "--url", url, *SHORT, "--formats", "onnx")
    assert run.code == 0, run.out
    assert "perf_analyzer is not on the PATH" in run.out
    assert "pip install 'perf-analyzer>=2.60'" in run.out
    result = read_bench_json(built)[-1]
    assert result["measured"]["onnx"]["timed_by"] == "Triton's client for Python"
    assert loads(result) == [("onnx", b, n) for n in (1, 2) for b in (1, 3)]


def test_a_perf_analyzer_that_does_not_start_is_an_error(built: Project, url: str, tmp_path: Path) -> None:
    """The one from PyPI prints this on an older system, and ends with exit code 0."""
    script = tmp_path / "perf_analyzer"
    script.write_text("#!/bin/sh\necho \"version 'GLIBC_2.38' not found\" >&2\n")
    script.chmod(0o755)
    run = at_server(built, url, tmp_path)
    assert run.code == 1
    assert "the perf_analyzer on the PATH does not start: version 'GLIBC_2.38' not found" in run.out


def test_a_server_that_does_not_answer_or_lacks_the_model_is_an_error(
    built: Project, url: str, project: Project
) -> None:
    port = triton_server.free_ports().http
    assert f"nothing answers HTTP at 127.0.0.1:{port}" in at_server(built, f"127.0.0.1:{port}", "").out
    tiny_network.add(project, "other", formats='"onnx"')
    run = project.doit("bench:other", "--url", url)
    assert run.code == 1
    assert f"onnx: other_onnx is not loaded at {url}" in run.out
