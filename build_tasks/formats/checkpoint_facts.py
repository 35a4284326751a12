"""What a checkpoint says about the network that it belongs to, for the spec that `doit new` writes.

checkpoint ─► classes of its head, channels of its stem ─► the architecture with them ─► fits? ─► what was found
"""

import functools
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from build_tasks.formats import checkpoint_cleaning, checkpoints, state_dicts
from build_tasks.formats.checkpoint_cleaning import is_average
from build_tasks.formats.state_dict_mismatch import MisfitError, fitting_prefixes, prefixes_in, several_prefixes

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]
# From the tensors of a checkpoint, a network and a prefix to the arguments of the network's architecture.
ArgumentsOf = Callable[[Tensors, "torch.nn.Module", str], dict[str, Any]]


class CheckpointFacts(NamedTuple):
    """What was found in a checkpoint of an architecture of timm.

    arguments: For timm.create_model: num_classes and in_chans, as far as they differ from timm's defaults.
    prefix: weights.prefix of the spec, None if the tensors need none, or if the user must choose one.
    notes: What was taken from the file, by kind, for the user.
    mismatch: Why the file does not fit the architecture with these arguments; None if it does.
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

    create = functools.cache(functools.partial(timm.create_model, architecture, pretrained=False))
    return _facts(path, create, _arguments)


def facts_of_network(path: str, network: "torch.nn.Module") -> CheckpointFacts:
    """Return what a checkpoint says about a network of the user, which has no arguments.

    Raises:
        UserError: As above.
    """
    return _facts(path, lambda: network, lambda *_: {})


def _facts(path: str, create: "Callable[..., torch.nn.Module]", arguments_of: ArgumentsOf) -> CheckpointFacts:
    """Return what a checkpoint says about the networks that `create` makes with the arguments of `arguments_of`."""
    checkpoint, source = checkpoints.read_checkpoint(path), os.path.basename(path)
    candidates = _candidates(checkpoint, create(), arguments_of)
    misfits = []
    for arguments, prefix in candidates:
        try:
            state, notes = state_dicts.fit(checkpoint, create(**arguments), source, prefix, path)
        except MisfitError as misfit:
            misfits.append((arguments, prefix, misfit))
            continue
        networks = (create(**each) for each, _ in candidates)
        if prefix and len(prefixes := {prefix: None} | _fitting_prefixes(checkpoint, networks)) > 1:
            return CheckpointFacts(arguments, None, {}, str(several_prefixes(source, [*prefixes], state)))
        expected = create(**arguments).state_dict()
        state_dicts.match_keys(state, expected, path)
        types = checkpoint_cleaning.type_notes(state, expected)
        return CheckpointFacts(arguments, prefix, {"tensors": len(state), **types, **notes, **_size_note(notes)}, None)
    nearest = min(misfits, key=lambda misfit: (misfit[2].rank, len(misfit[0])))
    if nearest[2].fitting * 2 < len(create().state_dict()):  # it is of another network, about which it says nothing
        nearest = next(misfit for misfit in misfits if misfit[:2] == ({}, None))
    arguments, prefix, error = nearest
    return CheckpointFacts(arguments, prefix, {}, str(error))


def _fitting_prefixes(checkpoint: checkpoints.Checkpoint, networks: "Iterable[torch.nn.Module]") -> dict[str, None]:
    """Return the prefixes whose tensors fit one of the networks without it."""
    expected = [network.state_dict() for network in networks]
    return {
        prefix: None
        for each in expected
        for prefix in fitting_prefixes(state_dicts.attempts_of(checkpoint, each), each)
    }


def _size_note(notes: dict[str, Any]) -> dict[str, Any]:
    if "resized" not in notes.get("converted", ""):
        return {}
    return {
        "check": "the file may be of a network for pictures of another size, to which you can set input.shape and "
        "architecture.arguments.img_size"
    }


def _candidates(
    checkpoint: checkpoints.Checkpoint, network: "torch.nn.Module", arguments_of: ArgumentsOf
) -> list[tuple[dict[str, Any], str | None]]:
    """Return the arguments and the prefix with which a checkpoint may fit, without repetitions.

    Averages come after the other dicts, then the network's own defaults, and last a file without the network's first
    tensor.
    """
    expected = network.state_dict()
    attempts = state_dicts.attempts_of(checkpoint, expected)
    states = [attempt.state for attempt in sorted(attempts, key=lambda attempt: is_average(attempt.name))]
    found = [
        (arguments_of(state, network, prefix), prefix or None)
        for state in states
        for prefix in sorted(prefixes_in(state, expected), key=len)
    ]
    rest = [(arguments_of(state, network, ""), None) for state in states if state.keys() & expected.keys()]
    candidates: list[tuple[dict[str, Any], str | None]] = []
    for candidate in (*found, ({}, None), *rest):
        if candidate not in candidates:
            candidates.append(candidate)
    return candidates


def _arguments(tensors: Tensors, network: "torch.nn.Module", prefix: str) -> dict[str, Any]:
    """Return the number of classes of the head and of channels of the stem, where they are not the network's own.

    A file without a head has num_classes 0. A grouped or reshaped stem says nothing.
    """
    state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
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
