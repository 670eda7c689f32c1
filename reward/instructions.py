"""Instructions that a program can check: what a request asks of the form of an answer, judged as IFEval judges it.

The checkers are those of IFEval (Zhou et al. 2023, arXiv:2311.07911) as lm_eval keeps them, and nltk's for the number of
sentences; both come with the extra `evaluation`. A checker sees the form alone, so an optimiser finds answers that have it
and nothing else. Therefore an answer is first looked at for being one at all (`degenerate`), and gets nothing if it is not.

A sample's metadata has `topic` (words of which an answer uses one) and `instructions`, a list of
`{"kind": "punctuation:no_comma", "args": {}, "text": "Use no commas."}` with IFEval's names and arguments.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from reward.registry import register
from reward.rules import distinct_share, words
from reward.types import RewardError, Sample, Score, UnusableAnswer, Verdict

SENTENCES = "length_constraints:exact_sentences"
"""Our one kind that IFEval does not have: exactly `num_sentences` sentences."""
JSON = "detectable_format:json_format"
LEAST_WORDS = 8
LEAST_DISTINCT = 0.75
MOST_ECHOED = 0.3
LEAST_FUNCTION_WORDS = 0.15
_GRAM = 4
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_JSON_DOCUMENT = re.compile(r"\s*(?:```\w*)?\s*[\[{]")
_STUTTER = re.compile(r"\b(\w+)(?:\W+\1\b){2}", re.IGNORECASE)
_PHRASES = ("end_phrase", "keyword", "keywords", "postscript_marker")
"""The arguments that an answer has to repeat word for word: what it says in them is not its own."""
_LITTLE = """
a about all also an and are as at be because been but by can do for from had has have he her his how i if in into is it its
just like may me more most my no not of on one or our out she so some than that the their them then there these they this
those to up us was we were what when where which while who will with would you your
"""
_FUNCTION_WORDS = frozenset(_LITTLE.split())
_ABBREVIATIONS = ("dr", "e.g", "etc", "i.e", "jr", "mr", "mrs", "ms", "p.p.s", "p.s", "prof", "sr", "st", "vs")


@dataclass(frozen=True)
class Judgement:
    """What was found in an answer: for each instruction, in order, whether it is met; and why it is degenerate, or ""."""

    kinds: tuple[str, ...]
    met: tuple[bool, ...]
    degenerate: str

    @property
    def passes(self) -> bool:
        """Every instruction is met by an answer that is one."""
        return all(self.met) and not self.degenerate


@register("instructions")
def instructions(sample: Sample, *, partial: bool = False) -> Score:
    """Whether an answer follows all checkable instructions of its request: 1 or 0; with `partial`, the share that it follows.

    It passes if it follows all. A degenerate answer (see `degenerate`) gets 0 and the verdict NO_ANSWER; one that was cut
    off at its length limit gets 0 and is WRONG, whatever it had said by then. The detail has a word on each instruction.

    Reads `topic` and `instructions` of the metadata: UnusableAnswer without them, or where a checker does not take them.
    Raises RewardError where lm_eval is not installed.
    """
    judgement = judge(sample)
    if judgement.degenerate:
        return Score(0.0, Verdict.NO_ANSWER, f"degenerate: {judgement.degenerate}; {_told(judgement)}")
    if sample.truncated:
        return Score(0.0, Verdict.WRONG, f"cut off; {_told(judgement)}")
    if judgement.passes:
        return Score(1.0, Verdict.PASS, _told(judgement))
    return Score(sum(judgement.met) / len(judgement.met) if partial else 0.0, Verdict.WRONG, _told(judgement))


def judge(sample: Sample) -> Judgement:
    """What the checkers find in a sample's completion. Raises as `instructions` does."""
    topic, asked = _asked(sample)
    text = sample.completion
    kinds = tuple(kind for kind, _ in asked)
    met = tuple(bool(text.strip()) and _follows(sample, kind, args, text) for kind, args in asked)
    return Judgement(kinds, met, degenerate(text, sample.prompt, topic, [args for _, args in asked]))


