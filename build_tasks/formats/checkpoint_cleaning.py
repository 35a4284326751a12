"""What is taken from a checkpoint, and what is removed from it, both as tensors and as words for the user.

a dict of tensors ─► without prefixes of wrappers ─► without weights.prefix ─► without bookkeeping ─► with tied ones
"""

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from build_tasks.formats.checkpoints import TIMM_KEYS, Checkpoint

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]

WRAPPERS = ("_orig_mod.", "module.")  # prefixes of torch.compile and of DataParallel, which timm removes
# Names of tensors that tools add to a network: profilers (thop), and averaged models (torch, LitEma).
BOOKKEEPING = ("total_ops", "total_params", "n_averaged", "num_updates", "decay")

AVERAGES = ("ema", "swa", "averag", "avg")  # parts of names of averaged weights: exponential, stochastic (SWA), any


class Attempt(NamedTuple):
    """A state dict that may fit the network, and how it was made from the checkpoint, for the line of the stage.

    name: Of the dict in the checkpoint, "" for the checkpoint itself.
    left_out: The names that do not begin with weights.prefix.
    """

    name: str
    state: "dict[str, torch.Tensor]"
    notes: dict[str, Any]
    left_out: tuple[str, ...] = ()


def cleaned(name: str, tensors: Tensors, expected: Tensors, prefix: str | None) -> Attempt:
    """Return a dict of tensors without the prefixes of wrappers and the tensors of tools, and with its tied weights.

    Args:
        name: Of the dict in the checkpoint, "" for the checkpoint itself.
        expected: The state dict of the network.
        prefix: weights.prefix of the spec.
    """
    prefix = prefix or ""
    state, notes = _unwrapped(tensors, expected, prefix)
    notes = taken_notes(name) | notes
    others = tuple(key for key in state if not key.startswith(prefix))
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if others:
        notes["left out"] = f"{len(others)} without the prefix {prefix}, such as {others[0]}"
    dropped = sorted(key for key in state.keys() - expected.keys() if key.rpartition(".")[2] in BOOKKEEPING)
    state = {key: value for key, value in state.items() if key not in dropped}
    restored = tied(state, expected)
    if restored:
        notes["restored"] = f"{len(restored)} that share a tensor, such as {min(restored)}"
    if dropped:
        notes["dropped"] = f"{len(dropped)} of a profiler or an average, such as {dropped[0]}"
    return Attempt(name, state | restored, notes, others)


def _unwrapped(tensors: Tensors, expected: Tensors, prefix: str) -> tuple[Tensors, dict[str, Any]]:
    """Return a dict of tensors without the prefixes of wrappers, and the note about them.

    The names stay as they are if more of them are the network's so: its own layers, or weights.prefix, may begin like a
    wrapper.
    """
    from timm.models import clean_state_dict

    state = clean_state_dict(tensors)
    as_they_are, without = (sum(f"{prefix}{key}" in names for key in expected) for names in (tensors, state))
    return (tensors, {}) if as_they_are > without else (state, wrapper_notes(tensors))


def unwrap(checkpoint: Checkpoint, ema: bool = False) -> tuple[Checkpoint, dict[str, Any]]:
    """Return the dict that timm's load_state_dict would take from a checkpoint, without wrappers, and notes about it.

    Args:
        ema: Whether a moving average is preferred. Without it, an average is taken only if there is nothing else.
    """
    from timm.models import clean_state_dict

    averages, others = TIMM_KEYS[:2], TIMM_KEYS[2:]
    order = (*averages, *others) if ema else (*others, *averages)
    name = next((key for key in order if isinstance(checkpoint.get(key), dict)), "")
    content = checkpoint[name] if name else checkpoint
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    unnamed = {key: value for key, value in content.items() if key not in named}  # which a converter may use
    return clean_state_dict(named) | unnamed, taken_notes(name) | wrapper_notes(named)


def taken_notes(name: str) -> dict[str, Any]:
    """Return the note on which dict of a checkpoint is taken; none for the checkpoint itself."""
    kind = f", an average{' (EMA)' if 'ema' in name.lower() else ''}" if is_average(name) else ""
    return {"taken from": f"{name}{kind}"} if name else {}


def wrapper_notes(tensors: Tensors) -> dict[str, Any]:
    """Return the note on the prefixes of wrappers that timm's clean_state_dict removes; none if there are none."""
    found = Counter(prefix for key in tensors if (prefix := _wrapper_prefix(key)))
    removed = [f"{prefix} before {count} of {len(tensors)} names" for prefix, count in found.items()]
    return {"removed": ", ".join(removed)} if removed else {}


def _wrapper_prefix(key: str) -> str:
    rest = key
    while any(rest.startswith(prefix) for prefix in WRAPPERS):
        rest = rest.partition(".")[2]
    return key.removesuffix(rest)


def tied(state: Tensors, expected: Tensors) -> Tensors:
    """Return the missing tensors that the network shares with a tensor of the state dict.

    safetensors.torch.save_model, and others, save a shared tensor under one of its names.
    """
    names: dict[tuple[Any, ...], list[str]] = {}
    for key, tensor in expected.items():
        names.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(key)
    found = {}
    for tied in names.values():
        present = next((key for key in tied if key in state), None)
        if present is not None and expected[present].numel():
            found.update({key: state[present] for key in tied if key not in state})
    return found


def is_average(name: str) -> bool:
    """Return whether the name of a dict says that its weights are an average: model_ema, swa_model, averaged."""
    return any(word in name.lower() for word in AVERAGES)


def type_notes(state: Tensors, expected: Tensors) -> dict[str, Any]:
    """Return the note on the tensors that get the dtype of the network; none if all have it."""
    changes = Counter(
        tuple(str(each[key].dtype).removeprefix("torch.") for each in (state, expected))
        for key in state.keys() & expected.keys()
        if state[key].dtype != expected[key].dtype
    )
    texts = [f"{count} from {before} to {after}" for (before, after), count in sorted(changes.items())]
    return {"types": ", ".join(texts)} if texts else {}
