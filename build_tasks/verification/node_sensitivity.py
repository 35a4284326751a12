"""The nodes of a graph in the order of their effect on the outputs, found with few evaluations.

stages/repair.py uses this order first. An evaluation runs a graph in which only some nodes have the reduced precision
(see formats/node_precision.py), which takes less time than a conversion.
"""

import heapq
import math
from collections.abc import Callable, Iterable

MAX_EVALUATIONS = 96


def rank_nodes(
    effect: Callable[[Iterable[str]], float], nodes: list[str], limit: float, log: Callable[[str], None]
) -> list[str]:
    """Return the nodes in the order of their effect, the largest first.

    The part with the largest effect is halved again and again. This ends after MAX_EVALUATIONS, or when the effects of
    all parts with several nodes together are at most a quarter of the limit, or of the effect of all nodes. The nodes
    of such a part share its effect. Of equal effects, the node that comes first in the graph comes first.

    Args:
        effect: The relative error of the outputs when exactly these nodes have the reduced precision.
        nodes: The names of all nodes, in the order of the graph.
        limit: The relative L2 error that the gate allows.
        log: Takes a line about the progress.
    """
    position = {name: index for index, name in enumerate(nodes)}
    singles: list[tuple[float, int, str]] = []  # the negative effect, so that the largest comes first
    parts: list[tuple[float, int, list[str]]] = []  # the negative effect as well

    def evaluate(part: list[str]) -> None:
        size = effect(part)
        if len(part) == 1:
            singles.append((-size, position[part[0]], part[0]))
        else:
            heapq.heappush(parts, (-size, position[part[0]], part))

    evaluate(nodes)
    threshold = min(limit, -parts[0][0] if parts else 0.0) / 4
    evaluations = 1
    while parts and evaluations + 2 <= MAX_EVALUATIONS and math.hypot(*(size for size, _, _ in parts)) > threshold:
        _, _, part = heapq.heappop(parts)
        middle = len(part) // 2
        evaluate(part[:middle])
        evaluate(part[middle:])
        evaluations += 2
        if evaluations % 8 == 1 and parts:
            largest = -parts[0][0]
            log(
                f"effects measured: {evaluations} of at most {MAX_EVALUATIONS}, "
                f"the largest of several nodes {largest:.1e}"
            )
    shared = [(size / math.sqrt(len(part)), position[name], name) for size, _, part in parts for name in part]
    return [name for _, _, name in sorted(singles + shared)]
