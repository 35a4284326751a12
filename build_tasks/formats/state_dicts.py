"""From the content of a checkpoint to the state dict of a network.

    checkpoint ─► every dict of tensors in it ─► without wrappers and bookkeeping ─► fits? ─► state dict
                                                     └─► converted by timm or the network ─► fits? ─┘

What was chosen, dropped or converted is said on the line of the stage. If nothing fits, the message says what is
missing, and which key of the spec would help.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, listed
from build_tasks.formats.checkpoint_cleaning import Attempt, cleaned, is_average
from build_tasks.formats.checkpoints import TIMM_KEYS, Checkpoint, as_tensors, unusable_reason
from build_tasks.formats.state_dict_conversion import by_network, by_timm, from_jax
from build_tasks.formats.state_dict_mismatch import MisfitError, describe_problems, find_problems, first_keys, misfit

if TYPE_CHECKING:
    import torch

MAX_DEPTH = 3  # of dicts inside dicts


def fit(
    checkpoint: Checkpoint,
    network: "torch.nn.Module",
    source: str,
    prefix: str | None = None,
    path: str = "",
    ema: bool = False,
) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
    """Return the state dict of the network that a checkpoint contains, and notes about how it was found.

    Args:
        checkpoint: The content of the file.
        network: The network, with any weights.
        source: Names the file in messages.
        prefix: weights.prefix of the spec.
        path: The file, which timm reads itself if it is a .npz of JAX.
        ema: Whether averaged weights are wanted, if the checkpoint has both.
    Raises:
        MisfitError: If nothing in the checkpoint fits the network, or if several dicts do.
    """
    expected = network.state_dict()
    attempts = attempts_of(checkpoint, expected, prefix)
    if not attempts:
        raise MisfitError(
            f"{source}: expected weights, found no tensor with a name, at most {MAX_DEPTH} dicts deep; its keys are "
            f"{listed(map(str, checkpoint)) or 'none'}"
        )
    fitting = _fitting(attempts, expected)
    if not fitting:
        converted = [*by_timm(attempts, network, expected), *from_jax(path, network)]
        fitting = _fitting(converted, expected) or _fitting(by_network(attempts, network), expected)
        attempts = [*converted, *attempts]
    if not fitting:
        raise misfit(attempts, network, source, prefix or "")
    chosen = _choose(fitting, source, ema)
    return chosen.state, chosen.notes


def attempts_of(
    checkpoint: Checkpoint, expected: "dict[str, torch.Tensor]", prefix: str | None = None
) -> list[Attempt]:
    """Return every dict of tensors in a checkpoint as a state dict that may fit the network.

    Args:
        checkpoint: The content of the file.
        expected: The state dict of the network.
        prefix: weights.prefix of the spec.
    """
    return [cleaned(name, tensors, expected, prefix) for name, tensors in dicts_of_tensors(checkpoint)]


def _fitting(attempts: Iterable[Attempt], expected: "dict[str, torch.Tensor]") -> list[Attempt]:
    return [attempt for attempt in attempts if not find_problems(attempt.state, expected)]


def dicts_of_tensors(checkpoint: Checkpoint) -> "list[tuple[str, dict[str, torch.Tensor]]]":
    """Return every dict of tensors in a checkpoint with its name, "" for the checkpoint itself.

    Arrays of NumPy count as tensors in a checkpoint that has no tensor. In others, they are the state of a random
    generator and the like.
    """
    import torch

    dicts = [*_named_dicts(checkpoint)]
    tensors = [
        (name, {key: value for key, value in content.items() if isinstance(key, str) and torch.is_tensor(value)})
        for name, content in dicts
    ]
    if not any(found for _, found in tensors):
        tensors = [(name, as_tensors(content)) for name, content in dicts]
    return [(name, found) for name, found in tensors if found]


def _named_dicts(content: Checkpoint, name: str = "", depth: int = 0) -> Iterator[tuple[str, Checkpoint]]:
    """Yield a dict and the dicts in it, each with its name. Those that timm prefers come first."""
    yield name, content
    inner = {key: value for key, value in content.items() if isinstance(value, dict) and isinstance(key, str)}
    for key in sorted(inner, key=lambda key: TIMM_KEYS.index(key) if key in TIMM_KEYS else len(TIMM_KEYS)):
        if depth < MAX_DEPTH:
            yield from _named_dicts(inner[key], f"{name}.{key}".lstrip("."), depth + 1)


def _choose(fitting: list[Attempt], source: str, ema: bool) -> Attempt:
    """Return the attempt to use: the only one, or timm's choice. An average is taken if it is wanted, or all there is.

    The notes of the result name the average that was taken, and what else would fit.
    """
    averages = [attempt for attempt in fitting if is_average(attempt.name)]
    others = [attempt for attempt in fitting if not is_average(attempt.name)]
    if ema and not averages:
        raise MisfitError(f"{source}: expected averaged weights, since weights.ema = true, found none that fit")
    candidates = averages if ema or not others else others
    names = [attempt.name for attempt in candidates]
    if len(candidates) > 1 and names[0] and names[0] not in TIMM_KEYS:
        raise MisfitError(
            f"{source} has {len(names)} sets of weights that fit, {', '.join(names[:4])}: choose one with "
            "weights.converter",
            candidates[0].state,
            candidates[0].state,
        )
    chosen, *left = candidates
    texts = [f"{', '.join(attempt.name for attempt in left)}, which would fit too"] if left else []
    if averages and candidates is others:
        names = [attempt.name for attempt in averages]
        texts.append(f"{', '.join(names)}, an average (weights.ema = true takes it)")
    return chosen._replace(notes={**chosen.notes, "left": "; ".join(texts)}) if texts else chosen


def match_keys(
    state: "dict[str, torch.Tensor]", expected: "dict[str, torch.Tensor]", source: str
) -> "dict[str, torch.Tensor]":
    """Return `state` under the keys of `expected`, in its dtypes and its order.

    Raises:
        UserError: If any key or shape does not match, or if a weight is not a finite number of the
            network's dtype. The message lists them.
    """
    import torch

    if problems := find_problems(state, expected):
        raise UserError(f"{source} does not fit the architecture: {describe_problems(problems, state, expected)}")
    if reason := unusable_reason(state, expected):
        raise UserError(f"{source} cannot be the weights: {reason}")
    state = {key: tensor if tensor.layout == torch.strided else tensor.to_dense() for key, tensor in state.items()}
    matched = {key: state.get(key, tensor).to(tensor.dtype).clone().contiguous() for key, tensor in expected.items()}
    if large := [key for key in state if _is_finite(state[key]) and not _is_finite(matched[key])]:
        dtypes = ", ".join(sorted({str(expected[key].dtype).removeprefix("torch.") for key in large}))
        raise UserError(
            f"{source} has values too large for {dtypes} in {len(large)} tensors: {first_keys(large)}; train it in "
            f"{dtypes}, or save other weights"
        )
    require_finite({key: tensor for key, tensor in matched.items() if _is_finite(expected[key])}, source)
    return matched


def require_finite(state: "dict[str, torch.Tensor]", source: str) -> None:
    """Raise UserError if a weight is NaN or infinity. The message names the tensors."""
    if broken := [key for key, tensor in state.items() if not _is_finite(tensor)]:
        raise UserError(f"{source} has NaN or infinity in {len(broken)} tensors: {first_keys(broken)}; train it again")


def _is_finite(tensor: "torch.Tensor") -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
