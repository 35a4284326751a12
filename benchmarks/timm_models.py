"""Drive the models of timm through TorchScript, ONNX and the fp16 graph, and write a table of all refusals.

    python benchmarks/timm_models.py                   all below 100 million parameters, about a thousand
    python benchmarks/timm_models.py --every 16        every sixteenth name of timm.list_models()
    python benchmarks/timm_models.py levit_128 resnet18
    python benchmarks/timm_models.py @names.txt        a name in each line
    python benchmarks/timm_models.py --page docs/reference/timm.md    no build: the page of the rows of earlier runs

Each model has the default spec and its own input size, and runs the stages of the chain one after the other, in a
process of its own on one core. If the gate refuses the fp16 graph, `doit repair` excludes nodes, and the graph is built
and compared once more. Its weights are timm's random ones, with the batch statistics of the shipped
photographs: without these, the activations of many networks vanish or grow with depth, and a comparison shows nothing.
A model of every family of timm comes first, then a second one of every family, and so on, so that a run that is ended
early has seen all families. Names of the command line keep their order.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).parent.parent.resolve()
sys.path.insert(0, str(ROOT))

from build_tasks.errors import UserError, first_lines  # noqa: E402
from build_tasks.runtime.distributions import versions  # noqa: E402
from build_tasks.text_table import format_table  # noqa: E402

MAX_PARAMETERS = 100_000_000
MAX_BATCH = 2  # the default of 32 takes long and finds nothing more; batches 1, 2 and 3 are compared with the network
LIMIT = 1800  # seconds of a model
TOO_LARGE = "too large"  # in place of a stage
REPAIR = "repair"  # the stage that a refused fp16 graph goes through
COLUMNS = ("model", "stage", "seconds", "reason")
TOOLS = ("torch", "timm", "onnxscript", "onnxslim", "onnxruntime", "nvidia-modelopt")  # their versions are in a row
PRELOADED = (
    "build_tasks.runtime.forkserver_first",  # as in the fork server of doit
    *("timm", "onnxruntime", "modelopt.onnx.autocast", "build_tasks.stages.measure", "build_tasks.stages.onnx"),
    "build_tasks.runtime.forkserver_last",
)


def drive(name: str, folder: str, limit: float, cores: "SimpleQueue[int]") -> dict[str, Any]:
    """Build one model in a process of its own, and return its row: the stage that refused it, the reason, figures."""
    started = time.monotonic()
    result = f"{folder}/{name}.json"
    Path(result).write_text(
        json.dumps(
            {"model": name, "stage": "weights", "reason": "", "notes": {}, "cpu_seconds": {}, "tools": tools_here()}
        )
    )
    core = cores.get()
    child = multiprocessing.get_context("forkserver").Process(target=write_result, args=(name, result, core))
    child.start()
    child.join(limit)
    reason = ""
    if child.is_alive():
        child.kill()
        child.join()
        reason = f"not ended after {limit:g} s"
    elif child.exitcode:
        reason = f"FAULT ended by {signal.Signals(-child.exitcode).name if child.exitcode < 0 else child.exitcode}"
    cores.put(core)
    row = json.loads(Path(result).read_text())
    return {**row, "reason": reason or row["reason"], "seconds": round(time.monotonic() - started, 1)}


def tools_here() -> dict[str, str]:
    """Return the versions of Python and of what the stages use."""
    return {"Python": ".".join(map(str, sys.version_info[:2])), **versions(TOOLS)}


def write_result(name: str, result: str, core: int) -> None:
    """Build one model on one core and in a folder of its own, and write its row before each stage and at the end."""
    os.sched_setaffinity(0, {core})  # otherwise onnxslim runs ONNX Runtime with a thread for each core of the machine
    row = json.loads(Path(result).read_text())
    ended = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.symlink(ROOT / "build_tasks", "build_tasks")
        try:
            for stage, notes in build(name):
                now = time.process_time()
                row["cpu_seconds"][row["stage"]] = round(now - ended, 1)
                row["notes"] |= notes
                row["stage"], ended = stage, now
                if stage:  # this process may be killed
                    write_row(row, result)
        except TooLargeError:
            row["stage"] = TOO_LARGE
        except UserError as error:
            row["reason"] = str(error)
        except Exception as error:  # a fault of this project, since it is no UserError
            row["reason"] = f"FAULT {type(error).__name__}: {first_lines(error)}"
        os.chdir(ROOT)
    row["peak_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    write_row(row, result)


def write_row(row: dict[str, Any], path: str) -> None:
    """Write a row, so that the file is complete whenever the process is killed."""
    Path(f"{path}.new").write_text(json.dumps(row))
    os.replace(f"{path}.new", path)


def build(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the stages of a model. Yield the name of the next stage, "" at the end, with notes of the one before."""
    import torch

    from build_tasks.spec.model import Model, Spec
    from build_tasks.spec.tables import Accuracy, Architecture, Weights
    from build_tasks.stages import accuracy, measure, onnx, precision, reference, repair, torchscript

    torch.set_num_threads(1)
    spec = Spec(
        architecture=Architecture(timm=name),
        weights=Weights(source="weights.safetensors"),
        accuracy=Accuracy(allow_untestable=True),
        max_batch_size=MAX_BATCH,
    )
    model = Model("model", spec)
    os.makedirs(os.path.dirname(model.weights))
    parameters = write_weights(name, model.weights)
    notes: dict[str, Any] = {"parameters": parameters}

    def graph_tasks() -> list[tuple[str, dict[str, Any]]]:
        return [
            ("fp16 graph", precision.task(model, "fp16")),  # which reads the lock file of a repair
            ("figures of the fp16 graph", measure.task_of_graph(model, "fp16")),
            ("gate of the fp16 graph", accuracy.task_of_graph(model)),
        ]

    tasks = [
        ("torchscript", torchscript.task(model)),
        ("onnx", onnx.task(model)),
        ("reference", reference.task(model)),
        ("figures of model.pt", measure.task(model, "torchscript", "model.pt")),
        ("figures of model.onnx", measure.task(model, "onnx", "model.onnx")),
        ("gate of model.pt", accuracy.task(model, "torchscript", "model.pt")),
        ("gate of model.onnx", accuracy.task(model, "onnx", "model.onnx")),
        *graph_tasks(),
    ]
    for title, task in tasks[:-1]:
        yield title, notes
        notes = {title: run(task)}
    title, task = tasks[-1]
    yield title, notes
    try:
        notes = {title: run(task)}
    except UserError as error:
        yield REPAIR, {title: str(error)}
        notes = {REPAIR: run(repair.task(model))}
        for title, task in graph_tasks():
            yield f"{title} after {REPAIR}", notes
            notes = {f"{title} after {REPAIR}": run(task)}
    yield "", notes


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Build the stage of a task in this process, and return its notes."""
    stage = task["meta"]["stage"]
    for path in stage.outputs.values():
        os.makedirs(os.path.dirname(path), exist_ok=True)
    notes: dict[str, Any] = stage.build(stage.inputs, stage.outputs, stage.settings)
    return notes


class TooLargeError(BaseException):
    """The network has MAX_PARAMETERS or more."""


def check_size(network: Any) -> int:
    """Return the number of parameters, or raise TooLargeError."""
    count: int = sum(parameter.numel() for parameter in network.parameters())
    if count >= MAX_PARAMETERS:
        raise TooLargeError
    return count


def write_weights(name: str, path: str) -> int:
    """Write random weights with batch statistics of the photographs, and return the number of parameters."""
    import timm
    import torch
    from safetensors.torch import save_file

    from build_tasks.formats import picture_transform
    from build_tasks.verification import accuracy_samples

    torch.manual_seed(0)
    with contextlib.suppress(Exception), torch.device("meta"):  # no memory; some compute while they are made, and fail
        check_size(timm.create_model(name))
    network = timm.create_model(name).eval()
    count = check_size(network)
    config = picture_transform.data_config(network, {})
    source = accuracy_samples.SHIPPED_PHOTOGRAPHS
    _, pictures = accuracy_samples.load_samples(
        source,
        accuracy_samples.sample_files(source),
        lambda: picture_transform.transform(config, "fp32_nchw"),
        config,
        "fp32_nchw",
    )
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.train()
            module.momentum = 1.0  # the statistics of this batch alone
    with torch.no_grad():
        network(torch.from_numpy(pictures))
    save_file({key: tensor.clone().contiguous() for key, tensor in network.state_dict().items()}, path)
    return count


def by_families(names: list[str]) -> list[str]:
    """Sort names of timm: the first model of every family, then the second one of every family, and so on."""
    from timm.models import model_entrypoint

    ranks: Counter[str] = Counter()
    ranked = []
    for name in names:
        family = model_entrypoint(name).__module__
        ranked.append((ranks[family], family, name))
        ranks[family] += 1
    return [name for *_, name in sorted(ranked)]


def driven(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last row of each model, without the models that are too large."""
    return [row for row in {row["model"]: row for row in rows}.values() if row["stage"] != TOO_LARGE]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the refusals as a table, below a line with their number."""
    rows = driven(rows)
    refused = sorted((row for row in rows if row["stage"]), key=lambda row: (row["stage"], row["model"]))
    built = [row for row in rows if not row["stage"]]
    repaired = sum(REPAIR in row["notes"] for row in built)
    stages = Counter(row["stage"] for row in refused)
    title = f"{len(built)} of {len(rows)} built, {repaired} of them by {REPAIR}; refused: {dict(stages)}"
    return format_table(COLUMNS, [[row[c] for c in COLUMNS] for row in refused], title, left=("stage", "reason"))


PAGE = """\
# Models of timm

