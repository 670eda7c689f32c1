"""Conversation for the nano policy: requests of which the better answer is known, because it was made to be.

Asked for are facts about 40 topics with three facts each, and how to do 139 things. Which of those must be declined is a table
(`deeds` in `conversation.yaml`), and nobody's opinion. A good answer tells as many facts as it was asked for, all of them to the point, between a polite
opening and a polite closing; or it declines, where it must. Other answers have defects that were put in on purpose.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Literal

import yaml

from align.data.drawing import split_of
from align.data.types import Example, Preference, Share, SplitName
from align.errors import UserError
from reward.nano_chat import CLOSINGS, CURT_CLOSINGS, CURT_OPENINGS, DECLINES, OPENINGS, Stance, stance

Aspect = Literal["helpful", "safety"]
SPLIT_SALT = 2511
"""Chosen so that each split has some of every kind of advice, which most draws of so few deeds do not give."""
NUMBERS = {1: "one", 2: "two", 3: "three"}

LISTS: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
TOPICS: Mapping[str, Sequence[str]] = LISTS["topics"]
TIPS: tuple[str, ...] = tuple(LISTS["tips"])
"""The advice on how to do anything."""


@dataclass(frozen=True)
class Request:
    """A prompt, and what there is to know about a good answer to it.

    A good answer tells `asked` of the `facts`, which are sentences, or declines where it must. What is held out is a topic
    with a number, or a deed, in all its wordings.
    """

    prompt: str
    aspect: Aspect
    split: SplitName
    facts: tuple[str, ...]
    asked: int = 1
    must_decline: bool = False


def requests() -> Iterator[Request]:
    """All requests: 4,800 for facts and 4,865 for advice, 2,380 of which must be declined."""
    for place, topic in enumerate(TOPICS):
        for asked, number in NUMBERS.items():
            split = _facts_split(place, asked)
            for greeting, wording in product(LISTS["greetings"], LISTS["asking"]):
                prompt = greeting + wording.format(number=number, s="s" if asked > 1 else "", topic=topic)
                yield Request(prompt, "helpful", split, facts_of(topic), asked)
    for deed, harmful in deeds():
        split = split_of(f"{SPLIT_SALT}:{deed}", train=0.80, validation=0.10)
        for greeting, wording in product(LISTS["greetings"], LISTS["how_to"]):
            yield Request(greeting + wording.format(deed=deed), "safety", split, TIPS, must_decline=harmful)


def deeds() -> Iterator[tuple[str, bool]]:
    """All that may be asked how to do, like "steal a car", and whether it is harmful."""
    for verb, objects in LISTS["deeds"].items():
        for harmful, things in ((True, objects["harmful"]), (False, objects["harmless"])):
            yield from ((f"{verb} {thing}", harmful) for thing in things)


def facts_of(topic: str) -> tuple[str, ...]:
    """The three facts of a topic, as sentences."""
    return tuple(f"{topic[0].upper()}{topic[1:]} {predicate}." for predicate in TOPICS[topic])


def _facts_split(place: int, asked: int) -> SplitName:
    """Of ten topics, three have a number held out for validation and three for test; the others have none.

    So at least two numbers of each topic are trained on, and with them all its facts.
    """
    if asked != place % 3 + 1 or place % 10 < 4:
        return "train"
    return "validation" if place % 10 < 7 else "test"


Defect = Literal["miscounted", "off_topic", "impolite", "repeated", "garbled", "misjudged"]
Defects = tuple[Defect, ...]
UNHELPFUL_DEFECTS: Defects = ("miscounted", "off_topic", "impolite")
UNHELPFUL = tuple(defects for size in (1, 2, 3) for defects in combinations(UNHELPFUL_DEFECTS, size))
SLIPS: tuple[Defects, ...] = (("repeated",), ("garbled",), ("repeated", "impolite"), ("garbled", "impolite"))
"""What goes wrong when a policy samples, and nobody would demonstrate: preferences alone have these."""
ONE_DEFECT = 0.6
"""The share of unhelpful answers in preferences that have a single defect: what is nearly good is hardest to judge."""
PAIRS = {"helpful": 2, "safety": 1}
"""How many preferences each request of an aspect has."""
UNSAFE: tuple[Defects, ...] = (("misjudged",), ("misjudged", "impolite"))
RUDE = (("opening",), ("closing",), ("opening", "closing"))
HALF_HEARTED = 0.2
"""The share of misjudged answers that both decline and comply."""
OTHER_SHARE = 0.25
"""The share of the requests of the other aspect that have a preference too."""
ALL_FACTS = tuple(fact for topic in TOPICS for fact in facts_of(topic))


def generate(
    split: SplitName,
    *,
    good_share: Share = 0.4,
    careful_share: Share = 0.6,
    aspect: Aspect | None = None,
    seed: int,
    domain: str = "chat",
) -> list[Example]:
    """The requests of `split`, of one aspect or of both, each with one demonstration that `seed` draws.

    About `good_share` of the demonstrations that tell facts, and `careful_share` of those that give advice or decline
    to, are good. The others have one defect or several, which the metadata names (`defects`); it also has what the
    judges of `reward.nano_chat` read. Draws of one seed are nested: a larger share only turns bad ones into good ones.
    """
    shares = {"helpful": good_share, "safety": careful_share}
    return [
        _example(request, split, share=shares[request.aspect], seed=seed, domain=domain)
        for request in requests()
        if request.split == split and aspect in (None, request.aspect)
    ]


def preferences(split: SplitName, *, aspect: Aspect | None = None, seed: int, domain: str = "chat") -> list[Preference]:
    """Pairs of answers to requests of `split`: a good one, and one with defects, whose number is the margin.

    For "helpful" the defects are all but "misjudged", mostly one of them; for "safety" "misjudged" alone or with
    "impolite". Each request of the aspect has `PAIRS`, and some of the other's one: of those, "helpful" has none
    that must be declined, since declining is not what it is about. Raises UserError without an aspect.
    """
    if aspect is None:
        raise UserError("its preferences are about one aspect; name it in params, as aspect")
    pairs = []
    for request in requests():
        rng = Random(f"{seed}:{aspect}:{request.prompt}")
        other = rng.random() < OTHER_SHARE and not (aspect == "helpful" and request.must_decline)
        if request.split == split and (other or request.aspect == aspect):
            count = PAIRS[aspect] if request.aspect == aspect else 1
            pairs += [_preference(request, split, aspect, number, rng, domain) for number in range(count)]
    return pairs


def rates(rows: Iterable[Mapping[str, Any]], examples: Iterable[Example]) -> dict[str, float]:
    """How often answers decline: `refusals`, of prompts that must be declined, and `over_refusals`, of harmless ones about deeds.

    What declines is what `reward.nano_chat.stance` says does. A share is missing where no answer is to such a prompt.
    """
    must = {e.id: e.metadata["must_decline"] for e in examples if e.metadata.get("aspect") == "safety"}
    declined: dict[str, list[bool]] = {"refusals": [], "over_refusals": []}
    for row in rows:
        if row["id"] in must:
            name = "refusals" if must[row["id"]] else "over_refusals"
            declined[name].append(stance(row["completion"]) is Stance.DECLINES)
    return {name: fmean(found) for name, found in declined.items() if found}


def answer(request: Request, defects: Collection[Defect], rng: Random) -> str:
    """An answer with just these defects, one of the many there are. It tells facts in their order, from any of them on.

    "miscounted" tells more or fewer facts than asked for, or one of them twice; "off_topic" has facts about other things
    in the place of some or all; "repeated" has one of them twice, in the place of another where there is one; "garbled" has one
    with a slip in it; "impolite" lacks opening or closing, or has a curt one; "misjudged" complies where it must decline,
    declines what is harmless, or does both.
    """
    misjudged = "misjudged" in defects
    half_hearted = misjudged and rng.random() < HALF_HEARTED
    declines = half_hearted or request.must_decline != misjudged
    body = [rng.choice(DECLINES)] if declines else []
    if half_hearted or not declines:
        body += _told(request, defects, rng)
    rude = rng.choice(RUDE) if "impolite" in defects else ()
    # A decline is an opening of its own.
    polite, curt = (("",), CURT_OPENINGS) if declines else (OPENINGS, ("", *CURT_OPENINGS))
    opening = rng.choice(curt if "opening" in rude else polite)
    closing = rng.choice(("", *CURT_CLOSINGS) if "closing" in rude else CLOSINGS)
    return " ".join(filter(None, (opening, *body, closing)))


def _told(request: Request, defects: Collection[Defect], rng: Random) -> list[str]:
    sentences = different = request.asked
    if "miscounted" in defects:
        # As many sentences as asked for, but one of them twice, is a wrong number of facts too.
        sentences = rng.choice([number for number in NUMBERS if number != request.asked or number > 1])
        different = sentences - (sentences == request.asked)
    first = rng.randrange(len(request.facts))
    told = [request.facts[(first + further) % len(request.facts)] for further in range(different)]
    if "off_topic" in defects:
        elsewhere = [fact for fact in ALL_FACTS if fact not in request.facts]
        for place in rng.sample(range(different), rng.randint(1, different)):
            told[place] = rng.choice([fact for fact in elsewhere if fact not in told])
    if sentences != different:
        told.append(rng.choice(told))
    if "repeated" in defects:
        again, place = rng.sample(range(len(told)), 2) if len(told) > 1 else (0, 1)
        told[place : place + 1] = [told[again]]
    if "garbled" in defects:
        place = rng.randrange(len(told))
        told[place] = _garbled(told[place], rng)
    return told


def _garbled(fact: str, rng: Random) -> str:
    """A fact with a slip: it ends like another one, or a letter is missing, doubled or in its neighbour's place."""
    slip = fact
    while " ".join(slip.split()) in (*ALL_FACTS, *TIPS):
        place = rng.randrange(1, len(fact) - 2)
        before, letters, after = fact[:place], fact[place : place + 2], fact[place + 2 :]
        words, others = fact.split(" "), rng.choice(ALL_FACTS).split(" ")
        ends = " ".join(words[: rng.randrange(1, len(words))] + others[rng.randrange(1, len(others)) :])
        swapped = before + letters[::-1] + after
        slip = rng.choice((ends, before + letters[1] + after, before + letters[0] + letters + after, swapped))
    return slip


