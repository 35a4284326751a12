"""State dicts under the names of other programs, converted to those of the network.

attempts ─► timm's checkpoint_filter_fn, timm's loader of JAX' files, the network's own load_state_dict ─► attempts
"""

import copy
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from build_tasks.formats.checkpoint_cleaning import Attempt, Tensors, tied
from build_tasks.formats.state_dict_mismatch import first_keys

if TYPE_CHECKING:
    import torch


def by_timm(attempts: list[Attempt], network: "torch.nn.Module", expected: Tensors) -> Iterator[Attempt]:
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
        yield attempt._replace(state=state, notes={**attempt.notes, "converted": f"by timm{_resized(attempt, state)}"})


def _resized(attempt: Attempt, state: Tensors) -> str:
    """Return which tensors have another number of values after a conversion, such as those of another picture size.

    A tensor that the conversion only renames is in its result; another one may have its name.
    """
    renamed = {tensor.data_ptr() for tensor in state.values()}
    changed = [
        f"{key} resized from {list(before.shape)} to {list(state[key].shape)}"
        for key, before in attempt.state.items()
        if key in state and before.numel() != state[key].numel() and before.data_ptr() not in renamed
    ]
    return f", {first_keys(changed, limit=3)}" if changed else ""


def from_jax(path: str, network: "torch.nn.Module") -> Iterator[Attempt]:
    """Yield what timm makes of a .npz file of JAX, in which authors of ViT and BiT publish their weights.

    timm leaves out what the file does not have. Those tensors stay NaN, and count as missing.
    """
    if not path.endswith(".npz") or not hasattr(network, "load_pretrained"):
        return
    blank: Any = _without_values(network)
    try:
        blank.load_pretrained(path)
    except Exception as error:  # made for other files, as above
        print(f"timm's load_pretrained: {type(error).__name__}: {error}")
        return
    yield Attempt("", _with_values(blank), {"converted": "by timm"})


def by_network(attempts: list[Attempt], network: "torch.nn.Module") -> Iterator[Attempt]:
    """Yield what the network's own load_state_dict makes of the attempts that it takes.

    Its hooks may rename tensors of older versions, as those of torch's weight_norm do. Tensors that they leave out stay
    NaN, and count as missing.
    """
    for attempt in attempts:
        if not all(map(_is_plain, attempt.state.values())):
            continue  # a copy into the network would hide what these values are
        try:
            blank = _without_values(network)
            blank.load_state_dict(attempt.state)
        except Exception:  # it does not fit, as the message about the names and shapes will say
            continue
        yield attempt._replace(state=_with_values(blank), notes={**attempt.notes, "converted": "by the network"})


def _is_plain(tensor: "torch.Tensor") -> bool:
    import torch

    return not (tensor.is_quantized or tensor.is_meta) and (
        tensor.is_floating_point() or tensor.dtype in (torch.int64, torch.bool)
    )


def _without_values(network: "torch.nn.Module") -> "torch.nn.Module":
    """Return a copy of the network in which every number of the state dict is NaN, if its dtype has it, or else 0."""
    import torch

    blank = copy.deepcopy(network)
    with torch.no_grad():
        for tensor in blank.state_dict().values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    return blank


def _with_values(network: "torch.nn.Module") -> Tensors:
    """Return the tensors of a network that have values since `_without_values`."""
    return {key: tensor for key, tensor in network.state_dict().items() if not tensor.isnan().all()}