This page is generated from the rows of a run of `benchmarks/timm_models.py`, do not edit it.

{built} of {driven} architectures of timm below {millions} million parameters were built with the defaults of a spec, at
their own input size and batches up to 3, with random weights and the batch statistics of the shipped photographs:
TorchScript, ONNX and the fp16 graph, each of which passed its gate. In {repaired} of them `doit repair` excludes nodes
from fp16, because the gate refused the graph without that. For {untestable} models the answers of random weights are
the same for all photographs, which the gate calls not testable; their artifacts were compared with the network itself.
The other {others} names of timm are larger, or were not tried. The versions are below the table.

A family is a module of timm, `timm.models.<family>`.

| family | built | with nodes excluded from fp16 | refused |
|---|---|---|---|
{families}

They were built with these versions:

| models | versions |
|---|---|
{tools}
"""


def page(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Return the page about the rows, with a line for each family.

    Args:
        rows: The rows. A later one of a model replaces an earlier one.
        names: All names of timm.
    """
    from timm.models import model_entrypoint

    rows = sorted(driven(rows), key=lambda row: str(row["model"]))
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(model_entrypoint(row["model"]).__module__.rpartition(".")[2], []).append(row)
    built = [row for row in rows if not row["stage"]]
    tools = Counter(", ".join(f"{tool} {version}" for tool, version in row["tools"].items()) for row in rows)
    return PAGE.format(
        built=len(built),
        driven=len(rows),
        millions=MAX_PARAMETERS // 1_000_000,
        repaired=sum(REPAIR in row["notes"] for row in built),
        untestable=sum(row["notes"].get("gate of model.pt", {}).get("accuracy", "ok") != "ok" for row in built),
        others=len({*names} - {row["model"] for row in rows}),
        families="\n".join(family_line(*family) for family in sorted(families.items())),
        tools="\n".join(f"| {count} | {text} |" for text, count in tools.most_common()),
    )


