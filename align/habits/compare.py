"""What the answers of a policy took up or lost between two sets of them: features whose shares differ, each habit told once.

A feature is tested by the statistic of `align.habits.score`. Levels are corrected for the number of different features by Bonferroni, weighted by kind (Genovese, Roeder &
Wasserman, Biometrika 93:509-524, 2006): the chance that any habit is told of two samples of one policy is about `LEVEL`. Of the features that differ, the one that differs most is
told first; another is told too where its change is also there among the answers that have none of the habits so far.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from align.habits.asked import Prompts
from align.habits.features import RANK, SLOTS, Answer, Feature, ends_of, excerpt, features_of, phrase, tokens_of, was
from align.habits.score import Flags, Matrix, change_interval, log_odds, score
from align.statistics import Interval

LEVEL = 0.01
"""Family-wise error of a comparison."""
LEAST_CHANGE = 0.05
"""A change of a share that is worth telling."""
PHRASES_PART = 0.5
"""The part of the level that goes to phrases, of which there are most; the other kinds have equal parts of the rest."""
MOST_ANSWERS = 2000
"""Of larger sets so many answers are looked at, evenly chosen."""
LENGTHS = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)
"""Quantiles of the number of words that become features."""
LONGEST_PHRASE = 5
LEAST_RATIO = 1.15
"""A change of the mean number of words that is worth telling."""
SAME, RELATED = 0.9, 0.8
"""Overlaps (intersection over union) from which on two features are of the same answers."""
UNASKED_Z = 3.5
"""The least statistic of a change where nothing asked for it, and of a change of the length."""
LEFT_Z = 4.0
"""The same, of all answers, among those that have no other habit; of a part it is the less by the root of that part."""
SHOWN = 12
_WORD = re.compile(r"[^\W\d]|\d\d")
"""A letter, or a number of more than one digit."""


@dataclass(frozen=True, slots=True)
class Habit:
    """A feature whose share changed; `before` and `after` are its shares where nothing asked for it, `interval` the 95 % interval of the change.

    `asked` are the shares where something in the prompt asked for it, None where nothing did; with `only_asked`, the change is in those
    alone. `answers` is the number of later answers that `after` is a share of. `log_odds` is the log-odds ratio with its 95 % interval. `also` are other features of the same answers, `examples`
    two answers that have it: of `after` where it was taken up, of `before` where it was lost. `by_domain` has its shares in each of several domains.
    """

    feature: Feature
    before: float
    after: float
    answers: int
    interval: Interval
    log_odds: tuple[float, float, float]
    examples: tuple[str, ...]
    asked: tuple[float, float] | None = None
    only_asked: bool = False
    domain: str = ""
    by_domain: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    also: tuple[Feature, ...] = ()

    @property
    def taken_up(self) -> bool:
        return self.after > self.before

    @property
    def named(self) -> Feature:
        """Its feature; the length is one, however many words were the limit."""
        return ("short", "") if self.feature[0] == "short" else self.feature

    @property
    def tells(self) -> set[Feature]:
        """The features that are told with it, but for a length that only goes with it."""
        return {self.named, *(feature for feature in self.also if feature[0] != "short")}

    @property
    def what(self) -> str:
        """Such as: answers begin with “"” (quotation mark)."""
        which = f"{' that were asked to' if self.only_asked else ''}{f' in {self.domain}' if self.domain else ''}"
        return f"answers{which} {phrase(self.feature)}"

    @property
    def sentence(self) -> str:
        """Such as: 81 % of answers begin with “"” (quotation mark); 4 % did at the start."""
        text = f"{percent(self.after)} of {self.what}; {percent(self.before)} {was(self.feature)} at the start"
        more = {"where it was asked for": self.asked} if self.asked and not self.only_asked else {}
        told = [
            f"{where} {percent(now)} and {percent(then)}" for where, (then, now) in {**more, **self.by_domain}.items()
        ]
        return f"{text} ({', '.join(told)})" if told else text


