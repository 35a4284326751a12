"""From the content of a checkpoint to the state dict of a network.

    checkpoint ─► every dict of tensors in it ─► without wrappers and bookkeeping ─► fits? ─► state dict
                                                     └─► timm's checkpoint_filter_fn ─► fits? ─┘

What was chosen, dropped or converted is said on the line of the stage. If nothing fits, the message says what is
missing, and which key of the spec would help.
"""

import copy
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, listed
from build_tasks.formats.checkpoint_cleaning import Attempt, cleaned, is_average, tied
from build_tasks.formats.checkpoints import TIMM_KEYS, Checkpoint, unusable_reason

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
        UserError: If nothing in the checkpoint fits the network, or if several dicts do.
    """
    expected = network.state_dict()
    attempts = [cleaned(name, tensors, expected, prefix) for name, tensors in dicts_of_tensors(checkpoint)]
    fitting = [attempt for attempt in attempts if not _problems(attempt.state, expected)]
    if not attempts:
        raise UserError(
            f"{source}: expected weights, found no tensor with a name, at most {MAX_DEPTH} dicts deep; its keys are "
            f"{listed(map(str, checkpoint)) or 'none'}"
        )
    if not fitting:
        converted = [*_converted(attempts, network, expected), *_from_jax(path, network)]
        fitting = [attempt for attempt in converted if not _problems(attempt.state, expected)]
        attempts = [*converted, *attempts]
    if not fitting:
        for attempt in attempts:
            if found := _fitting_prefix(attempt.state, expected):
                count = sum(key.startswith(found) for key in attempt.state)
                raise UserError(
                    f"{source} fits the architecture without a prefix, which {count} of its {len(attempt.state)} "
                    f'tensors have: set weights.prefix = "{prefix or ""}{found}"'
                )
        nearest = min(attempts, key=lambda a: _distance(a.state, expected))
        without = [found for found in (_without_prefix(attempt, expected) for attempt in attempts) if found]
        better = min(without, key=lambda pair: _distance(pair[1].state, expected), default=None)
        if better and _distance(better[1].state, expected) < _distance(nearest.state, expected):
            message = _mismatch(better[1], network, source, better[0])
            raise UserError(f'{message}; and set weights.prefix = "{prefix or ""}{better[0]}"')
        raise UserError(_mismatch(nearest, network, source, prefix))
    chosen = _choose(fitting, source, ema)
    return chosen.state, chosen.notes


def dicts_of_tensors(
    content: Checkpoint, name: str = "", depth: int = 0
) -> "Iterator[tuple[str, dict[str, torch.Tensor]]]":
    """Yield every dict of tensors in a checkpoint with its name, "" for the checkpoint itself."""
    import torch

    tensors = {key: value for key, value in content.items() if isinstance(key, str) and torch.is_tensor(value)}
    if tensors:
        yield name, tensors
    inner = {key: value for key, value in content.items() if isinstance(value, dict) and isinstance(key, str)}
    for key in sorted(inner, key=lambda key: TIMM_KEYS.index(key) if key in TIMM_KEYS else len(TIMM_KEYS)):
        if depth < MAX_DEPTH:
            yield from dicts_of_tensors(inner[key], f"{name}.{key}".lstrip("."), depth + 1)


def _converted(
    attempts: list[Attempt], network: "torch.nn.Module", expected: "dict[str, torch.Tensor]"
) -> Iterator[Attempt]:
    """Yield what the function makes of the attempts with which timm loads its own weights of this architecture."""
    module = sys.modules.get(type(network).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None or not type(network).__module__.startswith("timm."):
        return
    for attempt in attempts:
        try:
            state = convert(dict(attempt.state), network)
        except Exception as error:  # made for other files; the names and shapes of this one say more
            print(f"timm's checkpoint_filter_fn: {type(error).__name__}: {error}")
            continue
        state |= tied(state, expected)
        yield Attempt(attempt.name, state, {**attempt.notes, "converted": "by timm"})


def _from_jax(path: str, network: "torch.nn.Module") -> Iterator[Attempt]:
    """Yield what timm makes of a .npz file of JAX, in which authors of ViT and BiT publish their weights.

    timm leaves out what the file does not have. Those tensors stay NaN, and count as missing.
    """
    import torch

    load = getattr(copy.deepcopy(network), "load_pretrained", None)
    if load is None or not path.endswith(".npz"):
        return
    state = load.__self__.state_dict()
    with torch.no_grad():
        for tensor in state.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    try:
        load(path)
    except Exception as error:  # made for other files, as above
        print(f"timm's load_pretrained: {type(error).__name__}: {error}")
        return
    loaded = {key: tensor for key, tensor in state.items() if not tensor.isnan().all()}
    yield Attempt("", loaded, {"converted": "by timm"})


def _choose(fitting: list[Attempt], source: str, ema: bool) -> Attempt:
    """Return the attempt to use: the only one, or timm's choice. An average is taken if it is wanted, or all there is.

    The notes of the result name the average that was taken, and what else would fit.
    """
    averages = [attempt for attempt in fitting if is_average(attempt.name)]
    others = [attempt for attempt in fitting if not is_average(attempt.name)]
    if ema and not averages:
        raise UserError(f"{source}: expected averaged weights, since weights.ema = true, found none that fit")
    candidates = averages if ema or not others else others
    names = [attempt.name for attempt in candidates]
    if len(candidates) > 1 and names[0] and names[0] not in TIMM_KEYS:
        raise UserError(
            f"{source} has {len(names)} sets of weights that fit, {', '.join(names[:4])}: choose one with "
            "weights.converter"
        )
    chosen, *left = candidates
    texts = [f"{', '.join(attempt.name for attempt in left)}, which would fit too"] if left else []
    if averages and candidates is others:
        names = [attempt.name for attempt in averages]
        texts.append(f"{', '.join(names)}, an average (weights.ema = true takes it)")
    return chosen._replace(notes={**chosen.notes, "left": "; ".join(texts)}) if texts else chosen


def _problems(state: "dict[str, torch.Tensor]", expected: "dict[str, torch.Tensor]") -> dict[str, list[str]]:
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


def _distance(state: "dict[str, torch.Tensor]", expected: "dict[str, torch.Tensor]") -> int:
    return sum(map(len, _problems(state, expected).values()))


def match_keys(
    state: "dict[str, torch.Tensor]", expected: "dict[str, torch.Tensor]", source: str
) -> "dict[str, torch.Tensor]":
    """Return `state` under the keys of `expected`, in its dtypes and its order.

    Raises:
        UserError: If any key or shape does not match, or if a weight is not a finite number. The message lists them.
    """
    import torch

    if problems := _problems(state, expected):
        raise UserError(f"{source} does not fit the architecture: {_details(problems, state, expected)}")
    if reason := unusable_reason(state, expected):
        raise UserError(f"{source} cannot be the weights: {reason}")
    state = {key: tensor if tensor.layout == torch.strided else tensor.to_dense() for key, tensor in state.items()}
    matched = {key: state.get(key, tensor).to(tensor.dtype).clone().contiguous() for key, tensor in expected.items()}
    require_finite({key: tensor for key, tensor in matched.items() if _is_finite(expected[key])}, source)
    return matched


def require_finite(state: "dict[str, torch.Tensor]", source: str) -> None:
    """Raise UserError if a weight is NaN or infinity. The message names the tensors."""
    if broken := [key for key, tensor in state.items() if not _is_finite(tensor)]:
        raise UserError(f"{source} has NaN or infinity in {len(broken)} tensors: {_first_keys(broken)}; train it again")


def _is_finite(tensor: "torch.Tensor") -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _details(
    problems: dict[str, list[str]], state: "dict[str, torch.Tensor]", expected: "dict[str, torch.Tensor]"
) -> str:
    def shown(kind: str, key: str) -> str:
        if kind != "wrongly shaped":
            return key
        return f"{key} {list(state[key].shape)} instead of {list(expected[key].shape)}"

    parts = (
        f"{len(keys)} {kind}: {_first_keys([shown(kind, key) for key in keys[:9]], len(keys))}"
        for kind, keys in problems.items()
    )
    return "; ".join(parts)


def _first_keys(keys: list[str], count: int | None = None, limit: int = 8) -> str:
    count = len(keys) if count is None else count
    return ", ".join(keys[:limit]) + (f" and {count - limit} more" if count > limit else "")


def _mismatch(attempt: Attempt, network: "torch.nn.Module", source: str, prefix: str | None) -> str:
    """Return the message for a checkpoint that does not fit, with the key of the spec that would help."""
    state, expected = attempt.state, network.state_dict()
    if not state:
        begin = f" whose name begins with weights.prefix = {prefix!r}" if prefix else ""
        return f"{source}: expected weights, found no tensor{begin}"
    if reason := unusable_reason(state, expected):
        return f"{source} cannot be the weights: {reason}"
    message = f"{source} does not fit the architecture: {_details(_problems(state, expected), state, expected)}"
    return message + _shape_advice(state, network)


def _without_prefix(attempt: Attempt, expected: "dict[str, torch.Tensor]") -> tuple[str, Attempt] | None:
    """Return the first of `_prefixes`, with the attempt whose tensors are without it; None if there is no prefix."""
    found = next(_prefixes(attempt.state, expected), None)
    return found and (found[0], attempt._replace(state=found[1]))


def _fitting_prefix(state: "dict[str, torch.Tensor]", expected: "dict[str, torch.Tensor]") -> str | None:
    """Return a prefix whose tensors fit the network without it, None if there is no such prefix."""
    fitting = (prefix for prefix, inner in _prefixes(state, expected) if not _problems(inner, expected))
    return next(fitting, None)


def _prefixes(
    state: "dict[str, torch.Tensor]", expected: "dict[str, torch.Tensor]"
) -> "Iterator[tuple[str, dict[str, torch.Tensor]]]":
    """Yield each prefix before the name of the network's first tensor, and the tensors that have it without it."""
    first = next(iter(expected), "")
    for key in state:
        prefix = key.removesuffix(first)
        if prefix != key and prefix.endswith("."):
            inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            yield prefix, inner | tied(inner, expected)


def _shape_advice(state: "dict[str, torch.Tensor]", network: "torch.nn.Module") -> str:
    """Return which argument of the architecture gives the network the classes and channels of the file, or ""."""
    expected, config = network.state_dict(), getattr(network, "pretrained_cfg", {})
    problems = _problems(state, expected)
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
        arguments = {"num_classes": {_length(state[key], 0) for key in misshapen & head_keys},
                     "in_chans": {_length(state[key], 1) for key in misshapen & stem_keys}}  # fmt: skip
        keys = [
            f"architecture.arguments.{name} = {found.pop()}"
            for name, found in arguments.items()
            if len(found) == 1 and None not in found
        ]
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
