"""Habits: what the answers of a policy took up or lost, found in two sets of them. `features` looks at an answer, `compare` at two sets."""

from align.habits.compare import Comparison, Found, Habit, compare
from align.habits.features import Answer, answer_of_row

__all__ = ["Answer", "Comparison", "Found", "Habit", "answer_of_row", "compare"]