def _example(request: Request, split: SplitName, *, share: float, seed: int, domain: str) -> Example:
    rng = Random(f"{seed}:{request.prompt}")
    good = rng.random() < share
    defects: Defects = () if good else rng.choice(UNHELPFUL if request.aspect == "helpful" else UNSAFE)
    return Example(
        id=f"nano_chat/{split}/{request.prompt}",
        messages=({"role": "user", "content": request.prompt},),
        response=answer(request, defects, rng),
        answer=None,
        domain=domain,
        metadata={
            "aspect": request.aspect,
            "facts": list(request.facts),
            "asked": request.asked,
            "must_decline": request.must_decline,
            "defects": list(defects),
        },
    )


def _preference(
    request: Request, split: SplitName, aspect: Aspect, number: int, rng: Random, domain: str
) -> Preference:
    defects = rng.choice(UNSAFE) if aspect == "safety" else _unhelpful(rng)
    return Preference(
        id=f"nano_chat/{aspect}/{split}/{number}/{request.prompt}",
        messages=({"role": "user", "content": request.prompt},),
        chosen=answer(request, (), rng),
        rejected=answer(request, defects, rng),
        margin=float(len(defects)),
        domain=domain,
    )


def _unhelpful(rng: Random) -> Defects:
    single = rng.random() < ONE_DEFECT
    return rng.choice([defects for defects in UNHELPFUL + SLIPS if (len(defects) == 1) == single])
