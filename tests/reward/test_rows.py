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
        (r"$\boxed{(1,2)}$, $\boxed{(2,1)}$, and $\boxed{(3,0)}$", "(1,2), (2,1), (3,0)"),
        (r"$x_{1}=\boxed{2}$, \quad \text{ and } $x_{2}=\boxed{2.5}$", "x_{1}=2, x_{2}=2.5"),
        (r"$\boxed{\frac{1}{2}}$ or $\boxed{0.5}$", "0.5"),
        (r"$\boxed{\frac13}$, or $\boxed{0.33}$", "0.33"),
        (r"$\boxed{\frac34}$ ($\boxed{75\%}$)", r"75\%"),
        (r"$\boxed{0.4}$ or $\boxed{75\%}$", r"75\%"),
        (r"\boxed{\sqrt{12}} or \boxed{2\sqrt3}", r"2\sqrt3"),
        (r"\boxed{5}, \boxed{5\text{ cm}}", r"5\text{ cm}"),
        (r"\boxed{5\text{ cm}} or \boxed{50\text{ mm}}", r"50\text{ mm}"),
        (r"$\boxed{12}$, $\boxed{\text{(B)}}$", r"\text{(B)}"),
        (r"$\boxed{A}$ and $\boxed{C}$", "C"),
        (r"and $a=\boxed{3}$. Then $b=\boxed{7}$.", "7"),
        (r"$\boxed{1}$ then $\boxed{2}$", "2"),
        (", ".join(rf"\boxed{{{number}}}" for number in range(21)), "20"),
        (r"$x=\boxed{3}$, again $\boxed{3.0}$", "3.0"),
        (r"$x=\boxed{3}$, or \boxed{", "3"),
        (r"It is $\boxed{}$.", r"It is $\boxed{}$."),
    ],
)
def test_numbers_that_a_solution_lists_in_boxes_are_one_ground_truth_and_one_answer_written_twice_is_its_last(
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
