"""What a checkpoint says about the network that it belongs to, for the spec that `doit new` writes.

checkpoint ─► classes of its head, channels of its stem ─► the architecture with them ─► fits? ─► what was found
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from build_tasks.errors import UserError
from build_tasks.formats import checkpoint_cleaning, checkpoints, state_dicts

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


class CheckpointFacts(NamedTuple):
    """What was found in a checkpoint of an architecture of timm.

    arguments: For timm.create_model: num_classes and in_chans, as far as they differ from timm's defaults.
    prefix: weights.prefix of the spec, None if the tensors need none.
    notes: What was taken from the file, by kind, for the user.
    mismatch: Why the file does not fit the architecture; None if it does.
    """

    arguments: dict[str, Any]
    prefix: str | None
    notes: dict[str, Any]
    mismatch: str | None


def read_facts(path: str, architecture: str) -> CheckpointFacts:
    """Return what a checkpoint says about a network of an architecture of timm.

    Raises:
        UserError: If the file cannot be read as a checkpoint, or if its values cannot be weights, such as NaN.
    """
    import timm

    checkpoint = checkpoints.read_checkpoint(path)
    network = timm.create_model(architecture, pretrained=False)
    attempts = list(_candidates(checkpoint, network))
    for arguments, prefix in attempts:
        candidate = timm.create_model(architecture, pretrained=False, **arguments) if arguments else network
        try:
            state, notes = state_dicts.fit(checkpoint, candidate, os.path.basename(path), prefix, path)
        except UserError as error:
            mismatch = str(error)
            continue
        expected = candidate.state_dict()
        state_dicts.match_keys(state, expected, path)
        types = checkpoint_cleaning.type_notes(state, expected)
        return CheckpointFacts(arguments, prefix, {"tensors": len(state), **types, **notes}, None)
    return CheckpointFacts(attempts[-1][0], None, {}, mismatch)


def _candidates(
    checkpoint: checkpoints.Checkpoint, network: "torch.nn.Module"
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Yield the arguments and the prefix with which a checkpoint may fit; the network's own defaults come last."""
    for _, tensors in state_dicts.dicts_of_tensors(checkpoint):
        for prefix in _prefixes(tensors, network):
            yield _arguments(tensors, network, prefix), prefix or None
    yield {}, None


def _prefixes(tensors: Tensors, network: "torch.nn.Module") -> list[str]:
    """Return what stands before the name of the network's first tensor in the names of a checkpoint.

    Prefixes of wrappers, which are removed without a key of the spec, are none.
    """
    from timm.models import clean_state_dict

    first = next(iter(network.state_dict()))
    found = [key.removesuffix(first) for key in clean_state_dict(tensors) if key.endswith(first)]
    return sorted({prefix for prefix in found if not prefix or prefix.endswith(".")}, key=len)


def _arguments(tensors: Tensors, network: "torch.nn.Module", prefix: str) -> dict[str, Any]:
    """Return the number of classes of the head and of channels of the stem, where they are not the network's own.

    A file without a head has num_classes 0. A grouped or reshaped stem says nothing.
    """
    from timm.models import clean_state_dict

    state = {key.removeprefix(prefix): tensor for key, tensor in clean_state_dict(tensors).items()}
    expected, config = network.state_dict(), getattr(network, "pretrained_cfg", {})
    arguments: dict[str, Any] = {}
    for argument, layers, axis in (
        ("num_classes", config.get("classifier"), 0),
        ("in_chans", config.get("first_conv"), 1),
    ):
        names = [f"{name}.weight" for name in ([layers] if isinstance(layers, str) else layers or ())]
        found = {state[name].shape[axis] for name in names if name in state and state[name].ndim > axis}
        own = {expected[name].shape[axis] for name in names if name in expected}
        if len(found) == 1 and found != own:
            arguments[argument] = int(found.pop())
        elif argument == "num_classes" and own and not found:
            arguments[argument] = 0
    return arguments
