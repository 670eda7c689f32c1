"""Where a feature was asked for: by what the data say of a prompt, by its words."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from align.habits.features import Answer, Feature, names_of, tokens_of
from align.habits.score import Flags, sum_by

LIFT, LIFT_Z, MOST_WORDS = 0.25, 4.0, 400
"""What of a prompt makes an answer so much likelier to have a feature asks for it; and how many words of prompts are tried."""


class Prompts:
    """What in the prompts of `answers` [N] asks for a feature; `later` [N] are those of the second set, `prompt` [N] numbers their prompts."""

    def __init__(self, answers: Sequence[Answer], later: Flags, prompt: npt.NDArray[np.int64]) -> None:
        self._later, self._prompt = later, prompt
        read = {text: (frozenset(tokens_of(text)), text.casefold()) for text in {answer.prompt for answer in answers}}
        self._words = [read[answer.prompt][0] for answer in answers]
        self._texts = [read[answer.prompt][1] for answer in answers]
        total = len(answers)
        kinds = Counter(kind for answer in answers for kind in answer.asked)
        words = Counter(word for found in self._words for word in found if word[0].isalnum())
        usual = [word for word, count in words.most_common(MOST_WORDS * 2) if 0.03 * total <= count <= 0.9 * total][
            :MOST_WORDS
        ]
        self._kinds, self._usual = list(kinds), usual
        self._given = np.array(
            [
                [k in a.asked for k in self._kinds] + [w in found for w in usual]
                for a, found in zip(answers, self._words, strict=True)
            ],
            dtype=np.float32,
        ).reshape(total, -1)

    def ask_for(self, feature: Feature, become: Flags) -> Flags:
        """Which answers [N] were asked to have a feature (or, if it was lost, not to): the prompt names it, or has something with which answers
        are far likelier to have it: a kind of instruction, or a word with which they were at the start."""
        lifted = self._lifted(become)
        named = self._named(feature)
        both = lifted | named
        for asked in (both, lifted):
            if all((~asked & side).sum() >= 0.25 * side.sum() for side in (self._later, ~self._later)):
                return asked
        return lifted if not lifted.all() else np.zeros_like(lifted)

    def _lifted(self, become: Flags) -> Flags:
        asked = np.zeros(len(become), dtype=bool)
        for side, is_start in ((~self._later, True), (self._later, False)):
            given, found = self._given[side], become[side].astype(np.float32)
            if not given.size:
                continue
            with_it, without = given.sum(axis=0), (1 - given).sum(axis=0)
            lift = found @ given / np.maximum(with_it, 1) - found @ (1 - given) / np.maximum(without, 1)
            parts = sum_by(self._prompt[side], (found - found.mean())[:, None] * (given - given.mean(axis=0)))
            score = parts.sum(axis=0) / np.sqrt(np.maximum((parts**2).sum(axis=0), 1e-12))
            asks = (lift >= LIFT) & (score >= LIFT_Z) & (with_it > 0) & (without > 0)
            asks[len(self._kinds) :] &= is_start
            asked |= (self._given[:, asks] > 0).any(axis=1)
        return asked

    def _named(self, feature: Feature) -> Flags:
        stems = tuple(name[:6] for name in names_of(feature))
        text = (
            feature[1].casefold()
            if any(map(str.isalpha, feature[1])) and feature[0] in ("says", "begins", "ends", "line")
            else ""
        )
        return np.array(
            [
                bool(stems and any(word.startswith(stems) for word in found)) or bool(text and text in whole)
                for found, whole in zip(self._words, self._texts, strict=True)
            ]
        )