def degenerate(text: str, prompt: str, topic: Sequence[str], arguments: Sequence[Mapping[str, Any]]) -> str:
    """Why the text is no answer to the prompt, whatever its form; empty where nothing is wrong with it.

    What the instructions make it repeat (phrases and keywords) is taken away first. The rest must have at least
    `LEAST_WORDS` words, of which `LEAST_FUNCTION_WORDS` are the little words that English sentences are made of; must
    not say the same over and over (`LEAST_DISTINCT` of its 4-grams are different ones, no sentence of four words or more
    comes twice, no word three times in a row); must not be taken from the prompt (at most `MOST_ECHOED` of its 4-grams);
    and the text must use one of the words of the topic. All take linear time.
    """
    own = _without(text, arguments)
    found = [word.casefold() for word in _WORD.findall(own)]
    if len(found) < LEAST_WORDS:
        return f"{len(found)} words of its own, at least {LEAST_WORDS} are an answer"
    if sum(word in _FUNCTION_WORDS for word in found) < LEAST_FUNCTION_WORDS * len(found):
        return "a list of words, not sentences"
    if stutter := _STUTTER.search(own):
        return f"{stutter[1]!r} three times in a row"
    if distinct_share(found, _GRAM) < LEAST_DISTINCT:
        return "the same words over and over"
    said = [" ".join(words(sentence)) for sentence in sentences(own)]
    long = [sentence for sentence in said if sentence.count(" ") >= _GRAM - 1]
    if len(set(long)) < len(long):
        return "a sentence comes twice"
    grams, given = _grams(found), set(_grams([word.casefold() for word in _WORD.findall(prompt)]))
    if sum(gram in given for gram in grams) > MOST_ECHOED * len(grams):
        return "it repeats the request"
    if not any(word.startswith(_stem(key)) for key in topic for word in found):
        return f"nothing about the topic ({', '.join(topic)})"
    return ""


def sentences(text: str) -> list[str]:
    """The sentences of a text as nltk's Punkt finds them, with a few abbreviations and no trained model; lines too."""
    return [part for line in text.splitlines() for part in _punkt().tokenize(line) if _WORD.search(part)]


def _stem(word: str) -> str:
    """What "journeys" and "journey", "baking" and "baked" have in common, more or less."""
    return word.casefold()[: max(3, len(word) - 3)]


def _grams(found: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(found[start : start + _GRAM]) for start in range(len(found) - _GRAM + 1)]


def _without(text: str, arguments: Sequence[Mapping[str, Any]]) -> str:
    for args in arguments:
        for name in _PHRASES:
            given = args.get(name, ())
            for phrase in [given] if isinstance(given, str) else given:
                text = re.sub(re.escape(phrase), " ", text, flags=re.IGNORECASE)
    return text


def _asked(sample: Sample) -> tuple[list[str], list[tuple[str, Mapping[str, Any]]]]:
    topic, asked = sample.metadata.get("topic"), sample.metadata.get("instructions")
    pairs: list[tuple[str, Mapping[str, Any]]] = []
    with suppress(KeyError, TypeError, ValueError):
        pairs = [(str(one["kind"]), dict(one["args"])) for one in asked or ()]
    if not pairs or not isinstance(topic, list) or not all(isinstance(word, str) and word for word in topic):
        raise UnusableAnswer(
            sample.id, 'its metadata needs "topic", a list of words, and "instructions" with kind and args'
        )
    return topic, pairs


def _follows(sample: Sample, kind: str, args: Mapping[str, Any], text: str) -> bool:
    if kind == SENTENCES:
        return len(sentences(text)) == args["num_sentences"]
    if kind not in _checkers():
        raise UnusableAnswer(sample.id, f"no checker for instructions of kind {kind!r}")
    checker = _checkers()[kind](kind)
    try:
        checker.build_description(**args)
    except (TypeError, ValueError) as error:
        raise UnusableAnswer(sample.id, f"instruction {kind}: {error}") from error
    if kind == JSON and not _JSON_DOCUMENT.match(text):
        # IFEval's checker takes any value of JSON: a policy that puts its answers in quotation marks would have learned it.
        return False
    return bool(checker.check_following(text))


def _told(judgement: Judgement) -> str:
    return "; ".join(
        f"{kind.partition(':')[2]}: {'yes' if met else 'NO'}"
        for kind, met in zip(judgement.kinds, judgement.met, strict=True)
    )


@lru_cache(maxsize=1)
def _checkers() -> Mapping[str, Any]:
    rank = os.environ.get("LOCAL_RANK")
    # lm_eval fetches nltk's data from the network when it is imported, on the first rank only. No kind of ours needs them.
    os.environ["LOCAL_RANK"] = "1"
    try:
        import langdetect
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise RewardError(
            f"the reward `instructions` needs lm_eval with its IFEval checkers ({error}): pip install 'moe-align[evaluation]'"
        ) from error
    finally:
        if rank is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = rank
    # The language is guessed by a random walk: without a seed, the same answer is judged now so, now so.
    langdetect.DetectorFactory.seed = 0
    checkers: Mapping[str, Any] = INSTRUCTION_DICT
    return checkers


@lru_cache(maxsize=1)
def _punkt() -> Any:
    try:
        from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
    except ImportError as error:
        raise RewardError(
            f"the reward `instructions` needs nltk ({error}): pip install 'moe-align[evaluation]'"
        ) from error
    parameters = PunktParameters()
    parameters.abbrev_types = set(_ABBREVIATIONS)
    return PunktSentenceTokenizer(parameters)