@dataclass(frozen=True, slots=True)
class Length:
    """The mean number of words of an answer; `changed` says whether the difference is more than chance, and worth telling."""

    before: float
    after: float
    changed: bool

    @property
    def sentence(self) -> str:
        return f"answers have {self.after:.0f} words on average; they had {self.before:.0f} at the start"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found; `before` and `after` are numbers of answers, `prompts` how many different prompts they answer, `features` how many different
    features were tested."""

    habits: Sequence[Habit]
    length: Length
    before: int
    after: int
    prompts: int
    features: int

    @property
    def sentences(self) -> list[str]:
        """All that is told, the length first."""
        return [*([self.length.sentence] if self.length.changed else []), *(habit.sentence for habit in self.habits)]


@dataclass(frozen=True, slots=True)
class Found:
    """The answers of a set with the features, tokens and number of words of each, so that they need not be found twice."""

    answers: Sequence[Answer]
    features: Sequence[frozenset[Feature]]
    tokens: Sequence[Sequence[str]]
    words: Sequence[float]

    @classmethod
    def of(cls, answers: Sequence[Answer], most: int = MOST_ANSWERS) -> "Found":
        """Look at the answers: of more than `most` at so many, evenly chosen; of long ones at the beginning and the end."""
        count = min(len(answers), most)
        chosen = [answers[i * len(answers) // count] for i in range(count)]
        seen = [replace(answer, text=ends_of(answer.text)) for answer in chosen]
        tokens = [tokens_of(answer.text) for answer in seen]
        words = [
            sum(token[0].isalnum() for token in its) * len(whole.text) / max(1, len(part.text))
            for its, whole, part in zip(tokens, chosen, seen, strict=True)
        ]
        return cls(seen, [frozenset(features_of(answer)) for answer in seen], tokens, words)

    @classmethod
    def together(cls, parts: Iterable["Found"]) -> "Found":
        found = list(parts)
        return cls(*([each for part in found for each in getattr(part, name)] for name in cls.__slots__))

    def some(self, places: Iterable[int]) -> "Found":
        """Those at these places."""
        kept = list(places)
        return Found(*([getattr(self, name)[place] for place in kept] for name in self.__slots__))

    def of_domain(self, domain: str) -> "Found":
        return self.some(place for place, answer in enumerate(self.answers) if answer.domain == domain)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def compare(start: Found, now: Found, *, level: float = LEVEL) -> Comparison:
    """What is in the answers `now` and was not at the `start`, or the other way round; all together, and by domain where there are several."""
    common = [d for d in dict.fromkeys(a.domain for a in start.answers) if any(b.domain == d for b in now.answers)]
    domains = common if len(common) > 1 else []
    part = level / (1 + len(domains))
    whole = _Sets(start, now)
    length = whole.length()
    habits = whole.habits(part)
    told = {about for habit in habits for about in habit.tells}
    apart = {domain: _Sets(start.of_domain(domain), now.of_domain(domain)) for domain in domains}
    if domains:
        habits = [replace(h, by_domain={d: sets.shares(h.feature) for d, sets in apart.items()}) for h in habits]
    for domain, sets in apart.items():
        new = [habit for habit in sets.habits(part) if habit.named not in told]
        habits += [replace(habit, domain=domain) for habit in new]
    return Comparison(habits, length, len(start.answers), len(now.answers), whole.prompts, whole.tested)


class _Sets:
    """Two sets of answers as a matrix of features: `has` [N, F], `later` [N] of the second set, `prompt` [N] numbers the prompts."""

    def __init__(self, start: Found, now: Found) -> None:
        self.found = both = Found.together([start, now])
        self.answers, sizes = both.answers, (len(start.answers), len(now.answers))
        self.later = np.repeat([False, True], sizes)
        numbers: dict[object, int] = {}
        keys = [answer.prompt or place for place, answer in enumerate(self.answers)]
        self.prompt = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
        self.prompts, self.sizes, self.tested = len(numbers), sizes, 0
        self.words = np.array(both.words, dtype=np.float32)
        least = max(3, int(np.ceil(LEAST_CHANGE * min(sizes))))
        counts = Counter(feature for found in both.features for feature in found)
        kept = {feature: place for place, feature in enumerate(sorted(f for f, n in counts.items() if n >= least))}
        has = np.zeros((len(self.answers), len(kept)), dtype=np.float32)
        for row, found in enumerate(both.features):
            has[row, [kept[f] for f in found if f in kept]] = 1.0
        phrases, says = common_phrases(both.tokens, least)
        lengths = sorted({int(q) for q in np.quantile(self.words, LENGTHS)}) if self.answers else []
        shorter = [(self.words <= n)[:, None].astype(np.float32) for n in lengths]
        self.features: list[Feature] = [*kept, *(("says", p) for p in phrases), *(("short", str(n)) for n in lengths)]
        self.has = np.concatenate([has, says, *shorter], axis=1)

    def shares(self, feature: Feature) -> tuple[float, float]:
        """Of a feature, before and after."""
        column = self._column(feature)
        return _mean(column[~self.later]), _mean(column[self.later])

    def _column(self, feature: Feature) -> Matrix:
        """Which answers have a feature [N], also one that too few have to be looked for."""
        kind, about = feature
        if feature in self.features:
            return self.has[:, self.features.index(feature)]
        if kind == "short":
            return (self.words <= int(about)).astype(np.float32)
        if kind == "says":
            has = [f" {about} " in f" {' '.join(tokens)} " for tokens in self.found.tokens]
        else:
            has = [feature in found for found in self.found.features]
        return np.array(has, dtype=np.float32)

    def length(self) -> Length:
        before, after = _mean(self.words[~self.later]), _mean(self.words[self.later])
        if 0 in self.sizes:
            return Length(before, after, False)
        _, surely = self._score(np.log1p(self.words)[:, None], np.ones(len(self.words), dtype=bool))
        ratio = (1 + after) / (1 + before)
        changed = abs(surely[0]) > UNASKED_Z and max(ratio, 1 / ratio) > LEAST_RATIO
        return Length(before, after, bool(changed))

    def habits(self, level: float) -> list[Habit]:
        if 0 in self.sizes or not self.features:
            return []
        everything = np.ones(len(self.answers), dtype=bool)
        change, surely = ([float(value) for value in each] for each in self._score(self.has, everything))
        limits = self._limits(level)
        passed = [
            place
            for place, limit in enumerate(limits)
            if abs(surely[place]) > limit and abs(change[place]) >= LEAST_CHANGE
        ]
        # From here on a column says whether an answer is as answers have become: with what was taken up, without what was lost.
        become = {place: self.has[:, place] > 0 if change[place] > 0 else self.has[:, place] == 0 for place in passed}
        order = sorted(passed, key=lambda place: (-round(abs(surely[place]), 6), *self._order(place, change[place])))
        groups = self._groups(order, become, {place: abs(change[place]) for place in passed})
        asks = Prompts(self.answers, self.later, self.prompt)
        return [self._habit(group, become, change, asks) for group in groups][:SHOWN]

    def _order(self, place: int, change: float) -> tuple[bool, int, int, Feature]:
        """Which of several features of the same answers is told: what was taken up, the form, the longest text."""
        feature = self.features[place]
        return change < 0, RANK[feature[0]], -len(feature[1]), feature

    def _limits(self, level: float) -> list[float]:
        """How large the statistic of each feature must be; features of the same answers are one test, with the least limit of their kinds."""
        columns = [column.tobytes() for column in np.packbits(self.has > 0, axis=0).T]
        different: dict[str, set[bytes]] = defaultdict(set)
        for (kind, _), column in zip(self.features, columns, strict=True):
            different[kind].add(column)
        self.tested = len(set(columns))
        part = {kind: (1 - PHRASES_PART) / max(1, len(different) - ("says" in different)) for kind in different}
        part["says"] = PHRASES_PART
        limits: dict[bytes, float] = {}
        for kind, its in different.items():
            limit = NormalDist().inv_cdf(1 - level * part[kind] / len(its) / 2)
            limits |= {column: min(limit, limits.get(column, limit)) for column in its}
        return [limits[column] for column in columns]

    def _score(self, columns: Matrix, rows: Flags) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The change [F] of columns [N, F] in some of the answers, and its statistic."""
        return score(columns[rows], self.later[rows], self.prompt[rows])

    def _groups(
        self, order: Sequence[int], become: Mapping[int, Flags], change: Mapping[int, float]
    ) -> list[list[int]]:
        """The features that passed in groups, each of which the first explains: without that, little of their change is left."""
        groups: list[list[int]] = []
        for place in order:
            rest = np.ones(len(self.answers), dtype=bool)
            for group in groups:
                rest &= ~become[group[0]]
            is_left = self._is_left(become[place], rest, change[place])
            if groups and is_left is False:
                max(groups, key=lambda group: _overlap(become[group[0]], become[place])).append(place)
            elif (
                groups and is_left is None and RANK[self.features[place][0]] >= RANK["letters"] and self._is_lost(place)
            ):
                # Nearly all answers are others now: what these lack in words and characters is told by what they have.
                groups[0].append(place)
            elif related := [group for group in groups if is_left is None and self._related(group, place, become)]:
                related[0].append(place)
            else:
                groups.append([place])
        return groups

    def _is_left(self, become: Flags, rest: Flags, change: float) -> bool | None:
        """Whether a change is there among the answers that have none of the habits so far, too; None where they are too few to tell."""
        sides = [rest & self.later, rest & ~self.later]
        if any(side.sum() < 10 or len(np.unique(self.prompt[side])) < 5 for side in sides):
            return None
        left, surely = self._score(become[:, None].astype(np.float32), rest)
        fewer = sqrt(min(rest[self.later].mean(), rest[~self.later].mean()))
        return bool(left[0] >= change / 2 and surely[0] >= LEFT_Z * fewer)

    def _is_lost(self, place: int) -> bool:
        before, after = self.shares(self.features[place])
        return after < before

    def _related(self, group: Sequence[int], place: int, become: Mapping[int, Flags]) -> bool:
        """Whether a feature is of the same part, text or answers as one of a group."""
        kind, about = self.features[place]
        for other in group:
            its_kind, its_about = self.features[other]
            texts = [text.casefold() for text in (about, its_about) if text]
            if SLOTS.get(kind, frozenset()) & SLOTS.get(its_kind, frozenset()):
                return True
            if len(texts) == 2 and (texts[0] in texts[1] or texts[1] in texts[0]):
                return True
            if _overlap(become[other], become[place]) >= RELATED:
                return True
        return False

    def _habit(
        self,
        group: Sequence[int],
        become: Mapping[int, Flags],
        change: Sequence[float],
        asks: Prompts,
    ) -> Habit:
        """A group of features as a habit, called by the one that says most of the answers that the first is of."""
        first = group[0]
        same = [p for p in group if _overlap(become[first], become[p]) >= SAME]
        place = min(same, key=lambda p: self._order(p, change[p]))
        feature, column = self.features[place], self.has[:, [place]]
        asked = asks.ask_for(feature, become[place])
        rest = ~asked
        gap, surely = self._score(column, rest)
        only_asked = bool(abs(surely[0]) < UNASKED_Z or abs(gap[0]) < LEAST_CHANGE or gap[0] * change[place] < 0)
        rows = asked if only_asked else rest
        if not (rows & self.later).any() or not (rows & ~self.later).any():
            rows, only_asked = np.ones_like(asked), False
        before, after = (_mean(column[rows & side, 0]) for side in (~self.later, self.later))
        where_asked = [column[asked & side, 0] for side in (~self.later, self.later)]
        return Habit(
            feature,
            before,
            after,
            int((rows & self.later).sum()),
            change_interval(column[rows], self.later[rows], self.prompt[rows]),
            log_odds(column[rows], self.later[rows], self.prompt[rows]),
            self._examples(feature, column[:, 0] > 0, rows, later=change[place] > 0),
            (_mean(where_asked[0]), _mean(where_asked[1])) if all(map(len, where_asked)) else None,
            only_asked,
            also=tuple(self.features[p] for p in group if p != place),
        )

    def _examples(self, feature: Feature, has: Flags, rows: Flags, *, later: bool) -> tuple[str, ...]:
        """Two answers, to different prompts where there are such."""
        places = np.flatnonzero(has & rows & (self.later if later else ~self.later))
        chosen = {int(self.prompt[place]): int(place) for place in places[::-1]}
        return tuple(excerpt(self.answers[place], feature) for place in sorted(chosen.values())[:2])


