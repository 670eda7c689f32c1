"""What a row of a data set is to a reward."""

from decimal import Decimal
from typing import Any

import pytest

from reward.rows import ground_truth_of


@pytest.mark.parametrize(
    ("solution", "text"),
    [
        (r"So $x=\boxed{2}$ or $x=\boxed{3}$.", "2, 3"),
        (r"$\boxed{2}$ and $\boxed{3}$", "2, 3"),
        (r"$x=\boxed{2}$, $y=\boxed{3}$", "x=2, y=3"),
        (r"$x=\boxed{2}$, so that $x+1=\boxed{3}$.", "3"),
        (r"$x=\boxed{3}$, again $\boxed{3.0}$", "3.0"),
        (r"$x=\boxed{3}$, or \boxed{", "3"),
        (r"It is $\boxed{}$.", r"It is $\boxed{}$."),
    ],
)
def test_joined_boxes_of_a_solution_are_one_ground_truth_as_those_of_an_answer_are_one_answer(
    solution: str, text: str
) -> None:
    assert ground_truth_of({"solution": solution}) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("4", "4"),
        (4, "4"),
        (0, "0"),
        (1, "1"),
        (4.0, "4.0"),
        (0.00001, "0.00001"),
        (-2.5e-7, "-0.00000025"),
        (1e22, "10000000000000000000000"),
        (Decimal("2.50"), "2.50"),
        ([3, 4], "3, 4"),
        (["x", "y"], "x, y"),
        (True, None),
        (float("nan"), None),
        ("", None),
        ([], None),
        (None, None),
    ],
)
def test_a_ground_truth_is_written_as_people_write_it(value: Any, text: str | None) -> None:
    assert ground_truth_of({"answer": value}) == text
