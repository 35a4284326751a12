"""Answers of a network that clients of Triton cannot get."""

from typing import Any

import pytest
import torch

from build_tasks.errors import UserError
from build_tasks.formats.fp32_comparison import Comparison
from build_tasks.formats.serving_interface import forward, wrap_for_serving


class Network(torch.nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor) -> Any:
        return self.answer(x)


def interface(**keys: Any) -> Any:
    tensor = {"name": "x", "dtype": "float32", "shape": [4], "layout": None, "low": None, "high": None}
    inputs = [{**tensor, "values": None, "batch_dimension": 0}]
    empty = {"outputs": [], "dimensions": {}, "softmax": False, "top_k": None, "normalization": None}
    return {"inputs": inputs, **empty, **keys}


WRONG = {
    "output 1 is bfloat16, which Triton's clients and NumPy do not have; cast it": lambda x: (x, x.bfloat16()),
    "output 1 is complex64, which Triton's clients and NumPy do not have; cast it": lambda x: (x, torch.fft.rfft(x)),
    "output 1 is sparse_coo, which Triton's clients and NumPy do not have; cast it": lambda x: (x, x.to_sparse()),
    "the network answers with an output called x, as an input is; give it another name": lambda x: {"x": x, "y": x + 1},
}


@pytest.mark.parametrize("line", WRONG)
def test_an_answer_that_clients_cannot_get_is_one_line(line: str) -> None:
    module = wrap_for_serving(Network(WRONG[line]), interface())
    with pytest.raises(UserError) as error:
        forward(module, [torch.ones(2, 4)])
    assert str(error.value).startswith(line)


def test_a_network_that_answers_with_nan_is_not_said_to_use_random_numbers() -> None:
    tables = interface()
    module = wrap_for_serving(Network(lambda x: x.log()), tables)
    with pytest.raises(UserError, match=r"^the network answers with NaN or infinity to random "):
        Comparison(module, tables).batch({}, 2)


class Named(torch.nn.Module):
    def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> torch.Tensor:
        return x - 2 * y


def test_an_argument_that_has_only_a_name_is_passed_by_its_name() -> None:
    tables = interface()
    (x,) = tables["inputs"]
    module = wrap_for_serving(Named(), interface(inputs=[x, {**x, "name": "y"}]))
    (answer,) = forward(module, [torch.ones(2, 4), torch.ones(2, 4)])
    assert torch.equal(answer, -torch.ones(2, 4))
