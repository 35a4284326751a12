"""Measures the speed of PyTorch for a network as it is served, and the first requests of a batch. Prints tables.

On a GPU:
plain          torch.jit.trace of timm's network in fp32, unchanged
cast           traced and frozen on the CPU, cast to fp16 inside, channels last, fp32 for its clients
               (build_tasks/formats/torchscript_graph.py)
published      the cast file as `doit` publishes it for a GPU: rewritten for it (torchscript_gpu.py)
aoti           the package of AOTInductor that `doit` publishes, in fp16, with an open batch (aoti_package.py)
torch.compile  timm's network in fp16 and channels last, compiled for each batch (Triton's batching cannot serve that)

On a CPU, with all of its cores:
plain          as above
published      traced and frozen, in fp32: one instance with a thread for each core, Triton's default
cores          the same file with one instance of one thread for each core, as triton.cores has it (triton/cpu_cores.py)
aoti           the package of AOTInductor in fp32, with an open batch
torch.compile  timm's network in fp32, compiled for each batch

Each way runs in a process of its own. It warms up as a server does with our config.pbtxt: twice at every batch up to
triton.warm_up and at the largest, from the largest down (derived_config.py); torch.compile only at the batches that are
measured, since it compiles for each. Then the processes take turns, so that other load, or a clock that falls while the
GPU warms up, affects all of them. A cell has the images per second (the median of the rounds), the ratio to the plain
trace (the median of the ratios of each round), and the relative L2 error to the network in fp32 on the CPU. For a GPU
the errors that the CPU's emulation predicts stand below the table. Inputs lie on the device in fp32 NCHW, as Triton
passes them on. Weights are random: speed does not depend on them, and nothing is downloaded.

    python benchmarks/serving.py [--models NAME ...] [--batches N ...] [--warm-up N] [--rounds N] [--no-compile]
                                 [--device cpu] [--roofline] [--first] [--json FILE] [--short]

--roofline  also prints the share of each figure of the speed that a matrix product and a copy on this device would
            allow, and the FLOPs and bytes of an image (benchmarks/roofline.py)
--profile   also prints where the GPU's time goes at the smallest and the largest batch, by kernels
--first     also prints the first requests at each batch of processes with other warm-ups, or none
--short     one small network on the CPU, to see whether the benchmark runs; its figures mean nothing

It needs PyTorch and timm, a C++ compiler for the two ways that compile, and nothing else that doit needs.
"""

import argparse
import contextlib
import copy
import json
import statistics
import sys
import tempfile
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the project is not an installed package

import roofline  # noqa: E402
from serving_process import CHECKED_IMAGES, ask, compile_package, cores, process, relative_error, serve  # noqa: E402

from build_tasks.formats import aoti_package, torch_export, torchscript_gpu, torchscript_graph  # noqa: E402

