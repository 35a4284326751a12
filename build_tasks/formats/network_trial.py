"""What trials of a network of the user show, for the spec that `doit new` writes. Each runs in a process of its own.

network.py ─► build() ─► trial runs ─► its inputs, and the Python files beside it that it imports
                   └───► checkpoint ─► with a prefix or without ─► fits? ─► what was found
"""

import os
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from build_tasks.formats.checkpoint_facts import CheckpointFacts, facts_of_network
from build_tasks.formats.network_inputs import FoundInputs, inputs_of_network
from build_tasks.formats.user_code import function_of_file, network_of_function

if TYPE_CHECKING:
    import torch


class NetworkTrial(NamedTuple):
    """What was found of a network.

    files: The Python files that it imports from its own folder, relative to that.
    checkpoint: What was found in the checkpoint; None without one.
    """

    inputs: FoundInputs
    files: list[str]
    checkpoint: CheckpointFacts | None


def try_network(path: str, function: str, checkpoint: str) -> NetworkTrial:
    """Return what trial runs show of a network of the user, and how a checkpoint fits.

    Args:
        path: The Python file.
        function: Its function that builds the network.
        checkpoint: The path of a file with weights; "" for none.
    Raises:
        UserError: If it builds none, if forward needs an argument that is no tensor, or if the checkpoint cannot be
            read, or has values that cannot be weights, such as NaN.
    """
    before = {name.partition(".")[0] for name in sys.modules}
    network: torch.nn.Module = network_of_function(function_of_file(path, function), f"{path}:{function}", {})
    network.eval().requires_grad_(False)
    facts = facts_of_network(checkpoint, network) if checkpoint else None
    inputs = inputs_of_network(network, path)
    folder, own = os.path.split(os.path.abspath(path))
    return NetworkTrial(inputs, [each for each in imported_files(folder, before) if each != own], facts)


def check_network(path: str, function: str) -> None:
    """Build the network of a function of the user once.

    Raises:
        UserError: If the function builds none.
    """
    network_of_function(function_of_file(path, function), f"{path}:{function}", {})


def imported_files(folder: str, before: Collection[str]) -> list[str]:
    """Return the Python files in a folder, and below, that this process has imported by their place in it.

    Args:
        folder: An absolute path.
        before: The packages and modules that were imported before, which are no files of the user.
    """
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name.partition(".")[0] not in before:
            inner = name.replace(".", os.sep)
            candidates = (f"{inner}.py", os.path.join(inner, "__init__.py"))
            found += [each for each in candidates if os.path.join(folder, each) == os.path.abspath(file)]
    return sorted(found)
