"""Why a state dict does not fit a network, and which key of the spec would help.

attempts, network ─► missing, unexpected, wrongly shaped ─► a prefix, or an argument of the architecture ─► MisfitError
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from build_tasks.errors import UserError, listed
from build_tasks.formats.checkpoint_cleaning import Attempt, Tensors, is_average, tied
from build_tasks.formats.checkpoints import TIMM_KEYS, unusable_reason

if TYPE_CHECKING:
    import torch


class MisfitError(UserError):
    """A checkpoint that does not fit a network, or of which several sets of weights do.

    fitting: The number of tensors that fit.
    rank: The nearer a checkpoint is, the lower: by the tensors that fit, then by the keys that do not match.

    Args:
        line: The message.
        state: The state dict that the message is about.
        expected: The state dict of the network.
    """

    def __init__(self, line: str, state: Tensors | None = None, expected: Tensors | None = None):
        super().__init__(line)
        state, expected = state or {}, expected or {}
        self.fitting = sum(key in state and state[key].shape == tensor.shape for key, tensor in expected.items())
        self.rank = (-self.fitting, _distance(state, expected))


def find_problems(state: Tensors, expected: Tensors) -> dict[str, list[str]]:
    """Return the keys that do not match, by the kind of the problem. Kinds without a key are left out."""
    # Older checkpoints lack a counter that only training uses. torch's own loader accepts that, too.
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    problems = {
        "missing": sorted(expected.keys() - state.keys() - optional),
        "unexpected": sorted(state.keys() - expected.keys()),
        "wrongly shaped": sorted(
            key for key in expected.keys() & state.keys() if state[key].shape != expected[key].shape
        ),
    }
    return {kind: keys for kind, keys in problems.items() if keys}


def _distance(state: Tensors, expected: Tensors) -> int:
    return sum(map(len, find_problems(state, expected).values()))


def describe_problems(problems: dict[str, list[str]], state: Tensors, expected: Tensors) -> str:
    """Return the keys that do not match in words, of each kind the first ones."""

    def shown(kind: str, key: str) -> str:
        if kind != "wrongly shaped":
            return key
        return f"{key} {list(state[key].shape)} instead of {list(expected[key].shape)}"

    parts = (
        f"{len(keys)} {kind}: {first_keys([shown(kind, key) for key in keys[:9]], len(keys))}"
        for kind, keys in problems.items()
    )
    return "; ".join(parts)


def first_keys(keys: list[str], count: int | None = None, limit: int = 8) -> str:
    """Return the first keys with commas between them, and how many more there are.

    Args:
        keys: All keys, or the first ones.
        count: Of all keys, if that is not the length of `keys`.
        limit: Keys to show.
    """
    count = len(keys) if count is None else count
    return ", ".join(keys[:limit]) + (f" and {count - limit} more" if count > limit else "")


def misfit(attempts: list[Attempt], network: "torch.nn.Module", source: str, prefix: str) -> MisfitError:
    """Return the error for a checkpoint of which nothing fits, with the key of the spec that would help.

    Args:
        attempts: What was tried.
        network: The network, with any weights.
        source: Names the file in messages.
        prefix: weights.prefix of the spec, "" if it has none.
    """
    expected = network.state_dict()
    found = fitting_prefixes(attempts, expected)
    if len(found) > 1:
        return several_prefixes(source, [f"{prefix}{each}" for each in found], next(iter(found.values())).state)
    for each, attempt in found.items():
        count = sum(key.startswith(each) for key in attempt.state)
        return MisfitError(
            f"{source} fits the architecture without a prefix, which {count} of its {len(attempt.state)} tensors have: "
            f'set weights.prefix = "{prefix}{each}"',
            attempt.state,
            expected,
        )
    nearest = min(attempts, key=lambda attempt: _distance(attempt.state, expected))
    without = [found for found in (_without_prefix(attempt, expected) for attempt in attempts) if found]
    better = min(without, key=lambda pair: _distance(pair[1].state, expected), default=None)
    if better and _distance(better[1].state, expected) < _distance(nearest.state, expected):
        message = _mismatch(better[1], network, source)
        return MisfitError(f'{message}; and set weights.prefix = "{prefix}{better[0]}"', better[1].state, expected)
    if prefix and not nearest.state:
        names = dict.fromkeys(
            f"{first}{dot}" for each in attempts for first, dot, _ in (key.partition(".") for key in each.left_out)
        )
        return MisfitError(
            f"{source}: expected weights, found no tensor whose name begins with weights.prefix = {prefix!r}; they "
            f"begin with {listed(names)}",
            {},
            expected,
        )
    return MisfitError(_mismatch(nearest, network, source), nearest.state, expected)


def several_prefixes(source: str, prefixes: list[str], state: Tensors) -> MisfitError:
    """Return the error for a checkpoint with several sets of weights that fit, each below a prefix of its own.

    Args:
        source: Names the file in messages.
        prefixes: Of the sets, as values of weights.prefix.
        state: One of the sets.
    """
    choices = " or ".join(f'"{prefix}"' for prefix in prefixes[:4])
    return MisfitError(
        f"{source} has {len(prefixes)} sets of weights that fit, each with a prefix: choose one, set weights.prefix = "
        f"{choices}",
        state,
        state,
    )


def fitting_prefixes(attempts: list[Attempt], expected: Tensors) -> dict[str, Attempt]:
    """Return the prefixes whose tensors fit the network without it, and the attempt that has them.

    As without prefixes, an average counts only if nothing else fits, and of several dicts timm's first choice counts.
    """
    found = [
        (prefix, attempt)
        for attempt in attempts
        for prefix, inner in _prefixes(attempt.state, expected)
        if not find_problems(inner, expected)
    ]
    found = [(prefix, attempt) for prefix, attempt in found if not is_average(attempt.name)] or found
    if found and (name := found[0][1].name) in TIMM_KEYS:
        found = [(prefix, attempt) for prefix, attempt in found if attempt.name == name]
    first: dict[str, Attempt] = {}
    for prefix, attempt in found:
        first.setdefault(prefix, attempt)
    return first


def _mismatch(attempt: Attempt, network: "torch.nn.Module", source: str) -> str:
    """Return the message for a checkpoint that does not fit, with the argument of the architecture that would help."""
    state, expected = attempt.state, network.state_dict()
    if not state:
        return f"{source}: expected weights, found no tensor"
    if reason := unusable_reason(state, expected):
        return f"{source} cannot be the weights: {reason}"
    message = (
        f"{source} does not fit the architecture: {describe_problems(find_problems(state, expected), state, expected)}"
    )
    return message + _shape_advice(state, network)


def _without_prefix(attempt: Attempt, expected: Tensors) -> tuple[str, Attempt] | None:
    """Return the first of `_prefixes`, with the attempt whose tensors are without it; None if there is no prefix."""
    found = next(_prefixes(attempt.state, expected), None)
    return found and (found[0], attempt._replace(state=found[1]))


def prefixes_in(state: Tensors, expected: Tensors) -> list[str]:
    """Return what stands before the name of the network's first tensor in a state dict, "" for nothing."""
    first = next(iter(expected), "")
    prefixes = (key.removesuffix(first) for key in state if key.endswith(first))
    return [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]