GPU_MODELS = (
    *("resnet50", "efficientnet_b3", "convnext_tiny", "vit_small_patch16_224", "mobilenetv3_large_100", "regnety_016"),
)
MODELS = {"cuda": GPU_MODELS, "cpu": ("mobilenetv3_large_100", "resnet50")}
WAYS = {"cuda": ("plain", "cast", "published"), "cpu": ("plain", "published", "cores")}
COMPILED = ("aoti", "torch.compile")
BATCHES = {"cuda": (1, 8, 32, 128), "cpu": (1, 8)}  # torch.compile takes 20 to 40 s for each
WARM_UP = {"cuda": 64, "cpu": 1}  # the default of triton.warm_up; without a GPU the smallest and the largest batch
FIRST_BATCHES = (1, 2, 3, 4, 8)  # whose first requests are timed
TRACED_BATCH = 2
SHOWN_KERNELS = 5
MAX_ERROR = 0.1  # relative L2; rounding alone stays below it


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second: plain trace, published models, torch.compile.")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="of timm")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N")
    parser.add_argument("--warm-up", type=int, metavar="N", help="triton.warm_up")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each process (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave out the ways that compile, which take longest")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--roofline", action="store_true", help="also print the share of what the device could do")
    parser.add_argument("--first", action="store_true", help="also time the first requests after other warm-ups")
    parser.add_argument("--profile", action="store_true", help="also print where the time of the GPU goes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--short", action="store_true", help="one small network on the CPU, to see whether this runs")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "`torch.jit")
    if arguments.short:
        arguments.models, arguments.batches, arguments.rounds = ["test_efficientnet"], [1, 2], 1
        arguments.device, arguments.no_compile, arguments.roofline = "cpu", True, True
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU on this machine; --device cpu and --short run on the CPU")
    device = arguments.device
    names = arguments.models or MODELS[device]
    arguments.batches = sorted(arguments.batches or BATCHES[device])
    arguments.warm_up = WARM_UP[device] if arguments.warm_up is None else arguments.warm_up
    figures: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "models": {}}
    meaning = "the figures mean nothing" if arguments.short else "ratio to the plain trace, relative L2 error"
    print(f"{figures['device']}, PyTorch {torch.__version__}; images per second, {meaning}\n")
    for name in names:
        figures["models"][name] = measure_model(name, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {cores()} cores"


def warm_up_batches(batches: list[int], warm_up: int) -> list[int]:
    """The batches that our config.pbtxt warms up, in its order; the largest measured batch is max_batch_size."""
    return sorted({1, max(batches), *range(1, min(warm_up, max(batches)) + 1)}, reverse=True)


def measure_model(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one network, print its tables, and return their figures."""
    device, batches = arguments.device, arguments.batches
    network, shape = create_network(name)
    figures: dict[str, Any] = {"shape": shape, "images per second": []}
    titles = [*WAYS[device], *(() if arguments.no_compile else COMPILED)]
    print(f"{name} at {' x '.join(map(str, shape[1:]))}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        figures["emulated error"] = save_forms(network, shape, Path(folder), device, max(batches), titles)
        order = warm_up_batches(batches, arguments.warm_up)
        measured = sorted(batches, reverse=True)
        warm_ups = {title: measured if title == "torch.compile" else order for title in titles}
        compiler = stack.enter_context(process(compile_package, folder, device)) if "aoti" in titles else None
        workers: dict[str, Connection] = {}
        for title in sorted(titles, key=lambda title: title == "aoti"):  # the others start while it is compiled
            if compiler and title == "aoti":
                figures["compilation"] = ask(compiler)
            workers[title] = stack.enter_context(process(serve, title, folder, device, warm_ups[title]))
        workers = {title: workers[title] for title in titles}
        figures["start"] = {title: ask(each) for title, each in workers.items()}
        for title, (loading, seconds) in figures["start"].items():
            count = len(warm_ups[title])
            print(f"  {title}: loaded in {loading:.1f} s; the warm-up at {count} batches took {seconds:.1f} s")
        if compiler:
            print(f"  aoti: compiled in {figures['compilation']:.0f} s")
        ceilings = ask(workers["plain"], "ceilings") if arguments.roofline else None
        print(f"{'batch':>7}" + "".join(f"{title:>26}" for title in titles) + f"{'best / compile':>18}")
        for size in batches:
            row = measure_batch(workers, size, arguments)
            if ceilings:
                value_bytes = 2 if device == "cuda" else 4
                operators = roofline.count_operators(copy.deepcopy(network).to("meta"), shape, size)
                row["roofline"] = roofline.images_per_second(operators, size, ceilings, value_bytes)
            figures["images per second"].append(row)
            print_row(row, titles)
        if ceilings:
            figures["ceilings"] = ceilings._asdict()
            print_ceilings(ceilings, operators, size, value_bytes)
        if figures["emulated error"]:
            errors = ", ".join(f"{title} {error:.1e}" for title, error in figures["emulated error"].items())
            print(f"  relative L2 errors by the emulation on the CPU, for {CHECKED_IMAGES} images: {errors}")
        if arguments.profile:
            figures["profiles"] = {size: print_profiles(workers, size) for size in {batches[0], batches[-1]}}
        rows = figures["images per second"]
        first = [f"{title} " + " ".join(f"{row['first'][title]:.0f}" for row in rows) for title in titles]
        print(f"  milliseconds of the first request of each batch after the warm-up: {', '.join(first)}")
    if arguments.first:
        figures["first requests"] = compare_warm_ups(network, shape, device)
    print()
    return figures


def measure_batch(workers: dict[str, Connection], size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a batch in turns: the images per second of each way, its ratio to the plain trace, and its error."""
    row: dict[str, Any] = {"batch": size, "error": {}, "first": {}, "rate": {}, "ratio": {}}
    for title, each in workers.items():
        row["first"][title], row["error"][title] = ask(each, "first", size)
        if not row["error"][title] < MAX_ERROR:
            sys.exit(f"{title} is wrong at batch {size}: the relative L2 error is {row['error'][title]:.1e}")
    rounds = [{title: ask(each, "rate", size) for title, each in workers.items()} for _ in range(arguments.rounds)]
    for title in workers:
        row["rate"][title] = statistics.median(each[title] for each in rounds)
        row["ratio"][title] = statistics.median(each[title] / each["plain"] for each in rounds)
        if "torch.compile" in workers:
            row[f"{title} / torch.compile"] = statistics.median(each[title] / each["torch.compile"] for each in rounds)
    return row


def print_row(row: dict[str, Any], titles: list[str]) -> None:
    cells = []
    for title in titles:
        rate, share = row["rate"][title], ""
        if "roofline" in row:
            share = f" {rate / row['roofline']:.0%}"
        cells.append(f"{rate:.5g} x {row['ratio'][title]:.2f} {row['error'][title]:.0e}{share}")
    against = [row[f"{title} / torch.compile"] for title in ("published", "aoti") if "torch.compile" in titles]
    limit = f"  roofline {row['roofline']:.5g}" if "roofline" in row else ""
    print(f"{row['batch']:>7}" + "".join(f"{cell:>26}" for cell in cells)
          + f"{f'{max(against):.2f}' if against else '-':>18}{limit}", flush=True)  # fmt: skip


def print_profiles(workers: dict[str, Connection], size: int) -> dict[str, Any]:
    """Print and return the milliseconds of the GPU's kernels in one request, by name, of each way."""
    profiles = {title: ask(each, "profile", size) for title, each in workers.items()}
    for title, (milliseconds, kernels) in profiles.items():
        total = sum(kernels.values())
        print(f"  {title} at batch {size}: {milliseconds:.2f} ms, in which kernels ran for {total:.2f} ms, most of it")
        for name, each in list(kernels.items())[:SHOWN_KERNELS]:
            print(f"    {each:8.3f} ms  {name[:100]}")
    return profiles


def print_ceilings(
    ceilings: roofline.Ceilings, operators: list[roofline.Operator], batch: int, value_bytes: int
) -> None:
    flops = sum(each.flops for each in operators) / batch
    moved = sum(each.values for each in operators) * value_bytes / batch
    print(
        f"  a matrix product reaches {ceilings.flops_per_second / 1e12:.3g} TFLOP/s, a copy "
        f"{ceilings.bytes_per_second / 1e9:.3g} GB/s; at batch {batch} an image has {flops / 1e9:.3g} GFLOP and "
        f"{moved / 1e6:.3g} MB"
    )


def compare_warm_ups(network: torch.nn.Module, shape: tuple[int, ...], device: str) -> dict[str, Any]:
    """Time the first requests of the published model after some warm-ups; prints and returns a row for each."""
    largest = max(FIRST_BATCHES)
    warm_ups = {"no warm-up": [], "1 and the largest": [largest, 1], "every batch": [*range(largest, 0, -1)]}
    rows: dict[str, Any] = {}
    print("\n  milliseconds of the published model: the first three requests at a batch, and the tenth")
    print(
        f"  {'warmed up, twice each':<24}{'it took':>8}" + "".join(f"{f'batch {size}':>22}" for size in FIRST_BATCHES)
    )
    for title, order in warm_ups.items():
        with tempfile.TemporaryDirectory() as folder:
            save_forms(network, shape, Path(folder), device, largest, ["published"])
            with process(serve, "published", folder, device, order) as worker:
                _, seconds = ask(worker)
                times = {size: ask(worker, "requests", size) for size in FIRST_BATCHES}
                requests = {size: [*ten[:3], ten[9]] for size, ten in times.items()}
        rows[title] = {"seconds": seconds, "requests": requests}
        cells = "".join(f"{' '.join(f'{value:.0f}' for value in each):>22}" for each in requests.values())
        print(f"  {title:<24}{seconds:>6.1f} s{cells}", flush=True)
    return rows


def create_network(name: str) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    """A network of timm in inference mode with random weights, and (channels, height, width) of its images.

    Its batch normalization has the statistics of random input. Without them, the values in a deep network
    would leave the range of fp16.
    """
    import timm

    torch.manual_seed(0)
    network: Any = timm.create_model(name)
    shape = network.default_cfg["input_size"]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
            module.reset_running_stats()
    network.train()
    with torch.no_grad():
        network(torch.randn(8, *shape))
    return network.eval().requires_grad_(False), shape


def save_forms(
    network: torch.nn.Module, shape: tuple[int, ...], folder: Path, device: str, largest: int, titles: list[str]
) -> dict[str, float]:
    """Write the files that the processes load, all made on the CPU, and some images with their outputs in fp32.

    Returns: For a GPU the relative L2 errors that the emulation of its rounding predicts.
    """
    images = torch.randn(CHECKED_IMAGES, *shape)
    paths = {name: folder / name / "model.pt" for name in ("plain", "exact", "cast", "published")}
    for path in paths.values():
        path.parent.mkdir()
    errors: dict[str, float] = {}

    def emulate(title: str, module: Any) -> None:
        if title in titles:
            errors[title] = relative_error(torchscript_graph.run_with_gpu_rounding(module, images), exact)

    with torch.no_grad():
        exact = network(images)
        torch.save({"images": images, "outputs": exact}, folder / "images.pt")
        trace = torch.jit.trace(network, images[:TRACED_BATCH], check_trace=False)
        torchscript_graph.save_torchscript(trace, str(paths["plain"]))
        torchscript_graph.save_torchscript(torch.jit.freeze(trace), str(paths["exact"]))
        if device == "cuda":
            cast = torchscript_graph.cast_trace(str(paths["exact"]), "fp16", "channels_last")
            torchscript_graph.save_torchscript(cast, str(paths["cast"]))
            torchscript_gpu.rewrite_for_gpu(cast, [images[:TRACED_BATCH]])
            torchscript_graph.save_torchscript(cast, str(paths["published"]))
            for title in ("cast", "published"):
                emulate(title, torch.jit.load(str(paths[title])))
        else:
            paths["exact"].rename(paths["published"])
        if "torch.compile" in titles:
            torch.save(network, folder / "network.pt")
        if "aoti" in titles:
            program = export(network, shape, device, largest)
            if device == "cuda":
                emulate("aoti", program.module(check_guards=False))
            torch.export.save(program, folder / "program.pt2")
    return errors


def export(network: torch.nn.Module, shape: tuple[int, ...], device: str, largest: int) -> torch.export.ExportedProgram:
    """The program that stages/aoti.py compiles."""
    example = torch.randn(aoti_package.example_batch("gpu" if device == "cuda" else "cpu", largest), *shape)
    shapes = ({0: torch.export.Dim("batch", min=1, max=max(len(example), largest))},)
    program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    return torch_export.cast_program(program, torch.float16, [True], shapes) if device == "cuda" else program


if __name__ == "__main__":
    main()
