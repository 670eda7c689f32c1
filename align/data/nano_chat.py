"""Chat requests of which the better answer is known, because it was made to be: facts about things, and advice.

A good answer tells as many facts as it was asked for, all of them to the point, between a polite opening and a polite
closing; or it declines, where it must. Other answers have defects that were put in on purpose.
"""

from collections.abc import Collection
from itertools import combinations
from random import Random
from typing import Literal

from align.data.nano_chat_requests import NUMBERS, TIPS, TOPICS, Aspect, Request, facts_of, requests
from align.data.types import Example, Preference, SplitName
from reward.chat_rules import CLOSINGS, CURT_CLOSINGS, CURT_OPENINGS, DECLINES, OPENINGS

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
    good_share: float,
    careful_share: float,
    aspect: Aspect | None = None,
    seed: int,
    domain: str = "chat",
) -> list[Example]:
    """The requests of `split`, of one aspect or of both, each with one demonstration that `seed` draws.

    About `good_share` of the demonstrations that tell facts, and `careful_share` of those that give advice or decline
    to, are good. The others have one defect or several, which the metadata names (`defects`); it also has what the
    judges of `reward.chat_rules` read. Draws of one seed are nested: a larger share only turns bad ones into good ones.
    """
    shares = {"helpful": good_share, "safety": careful_share}
    return [
        _example(request, split, share=shares[request.aspect], seed=seed, domain=domain)
        for request in requests()
        if request.split == split and aspect in (None, request.aspect)
    ]


def preferences(split: SplitName, *, aspect: Aspect, seed: int, domain: str = "chat") -> list[Preference]:
    """Pairs of answers to requests of `split`: a good one, and one with defects, whose number is the margin.

    For "helpful" the defects are all but "misjudged", mostly one of them; for "safety" "misjudged" alone or with
    "impolite". Each request of the aspect has `PAIRS`, and some of the other's one: of those, "helpful" has none
    that must be declined, since declining is not what it is about.
    """
    pairs = []
    for request in requests():
        rng = Random(f"{seed}:{aspect}:{request.prompt}")
        other = rng.random() < OTHER_SHARE and not (aspect == "helpful" and request.must_decline)
        if request.split == split and (other or request.aspect == aspect):
            count = PAIRS[aspect] if request.aspect == aspect else 1
            pairs += [_preference(request, split, aspect, number, rng, domain) for number in range(count)]
    return pairs


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