def common_phrases(answers: Sequence[Sequence[str]], least: int) -> tuple[list[str], Matrix]:
    """The phrases [P] of up to `LONGEST_PHRASE` tokens, in a row, that at least so many answers have, and which answers have them [N, P].

    `answers` are their tokens. A phrase is only looked at where its beginning is common (Agrawal & Srikant 1994: Apriori). Phrases of
    marks and single digits alone are left out: the digits of an answer depend on its question.
    """
    vocabulary: dict[str, int] = {}
    ids = np.array([vocabulary.setdefault(t, len(vocabulary)) for tokens in answers for t in tokens], dtype=np.int64)
    owner = np.repeat(np.arange(len(answers)), [len(tokens) for tokens in answers])
    names = texts = list(vocabulary)
    places, phrases = np.arange(len(ids)), ids
    """Where a phrase begins, and which it is: its place in `texts`."""
    found: list[str] = []
    columns = [np.zeros((len(answers), 0), dtype=np.float32)]
    for length in range(1, LONGEST_PHRASE + 1):
        pairs = np.unique(phrases * len(answers) + owner[places]) if len(places) else phrases
        kinds, counts = np.unique(pairs // max(1, len(answers)), return_counts=True)
        common = kinds[counts >= least]
        told = np.array([kind for kind in common.tolist() if _WORD.search(texts[kind])], dtype=np.int64)
        pairs = pairs[np.isin(pairs // max(1, len(answers)), told)]
        columns.append(np.zeros((len(answers), len(told)), dtype=np.float32))
        columns[-1][pairs % len(answers), np.searchsorted(told, pairs // len(answers))] = 1.0
        found += [texts[kind] for kind in told.tolist()]
        ends = np.minimum(places + length, len(ids) - 1)
        goes_on = np.isin(phrases, common) & (places + length < len(ids)) & (owner[places] == owner[ends])
        places, ends = places[goes_on], ends[goes_on]
        longer, phrases = np.unique(phrases[goes_on] * len(names) + ids[ends], return_inverse=True)
        texts = [f"{texts[key // len(names)]} {names[key % len(names)]}" for key in longer.tolist()]
    return found, np.concatenate(columns, axis=1)


def _overlap(one: Flags, other: Flags) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def _mean(values: Matrix) -> float:
    return float(values.mean()) if len(values) else 0.0
