"""Which tensors of a network's answer are served, whatever containers it has; and answers that cannot be served."""

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch

from build_tasks.errors import UserError
from build_tasks.formats.network_answer import select_tensors

A, B, C = (torch.full((2, 3), float(value)) for value in range(3))


@dataclasses.dataclass
class Answer:
    scores: Any
    hidden: Any = None


class Boxes(NamedTuple):
    corners: torch.Tensor
    areas: torch.Tensor


def select(answer: Any, *outputs: tuple[str, str | int | None], batch_dimension: int = 0) -> dict[str, torch.Tensor]:
    """Return what is served. Each output is its name and its key."""
    tables = [
        {"name": name, "key": key, "classes": False, "labels": False, "batch_dimension": batch_dimension}
        for name, key in outputs
    ]
    interface: Any = {"outputs": tables}
    names, served = select_tensors(answer, interface)
    return dict(zip(names, [served] if isinstance(served, torch.Tensor) else served, strict=True))


CONTAINERS: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "a tensor": (A, {"OUTPUT__0": A}),
    "a tuple": ((A, B), {"OUTPUT__0": A, "OUTPUT__1": B}),
    "a list": ([A, B], {"OUTPUT__0": A, "OUTPUT__1": B}),
    "nested tuples": ((A, (B, [C])), {"OUTPUT__0": A, "OUTPUT__1": B, "OUTPUT__2": C}),
    "a tuple with None": ((A, None, B), {"OUTPUT__0": A, "OUTPUT__1": B}),
    "a dict": ({"logits": A, "pooled": B}, {"logits": A, "pooled": B}),
    "an ordered dict": (collections.OrderedDict(out=A, aux=B), {"out": A, "aux": B}),
    "a dict of dicts": ({"encoder": {"last": A}, "logits": B}, {"encoder.last": A, "logits": B}),
    "a dict with a list": ({"feats": [A, B]}, {"feats.0": A, "feats.1": B}),
    "a dataclass": (Answer(A, B), {"scores": A, "hidden": B}),
    "a dataclass with None": (Answer(A), {"scores": A}),
    "a dataclass in a tuple": ((Answer(A), B), {"0.scores": A, "1": B}),
    "a named tuple": (Boxes(A, B), {"corners": A, "areas": B}),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_all_tensors_of_an_answer_are_served_by_the_names_that_they_have(name: str) -> None:
    answer, expected = CONTAINERS[name]
    found = select(answer)
    assert [*found] == [*expected]
    assert all(found[key] is tensor for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("answer", "key", "tensor"),
    [
        ((A, (B, [C])), "1.1.0", C),
        ((A, (B, [C])), 2, C),
        ([A, B], 1, B),
        ({"encoder": Answer(A, (B,))}, "encoder.hidden.0", B),
        ({"logits": A, "cache": object()}, "logits", A),
        ({7: A, 8: B}, "8", B),
    ],
    ids=["a place", "an index", "in a list", "in a dataclass", "beside what is no tensor", "a number as key"],
)
def test_a_key_finds_a_tensor_in_any_container(answer: Any, key: str | int, tensor: torch.Tensor) -> None:
    assert select(answer, ("y", key))["y"] is tensor


def test_an_output_has_its_batch_first() -> None:
    assert select([A], ("y", 0), batch_dimension=1)["y"].shape == (3, 2)
    with pytest.raises(UserError) as error:
        select([A], ("y", 0), batch_dimension=2)
    expected = "expected at most 1, since the network answers with the shape [2, 3], found 2"
    assert str(error.value) == f"outputs[0].batch_dimension: {expected}"


SAME = "outputs[1].key: expected another tensor of the answer than that of outputs[0], found {!r} again"
WRONG: list[Any] = [
    ((A, B), [("x", 1), ("y", "1")], SAME.format("1")),
    ((A, B), [("x", 1), ("y", None)], SAME.format("1")),
    ({"a": A}, [("a", None), ("b", 0)], SAME.format("a")),
    ({"a": {"b": A}, "a.b": B}, [], "the network answers with two tensors called 'a.b'; give them other keys"),
    ({1: A, "1": B}, [], "the network answers with two tensors called '1'; give them other keys"),
    ({"a b": A, "a_b": B}, [], "the network answers with a b, a_b, of which two would have one name; name them in "),
    ({"logits": A}, [("x", "logit")], "outputs[0].key: expected one of logits, which the network answers with, found "),
    ((A,), [("x", 1)], "outputs[0].key: expected one of 0, which the network answers with, found 1"),
    ({"y": A, "cache": object()}, [], "the network answers with dict, in which cache is object; Triton needs tensors"),
    ((A, 3), [], "the network answers with tuple of Tensor, int, in which 1 is int; Triton needs tensors"),
    (None, [], "the network answers with NoneType, in which nothing is a tensor"),
    ([], [], "the network answers with list, in which nothing is a tensor"),
]


@pytest.mark.parametrize(("answer", "outputs", "line"), WRONG)
def test_what_cannot_be_served_ends_with_one_line(answer: Any, outputs: list[Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        select(answer, *outputs)
    assert str(error.value).startswith(line)
