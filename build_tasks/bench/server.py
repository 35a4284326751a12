"""A benchmark of a running Triton server: what it has published of a model, under requests.

    server at --url ─► perf_analyzer, where it is on the PATH │ else Triton's client for Python ─► points

Concurrency is here that of requests: how many instances share them, and into which batches they are put together, is
the server's.
"""

from typing import Any

from build_tasks.bench import nvidia_tools, workload
from build_tasks.bench.results import Run, foretell, new_run, say
from build_tasks.errors import UserError, first_lines
from build_tasks.formats import artifacts
from build_tasks.runtime import atomic_files, worker
from build_tasks.runtime.stage import log_of
from build_tasks.spec.model import Model


def measured(model: Model, options: dict[str, Any]) -> Run:
    """The published formats that a running server has loaded. UserError where none answers."""
    from build_tasks.serving.triton_client import Client

    url = options["url"]
    client = Client("HTTP", url)
    version = nvidia_tools.perf_analyzer(model.release)
    if version is None:
        say(
            model,
            "  perf_analyzer is not on the PATH, and Triton's client for Python measures, whose own time counts: "
            + nvidia_tools.GET_IT.format(model.release),
        )
    run = new_run(url)
    run["tools"] = {"Triton": client.release(), "perf_analyzer": version or "none"}
    plans: dict[str, tuple[list[int], int]] = {}
    for model_format in options["formats"]:
        name = model.triton_name(model_format)
        if not client.ready(name):
            run["left out"].append(f"{model_format}: {name} is not loaded at {url}")
            continue
        most = int(client.config(name).get("max_batch_size", 0))
        fixed = 0 if most else int(signature(model, model_format)["inputs"][0]["shape"][0])
        if batches := [b for b in options["batches"] if (b <= most if most else b == fixed)]:
            plans[model_format] = batches, most
        else:
            takes = f"at most {most}" if most else f"{fixed}"
            run["left out"].append(f"{model_format}: {name} takes {takes} images, and none of {options['batches']}")
    foretell(model, sum(len(batches) for batches, _ in plans.values()) * len(options["concurrency"]), options, 0)
    for model_format, (batches, most) in plans.items():
        try:
            found = (by_tool if version else by_client)(model, model_format, batches, most, options)
        except (UserError, worker.CrashError) as error:
            run["failed"].append(f"{model_format}: {first_lines(error)}")
            continue
        run["points"] += found.pop("points")
        run["failed"] += [f"{model_format}: {reason}" for reason in found.pop("failed")]
        run["measured"][model_format] = found
    return run


def by_client(
    model: Model, model_format: str, batches: list[int], most: int, options: dict[str, Any]
) -> dict[str, Any]:
    """A model of a server: its points, how they were timed, what failed. most: 0 where its batch stands in the dims."""
    settings = {key: options[key] for key in ("concurrency", "seconds", "url")}
    settings |= {"format": model_format, "name": model.triton_name(model_format), "batches": batches}
    log = log_of(model, f"bench:{model.name}.{model_format}")
    paths = {"samples": model.artifact("samples.json")}
    found: dict[str, Any] = worker.call(workload.requests, paths, settings, log=log, task=f"bench:{model.name}")
    return found


def by_tool(model: Model, model_format: str, batches: list[int], most: int, options: dict[str, Any]) -> dict[str, Any]:
    """The same by perf_analyzer."""
    name, points, failed = model.triton_name(model_format), [], []
    one = nvidia_tools.one_input(model) if -1 in signature(model, model_format)["inputs"][0]["shape"][1:] else None
    with atomic_files.scratch_dir() as folder:
        for concurrency in options["concurrency"]:
            for batch in batches:
                asks, shape = (batch, one) if most else (0, [batch, *one] if one else None)
                try:
                    point = nvidia_tools.server_point(
                        name, options["url"], asks, concurrency, options["seconds"], folder, shape
                    )
                except UserError as error:
                    failed.append(f"batch {batch} x {concurrency}: {error}")
                    break
                if not most:
                    point["images_per_s"] *= batch  # perf_analyzer counts requests
                points.append({"format": model_format, "batch": batch, "concurrency": concurrency, **point})
                say(model, workload.told(points[-1]))
    return {"points": points, "timed_by": "perf_analyzer", "failed": failed}


def signature(model: Model, model_format: str) -> dict[str, Any]:
    """Of several plans that of the first: what a server takes is the same for all."""
    return artifacts.read_signature({"signature": model.artifact(f"{model.files(model_format)[0]}.signature.json")})
