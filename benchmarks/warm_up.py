"""Measures on a GPU how the order of a model's warm-up requests changes its later speed.

Each network is traced, cast to fp16 with channels last, and loaded in a fresh process for each order. All processes
warm up at the same time, each batch twice. Then one after the other measures images per second, the best of two rounds.

    python benchmarks/warm_up.py
"""

import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

NETWORKS = {"efficientnet_b3": 288, "resnet50": 224, "convnext_tiny": 224}  # and the size of their images
BATCHES = [*range(1, 17), 32]
ORDERS = {"up": BATCHES, "down": BATCHES[::-1], "32 alone": [32]}
MEASURED = (1, 8, 16, 32)
IMAGES = 400  # in one measurement


def measure(network: str, order: str, warm: Any, turn: Any, results: Any) -> None:
    import timm
    import torch

    from build_tasks.formats import torchscript_device, torchscript_graph

    size = NETWORKS[network]
    module = timm.create_model(network).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trace = torch.jit.freeze(torch.jit.trace(module, torch.randn(2, 3, size, size), check_trace=False))
        torchscript_device.follow_input(trace)
        torchscript_graph.save_torchscript(trace, f"{folder}/model.pt")
        cast = torchscript_graph.cast_trace(f"{folder}/model.pt", "fp16", "channels_last")
        torchscript_graph.save_torchscript(cast, f"{folder}/model.fp16.pt")
        served = torch.jit.load(f"{folder}/model.fp16.pt", map_location="cuda")
    speeds: dict[int, int] = {}
    with torch.inference_mode():
        for batch in ORDERS[order]:
            for _ in range(2):
                served(torch.zeros(batch, 3, size, size, device="cuda"))
        torch.cuda.synchronize()
        warm.wait()
        with turn:
            for batch in 2 * [batch for batch in MEASURED if batch in ORDERS[order]]:
                images = torch.randn(batch, 3, size, size, device="cuda")
                runs = max(10, IMAGES // batch)
                for _ in range(5):
                    served(images)
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(runs):
                    served(images)
                torch.cuda.synchronize()
                speed = round(runs * batch / (time.perf_counter() - start))
                speeds[batch] = max(speeds.get(batch, 0), speed)
    results.put((network, order, speeds))


def main() -> None:
    context = multiprocessing.get_context("spawn")
    cases = [(network, order) for network in NETWORKS for order in ORDERS]
    shared = context.Barrier(len(cases)), context.Lock(), context.Queue()
    processes = [context.Process(target=measure, args=(*case, *shared)) for case in cases]
    for process in processes:
        process.start()
    for network, order, speeds in sorted(shared[2].get(timeout=600) for _ in cases):
        print(f"{network:16} {order:9}", *(f"batch {batch}: {speed:6}" for batch, speed in speeds.items()))
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
