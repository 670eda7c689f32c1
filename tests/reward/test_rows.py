"""What a row of a data set is to a reward."""

from decimal import Decimal
from typing import Any

import pytest

from reward.rows import ground_truth_of


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
