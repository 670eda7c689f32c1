"""Rules on the form of a completion: its language, its repetitions, its length; and several rules as one reward.

Every value is in [0, 1], except that of `soft_overlong`, a penalty in [-1, 0]. All take linear time.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from reward.math.final_answer import boxes, normalise, without_thought
from reward.mixture import Mixture, RewardTerm
from reward.own import file as own_file
from reward.registry import register
from reward.types import RewardError, Sample, SampleReward, Score, UnusableAnswer, Verdict

SCRIPTS: Mapping[str, frozenset[str]] = {
    "ar": frozenset({"ARABIC"}),
    "de": frozenset({"LATIN"}),
    "el": frozenset({"GREEK"}),
    "en": frozenset({"LATIN"}),
    "es": frozenset({"LATIN"}),
    "fr": frozenset({"LATIN"}),
    "he": frozenset({"HEBREW"}),
    "hi": frozenset({"DEVANAGARI"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA"}),
    "ko": frozenset({"HANGUL"}),
    "ru": frozenset({"CYRILLIC"}),
    "th": frozenset({"THAI"}),
    "zh": frozenset({"CJK"}),
}
"""The scripts that each language is written in, as Unicode names its letters. Languages of one script look alike."""

_NO_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$[^$\n]*\$"
    r"|\\\[(?:[^\\]|\\(?![\[\]]))*\\\]|\\\((?:[^\\]|\\(?![()]))*\\\)"
    r"|\\[a-zA-Z]+|https?://\S+",
    re.DOTALL,
)
"""Code, formulas, commands and addresses: Latin letters in whatever language the text around them is."""
_SPACELESS = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI"})
"""Scripts that put no space between words: there, each character counts as one."""
_WORD = re.compile(r"[^\W_]+|[^\w\s]")
_ENDING = re.compile(r"\.?|\.?(?:\$\$?|\\\)|\\\])\.?")


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    return unicodedata.name(character, "").split(" ")[0].split("-")[0]


def words(text: str) -> list[str]:
    """The words and punctuation marks of a text, in small letters; in spaceless scripts, its characters."""
    found: list[str] = []
    for token in _WORD.findall(text.casefold()):
        if not token.isascii() and any(_script(character) in _SPACELESS for character in token):
            found.extend(token)
        else:
            found.append(token)
    return found


def language_share(text: str, scripts: frozenset[str]) -> float | None:
    """The share of the words, outside code and formulas, that are in one of the scripts; None if there are none.

    A word is a run of letters of one script, so that half a word in another script counts.
    """
    counts: Counter[bool] = Counter()
    before = ""
    for character in _NO_LANGUAGE.sub(" ", text):
        script = _script(character) if character.isalpha() else ""
        if script and (script != before or script in _SPACELESS):
            counts[script in scripts] += 1
        before = script
    return counts[True] / counts.total() if counts else None


def _check_language(language: str = "en") -> None:
    if language != "prompt" and language not in SCRIPTS:
        raise RewardError(f"unknown language {language!r}; known: prompt, {', '.join(SCRIPTS)}")


@register("language_consistency", ready=_check_language)
def language_consistency(sample: Sample, *, language: str = "en", least: float = 0.95) -> Score:
    """The share of the words that are in the script of the language, in [0, 1]; it passes from `least` on.

    After the language consistency reward of DeepSeek-R1 (arXiv:2501.12948, section 2.3.2), by script: a language
    is told from others that are written otherwise (see `SCRIPTS`), not English from German. "prompt" stands for
    the script that most words of the prompt are in. A completion without any word gets 0. Raises RewardError for
    an unknown language.
    """
    _check_language(language)
    scripts = _main_scripts(sample.prompt) if language == "prompt" else SCRIPTS[language]
    if not scripts:
        raise UnusableAnswer(sample.id, "its prompt has no word to tell a language by")
    share = language_share(sample.completion, scripts)
    if share is None:
        return Score(0.0, Verdict.NO_ANSWER, "no word to tell a language by")
    return Score(share, Verdict.PASS if share >= least else Verdict.WRONG, f"{share:.1%} of the words")


def _main_scripts(text: str) -> frozenset[str]:
    counts = Counter(_script(character) for character in _NO_LANGUAGE.sub(" ", text) if character.isalpha())
    if not counts:
        return frozenset()
    if counts.keys() & {"HIRAGANA", "KATAKANA"}:
        return SCRIPTS["ja"]
    return SCRIPTS["ko"] if "HANGUL" in counts else frozenset({counts.most_common(1)[0][0]})


def distinct_share(tokens: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams, in (0, 1] (distinct-n, arXiv:1510.03055, section 5.2); 1 if there is none."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


@register("repetition")
def repetition(sample: Sample, *, n: int = 8, least: float = 0.8) -> Score:
    """The share of n-grams of words that are different ones, in [0, 1]: 1 without repetition. Passes from `least` on.

    An empty completion gets 0.
    """
    tokens = words(sample.completion)
    if not tokens:
        return Score(0.0, Verdict.NO_ANSWER, "no words")
    share = distinct_share(tokens, n)
    return Score(share, Verdict.PASS if share >= least else Verdict.WRONG, f"{share:.1%} of the {n}-grams differ")


def overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """DAPO's soft overlong punishment, in [-1, 0] (arXiv:2503.14476, equation 13).

    0 up to `max_length - cache`, from there a straight line to -1 at `max_length`, and -1 beyond.
    """
    if length <= max_length - cache:
        return 0.0
    if length <= max_length:
        return ((max_length - cache) - length) / cache
    return -1.0


def _check_lengths(max_length: int, cache: int, unit: str = "tokens") -> None:
    if not 0 < cache <= max_length:
        raise RewardError(f"soft_overlong needs 0 < cache <= max_length, not cache {cache} and {max_length}")
    if unit not in ("tokens", "characters"):
        raise RewardError(f"soft_overlong counts in tokens or in characters, not in {unit!r}")


@register("soft_overlong", ready=_check_lengths)
def soft_overlong(
    sample: Sample, *, max_length: int, cache: int, unit: Literal["tokens", "characters"] = "tokens"
) -> Score:
    """A penalty in [-1, 0] that sets in `cache` before `max_length`: DAPO's, equation 13 (arXiv:2503.14476).

    In tokens, of which `sample.metadata["completion_tokens"]` is the number (UnusableAnswer where it is missing),
    or in characters. Raises RewardError unless 0 < cache <= max_length.
    """
    _check_lengths(max_length, cache, unit)
    length = _length(sample, unit)
    penalty = overlong_penalty(length, max_length, cache)
    return Score(penalty, Verdict.PASS if penalty == 0.0 else Verdict.WRONG, f"{length} {unit}")


def _length(sample: Sample, unit: str) -> int:
    if unit == "characters":
        return len(sample.completion)
    tokens = sample.metadata.get("completion_tokens")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
        raise UnusableAnswer(sample.id, "its metadata needs completion_tokens, their number")
    return tokens


@register("answer_format")
def answer_format(sample: Sample, *, right: float = 1.0, wrong: float = 0.0) -> Score:
    r"""Whether the completion ended by itself in exactly one `\boxed{}` with something in it.

    After the box only white space, a full stop and the closing delimiter of its formula may follow. What `<think>` holds does
    not count. The detail says what is missing.
    """
    problems = ["cut off at the length limit"] if sample.truncated else []
    said = without_thought(sample.completion)
    found = boxes(said)
    # The commands are counted, not the boxes, so that nested and unclosed ones count.
    written = said.count(r"\boxed")
    if not found:
        problems.append(r"an unclosed \boxed{" if written else r"no \boxed{}")
    elif written > 1:
        problems.append(rf"{written} \boxed{{}} instead of one")
    else:
        if not normalise(found[0].content):
            problems.append(r"an empty \boxed{}")
        if not _ENDING.fullmatch("".join(said[found[0].end :].split())):
            problems.append(r"text after the \boxed{}")
    if not problems:
        return Score(right, Verdict.PASS)
    return Score(wrong, Verdict.WRONG if written else Verdict.NO_ANSWER, "; ".join(problems))


class Rule(BaseModel):
    """One rule of `rule`: a registered reward, its share in the mean, and its parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    weight: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    params: dict[str, Any] = Field(default_factory=dict)
    label: str | None = None


