"""The lengths of open dimensions at which artifacts are compared with the network."""

import itertools

import pytest

from build_tasks.formats.example_inputs import lengths_to_check
from build_tasks.tensors import Range


def ranges(*bounds: tuple[int, int, int]) -> dict[str, Range]:
    return {f"w{index}": {"min": a, "opt": b, "max": c} for index, (a, b, c) in enumerate(bounds)}


@pytest.mark.parametrize(
    "bounds",
    [*itertools.combinations_with_replacement([(1, 6, 6), (1, 3, 6), (2, 2, 6), (1, 9, 128)], 2), ((1, 4, 4),) * 3],
)
def test_in_one_case_words_have_different_lengths_and_none_is_1(bounds: tuple[tuple[int, int, int], ...]) -> None:
    """What is added to each other fits in all lengths that are equal or 1, also where the words may differ."""
    cases = lengths_to_check(ranges(*bounds))
    assert any(len({1, *case.values()}) == len(case) + 1 for case in cases), cases
    for case in cases:
        assert all(least <= case[f"w{index}"] <= most for index, (least, _, most) in enumerate(bounds))


def test_one_word_has_the_cases_that_it_had() -> None:
    assert lengths_to_check(ranges((1, 3, 8))) == [{"w0": 3}, {"w0": 1}, {"w0": 8}, {"w0": 5}]
    assert lengths_to_check(ranges((1, 1, 1))) == [{"w0": 1}]
    assert lengths_to_check({}) == [{}]


def test_words_of_a_single_length_have_no_other_case() -> None:
    assert lengths_to_check(ranges((2, 2, 2), (2, 2, 2))) == [{"w0": 2, "w1": 2}]