def _prefixes(state: Tensors, expected: Tensors) -> Iterator[tuple[str, Tensors]]:
    """Yield each prefix of `prefixes_in` but "", and the tensors that have it without it."""
    for prefix in filter(None, prefixes_in(state, expected)):
        inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        yield prefix, inner | tied(inner, expected)


def _shape_advice(state: Tensors, network: "torch.nn.Module") -> str:
    """Return which argument of the architecture gives the network the classes and channels of the file, or ""."""
    expected, config = network.state_dict(), getattr(network, "pretrained_cfg", {})
    problems = find_problems(state, expected)
    heads, stems = ({*([names] if isinstance(names, str) else names or ())} for names in
                    (config.get("classifier"), config.get("first_conv")))  # fmt: skip
    head_keys = {f"{name}.{kind}" for name in heads for kind in ("weight", "bias")} & expected.keys()
    stem_keys = {f"{name}.weight" for name in stems} & expected.keys()
    misshapen = {*problems.get("wrongly shaped", ())}
    if head_keys and problems == {"missing": sorted(head_keys)}:
        return "; the file has no classifier: set architecture.arguments.num_classes = 0"
    if problems.keys() != {"wrongly shaped"}:
        return ""
    if config and misshapen <= head_keys | stem_keys:
        keys = []
        for argument, names, axis in (("num_classes", head_keys, 0), ("in_chans", stem_keys, 1)):
            found, own = ({_length(each[key], axis) for key in misshapen & names} for each in (state, expected))
            if len(found) == 1 and None not in found and found != own:
                keys.append(f"architecture.arguments.{argument} = {found.pop()}")
        return f"; set {' and '.join(keys)}" if keys else ""
    layers = {key.rpartition(".")[0] for key in misshapen}
    counts = {(_length(state[key], 0), _length(expected[key], 0)) for key in misshapen}
    if not config and len(layers) == len(counts) == 1 and None not in (counts_of_layer := counts.pop()):
        outputs, expected_outputs = counts_of_layer
        return (
            f"; {layers.pop()} of the file has {outputs} outputs, not {expected_outputs}: set architecture.arguments "
            "accordingly"
        )
    return ""


def _length(tensor: "torch.Tensor", axis: int) -> int | None:
    """Return the length of a dimension, None if the tensor does not have it."""
    return int(tensor.shape[axis]) if tensor.ndim > axis else None