_RULES = TypeAdapter(list[Rule])


def _check_rules(rules: list[dict[str, Any]]) -> None:
    _mixture(json.dumps(rules, sort_keys=True)).check_ready()


@register("rule", batched=True, ready=_check_rules)
def rule(samples: Sequence[Sample], *, rules: list[dict[str, Any]]) -> list[Score]:
    """The weighted mean of several rules, as one reward: the RM_rule of DeepSeek-V2's preference stage.

    (arXiv:2405.04434, section 4.2, equation 36.) `rules` is a list of `{name, weight: 1, params: {}}`, each the
    name of a registered reward, with a `label` where one is there twice. With rules in [0, 1] the value is too. It passes if all of them do; the verdict is
    otherwise that of the first that does not. Where one of them cannot judge a sample, nor can this.

    Raises RewardError for a list that is empty or malformed, and what `Mixture` raises.
    """
    mixture = _mixture(json.dumps(rules, sort_keys=True))
    if not samples:
        mixture.make_ready()
    total = sum(term.weight for term in mixture.terms)
    return [_mean(judged, total) for judged in mixture.score(samples)]


@lru_cache(maxsize=16)
def _mixture(given: str) -> Mixture:
    try:
        rules = _RULES.validate_json(given)
    except ValidationError as error:
        raise RewardError(f"rule: its rules are malformed: {error}") from error
    if any(one.name == "rule" for one in rules):
        raise RewardError("rule: a rule in a rule; write its rules into the one list")
    if own := [one.name for one in rules if own_file.split(one.name)]:
        raise RewardError(
            f"rule: {own[0]} is a function in a file, whose columns, changes and time limit only entries of `rewards` have: write it there"
        )
    return Mixture([RewardTerm(**one.model_dump()) for one in rules], infra_error_limit=1.0)


def _mean(judged: SampleReward, total: float) -> Score:
    detail = "; ".join(
        f"{name} {score.value:.3g}" + (f" ({score.detail})" if score.detail else "")
        for name, score in judged.components.items()
    )
    seconds = sum(score.seconds for score in judged.components.values())
    if judged.value is None:
        return Score(math.nan, Verdict.INFRA_ERROR, detail, seconds)
    failed = (score.verdict for score in judged.components.values() if score.verdict is not Verdict.PASS)
    return Score(judged.value / total, next(failed, Verdict.PASS), detail, seconds)