def family_line(family: str, rows: list[dict[str, Any]]) -> str:
    """Return the line of a family: the number of models built, which of them are repaired, and the others."""
    built = [row for row in rows if not row["stage"]]
    repaired = [
        f"`{row['model']}`: {row['notes'][REPAIR]['fp16'].partition(' nodes')[0]}"
        for row in built
        if REPAIR in row["notes"]
    ]
    refused = [
        f"`{row['model']}`: {row['stage']}, {row['reason'].partition('; ')[0]}".replace("|", "\\|")
        for row in rows
        if row["stage"]
    ]
    return f"| {family} | {len(built)} of {len(rows)} | {'; '.join(repaired)} | {'; '.join(refused)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    parser.add_argument("names", nargs="*", help="architectures of timm; default: all below 100 million parameters")
    parser.add_argument("--every", type=int, default=1, help="take only every n-th of them")
    parser.add_argument("--first", type=int, default=0, help="begin with this one, counted from 0")
    allowed = sorted(os.sched_getaffinity(0))
    parser.add_argument("--cores", type=int, default=len(allowed), help="processes at once")
    parser.add_argument("--seconds", type=float, help="begin no further model after this time")
    parser.add_argument("--limit", type=float, default=LIMIT, help="end a model after so many seconds")
    parser.add_argument("--rows", default="timm_models.jsonl", help="a row for each model, which is not built again")
    parser.add_argument("--page", help="build nothing, and write this page about the rows")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # of the processes
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    import timm

    rows: list[dict[str, Any]] = []
    if os.path.exists(arguments.rows):
        rows = [json.loads(line) for line in Path(arguments.rows).read_text().splitlines()]
    if arguments.page:
        Path(arguments.page).write_text(page(rows, timm.list_models()))
        return
    done = {row["model"] for row in rows}
    selected = arguments.names or by_families(timm.list_models()[arguments.first :: arguments.every])
    names = [name for name in selected if name not in done]
    started = time.monotonic()
    cores: SimpleQueue[int] = SimpleQueue()
    for number in range(arguments.cores):
        cores.put(allowed[number % len(allowed)])
    with (
        tempfile.TemporaryDirectory() as folder,
        open(arguments.rows, "a", encoding="utf-8") as file,
        ThreadPoolExecutor(arguments.cores) as pool,
    ):
        futures = [pool.submit(drive, name, folder, arguments.limit, cores) for name in names]
        for future in as_completed(futures):
            if future.cancelled():
                continue
            rows.append(future.result())
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            print(f"{len(rows)}/{len(selected)} {rows[-1]['model']} {rows[-1]['stage'] or 'built'}", flush=True)
            if arguments.seconds and time.monotonic() - started > arguments.seconds:
                for other in futures:
                    other.cancel()
    print(table(rows))


if __name__ == "__main__":
    main()
