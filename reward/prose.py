"""Texts as prose: their sentences, and whether a text is an answer to a request at all.

The limits of `degenerate` lie between what a policy writes that games its checkers and what good answers look like. Beside each
stands the extreme of 270 published answers of GPT-4 to IFEval's requests, songs, lists, code and other languages among them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from reward.form import distinct_share, words
from reward.types import RewardError

LEAST_WORDS = 8
"""The fewest words of an answer to an open request, such as "Tell me about parrots."."""
LONG_REQUEST = 60
"""Words from which on a request is taken to bring a text or a choice of answers."""
MOST_STUTTERED = 0.15
"""Largest share of the words that stand three times in a row or more often (GPT-4: 0.03)."""
SURELY = 0.99
"""Probability from which on a text is in another language; of 500 lists of 8 to 80 English keywords 2 were given so much."""
BARE_RUN, MOST_BARE = 8, 0.5
"""Largest share of the words that stand in runs of so many without a little word (GPT-4: 0.03)."""
LEAST_DISTINCT = 0.6
"""Smallest share of different 4-grams, each line taken once (GPT-4: 0.69)."""
MOST_REPEATED = 0.2
"""Largest share of the words in sentences and list items that came before (GPT-4: 0.10)."""
MOST_REPEATED_LINES = 0.5
"""The same where other lines count too: verses, code, tables (GPT-4: 0.34, a song)."""
MOST_ECHOED, LEAST_NEW = 0.3, 0.05
"""4-grams from the request make an echo if nearly no word is new (GPT-4: 0.13 of the 4-grams, 0.16 of the words)."""
MOST_COPIED, LEAST_NEW_TO_A_COPY = 0.5, 0.15
"""The same of an echo that has so much of the request, its end too (GPT-4: 0.41)."""
MOST_RETURNED = 0.9
"""The share of an answer that comes from the request, and of the request that is in it: where a question is asked or a text is
given, both must be larger (GPT-4: 0.26)."""
_GRAM = 4
_WORD = re.compile(r"\w+(?:['’]\w+)*|[\U0001f300-\U0001faff]")
_STUTTER = re.compile(r"\b([^\W\d_]+)(?:\W+\1\b){2,}", re.IGNORECASE)
_NUMBERS = re.compile(r"(?:\b\d+\b\W*){20,}")
"""A list of numbers, which counts as one: it would thin out what is said over and over."""
_ITEM = re.compile(r"(?:[-*•+]|\d+[.)])\s")
_PAUSE = re.compile(r"[^\w\s'’,]|\d|\n")
_PHRASES = ("end_phrase", "keyword", "keywords", "postscript_marker", "prompt_to_repeat")
"""The arguments that an answer has to repeat word for word: what it says in them is not its own."""
_LITTLE = """
a about all also an and are as at be because been but by can do for from had has have he her here his how i if in into is it its
just like may me more most my no not of on one or our out she so some than that the their them then there these they this
those to up us was we were what when where which while who will with would you your
"""
_FUNCTION_WORDS = frozenset(_LITTLE.split())
_VAGUE = """
answer answers any anything below come comes correct course describe described describes description discuss
everything explain explained explains explanation fact facts find follow followed following follows get give gives
glad going good great happy help helps hope important information instruction instructions interesting know known let
like look lot lots love made make makes many matter much nice nothing now okay other paragraph people piece please
pleasure question questions really request response right said say says see sentence sentences share short simple
somebody someone something step steps story subject sure take talk talking tell tells text thing things think topic
true very want way well wonderful word words world write written yes
"""
_SAYS_NOTHING = _FUNCTION_WORDS | frozenset(_VAGUE.split())
"""Words that sentences about anything are made of."""
_ANY_CASE = re.IGNORECASE
_OPEN = re.compile(
    r"\b(?:write|compose|create|generate|draft|tell|describe|explain|discuss|elaborate|expand|summari[sz]e|critique|recommend"
    r"|why|how (?!many|much|old|far|long|tall|big|often)|letter (?:to|for|from)|(?:an?|your|the|this|two|three|\d+) (?:[\w-]+ ){,3}"
    r"(?:paragraphs?|essay|article|email|story|poem|song|speech|blog|post|review|report|resume|biography|itinerary|trip|guide"
    r"|script|dialogue|conversation|template|rubric|plan|rap|limerick|ad|advertisement|pitch|proposal|quiz|outline|difference"
    r"|history|recommendations?|advice))\b",
    _ANY_CASE,
)
"""Requests for a text of some length."""
_CAN_BE_SHORT = re.compile(
    r"(?:^|[^\w\s'’-]\s*)(?:is|are|am|was|were|do|does|did|has|have|will|should|who|whose|whom|when|where|which|whats?)\b[^.!?\n]*[?？؟]"
    r"|\b(?:how (?:many|much|old|far|long|tall|big|often)|(?:good |possible |\d |an? |the )names?|(?:title|name) (?:for|of)"
    r"|headlines?|slogans?|taglines?|captions?|motto|haiku|synonyms?|antonyms?|emojis?|hashtags?|(?:a|one|single|another) word"
    r"|yes or no|choose|select|solve|calculate|convert|classify|categori[sz]e|determine|decide"
    r"|(?:complete|finish) (?:the|this) (?:sentence|following|phrase)|fill in|correct|capitali[sz]e|translate|rewrite|rephrase"
    r"|paraphrase|pronunciation)\b",
    _ANY_CASE | re.MULTILINE,
)
"""Questions of fact, and requests that a word or two can answer in spite of that."""
_OFFERS_ANSWERS = re.compile(r"[\"“”]|\b(?:or|which|following|given|choose|select|pick|options?)\b", _ANY_CASE)
_GIVES_A_TEXT = re.compile(
    r"\b(?:re-?writ|re-?phras|paraphras|edit|correct|proofread|fix|improve|summar|shorten|convert|capitali[sz]|punctuat|format"
    r"|extract|repeat|copy|quote|grammatical|translat|finish|complet|continu|expand)",
    _ANY_CASE,
)
_ONLY_REPEAT = re.compile(r"\b(?:just|only) repeat|(?:\bnot|n['’]t|\bwithout) (?:\w+ )?(?:answer|respond)", _ANY_CASE)
_WANTS_REPETITION = re.compile(r"(?<!not )(?<!n['’]t )(?<!without )\brepeat|over and over|again and again", _ANY_CASE)
_ASKS = re.compile(
    r"\W*(?:please |then |also |first |finally )*(?:add|answer|avoid|begin|can you|come up|compose|create|describe|discuss|do not|don['’]t|draft"
    r"|end|explain|finish|generate|give|highlight|include|keep|list|make|name|put|recommend|repeat|respond|say|start|suggest|summari[sz]e|tell"
    r"|the (?:answer|letter|response|whole|last|first|words?)|these words|use|wrap|write|your (?:answer|entire|response))\b",
    _ANY_CASE,
)
"""How a sentence begins that asks for something; with a capital or without, for what is repeated in capitals is repeated."""
_OPEN_END = re.compile(r"(?:^|\s)[A-Za-z'’-]+[,;]?\Z")
_SENTENCE_END = re.compile(r"[^\W\d][.!?][\"'”’)*]*(?:\s|\Z)")
_ENDED = re.compile(r"[.!?…。！？][^\w.!?]*\Z")
_ABBREVIATIONS = "dr e.g etc i.e jr mr mrs ms p.p.s p.s prof sr st vs"
_PUNKT_ABBREVIATIONS = """
adm ala ariz aug ave bros calif co col colo conn corp cos ct dec dr feb fla fri ft ga gen ill inc jan jr kan ky lt ltd maj messrs
mg mich minn mr mrs ms nev nov oct ok okla ore pa prof rep reps sen sep sept sr st tenn tues va vs vt wash wed wis yr
a.d a.m d.c j.j j.k j.p j.r l.a m.b.a n.c n.d n.h n.j n.m n.y p.m ph.d r.j s.c u.k u.n u.s u.s.a u.s.s.r w.va
c d e f g h k l m n p r s t v w
"""
"""The common ones that nltk's English model knows; "e.g." and "etc." are not among them."""


def degenerate(
    text: str, prompt: str, topic: Sequence[str], arguments: Sequence[Mapping[str, Any]], *, can_be_short: bool = False
) -> str:
    """Why the text is no answer to the prompt, whatever its form; empty where nothing is wrong with it.

    What the instructions make it repeat (phrases, keywords and the request, as their `arguments` say) is taken away first. Of
    the rest:

    - `LEAST_WORDS` words answer an open request: one with a topic, or that asks for a text. Sentences that say nothing, such as "This is
      about parrots.", do not count. One word answers others, such as questions, and all with `can_be_short`; but not one that is taken
      from a request without a choice.
    - Keywords in a row are no sentences (unless the answer is, or is to be, in another language than English).
    - It must not say the same over and over: words, phrases, sentences or lines.
    - It must not be the request. An answer to a question, and what is made of a given text, may consist of the same words.
    - If there is a topic, one of its words must occur, whatever its ending, in a sentence that says something (unless in another
      language).

    All take time that is linear in the text.
    """
    to_repeat = " ".join(str(args.get("prompt_to_repeat", "")) for args in arguments).strip()
    only_repeat = to_repeat and _ONLY_REPEAT.search(prompt)
    own, asked = (text, "") if only_repeat else (_without(text, arguments), _without(prompt, arguments))
    english = all(args.get("language", "en") == "en" for args in arguments)
    own = _NUMBERS.sub(" 1 ", own)
    found, given = _words(own), _words(asked)
    request = f"{asked}\n{to_repeat}"
    is_open = bool(topic) or (_OPEN.search(request) and not _CAN_BE_SHORT.search(request) and not _few_words(arguments))
    least = LEAST_WORDS if is_open and not can_be_short else 1
    if len(found) < least:
        return f"{len(found)} words of its own, at least {least} are an answer"
    offers = can_be_short or len(given) > LONG_REQUEST or _OFFERS_ANSWERS.search(prompt)
    if len(found) < LEAST_WORDS and not offers and set(found) <= set(given):
        return "it repeats the request"
    if (to_repeat or not _WANTS_REPETITION.search(prompt)) and (why := _repeats(own, found)):
        return why
    if english and _bare(own) > MOST_BARE * len(found) and not _is_foreign(own):
        return "a list of words, not sentences"
    if (why := _echoes(found, given, prompt)) or not english:
        return why
    gives_a_text = len(given) > LONG_REQUEST or _GIVES_A_TEXT.search(prompt)
    saying = _saying(own, () if gives_a_text else given, topic) if least > 1 else found
    return "it says nothing" if len(saying) < least else _strays(saying, topic)


def sentences(text: str) -> list[str]:
    """The sentences of a text as nltk's Punkt finds them, with a few abbreviations and no trained model; lines too."""
    punkt = _punkt(_ABBREVIATIONS)
    return [part for line in text.splitlines() for part in punkt.tokenize(line) if _WORD.search(part)]


def whole_sentences(text: str) -> list[str]:
    """The sentences that end like one; a heading, a title or a list of values is none. All `sentences` where none ends so."""
    found = sentences(text)
    return [part for part in found if _ENDED.search(part)] or found


def punkt_sentences(text: str) -> list[str]:
    """The sentences of a text as IFEval counts them: as nltk's Punkt finds them with its model of English, nearly.

    The model itself is a download. In its place are the common abbreviations that it knows, and that a little word with a
    capital begins a sentence even after one.
    """
    found: list[str] = _punkt(_PUNKT_ABBREVIATIONS, starters=_LITTLE).tokenize(text)
    return found


def capital_words(text: str) -> int:
    """How many words of the text are in capitals, as IFEval counts them: by nltk's tokenizer, "I" and "U.S." among them."""
    return sum(map(str.isupper, _nltk().tokenize.NLTKWordTokenizer().tokenize(text)))


def _words(text: str) -> list[str]:
    """In small letters; in scripts without spaces each character; without vowel signs, where Python's \\w would break words."""
    if not text.isascii():
        text = "".join(character for character in text if unicodedata.category(character)[0] != "M").replace("’", "'")
    found = _WORD.findall(text.casefold())
    return [word for token in found for word in ([token] if token.isascii() else words(token)) if word != "'"]


def _few_words(arguments: Iterable[Mapping[str, Any]]) -> bool:
    return any(
        args.get("relation") == "less than" and args.get("num_words", 99) <= 2 * LEAST_WORDS for args in arguments
    )


def _bare(text: str) -> int:
    """How many words stand in long runs without a little one, which most languages write with three letters or less."""
    bare = 0
    for part in _PAUSE.split(text):
        run = 0
        for word in [*_WORD.findall(part.casefold()), "a"]:
            if word in _FUNCTION_WORDS or len(word) <= 3 or not word.isascii():
                bare += run if run >= BARE_RUN else 0
                run = 0
            else:
                run += 1
    return bare


def _is_foreign(text: str) -> bool:
    """Whether a text is surely in another language than English."""
    langdetect = seeded_langdetect()
    try:
        best = langdetect.detect_langs(text)[0]
    except langdetect.LangDetectException:
        return False
    return bool(best.lang != "en" and best.prob >= SURELY)


def little_share(found: Sequence[str]) -> float:
    """Which share of words in small letters are little words of English; 0 of none."""
    return sum(word in _FUNCTION_WORDS for word in found) / max(1, len(found))


def _repeats(own: str, found: Sequence[str]) -> str:
    stutters = list(_STUTTER.finditer(own))
    if sum(len(_WORD.findall(match[0])) for match in stutters) > MOST_STUTTERED * len(found):
        return f"{stutters[0][1]!r} three times in a row"
    lines = [line.strip() for line in own.splitlines()]
    if distinct_share(_words("\n".join(dict.fromkeys(lines))), _GRAM) < LEAST_DISTINCT:
        return "the same words over and over"
    said: Counter[tuple[str, ...]] = Counter()
    again = Counter({True: 0, False: 0})
    for line in lines:
        parts = [tuple(words(sentence)) for sentence in sentences(line)]
        in_prose = len(parts) > 1 or _ITEM.match(line) is not None
        for part in parts:
            again[in_prose] += len(part) if said[part] and len(part) >= _GRAM else 0
            said[part] += 1
    total = sum(len(part) * count for part, count in said.items())
    if again[True] > MOST_REPEATED * total or again.total() >= MOST_REPEATED_LINES * total > 0:
        return "a sentence comes twice or more often"
    return ""


def _echoes(found: Sequence[str], given: Sequence[str], prompt: str) -> str:
    if len(found) < LEAST_WORDS or len(given) < _GRAM:
        return ""
    grams, asked = _grams(found), set(_grams(given))
    echoed = sum(gram in asked for gram in grams) / len(grams)
    copied = len(asked.intersection(grams)) / len(asked)
    if "?" in prompt or _GIVES_A_TEXT.search(prompt) or len(given) > LONG_REQUEST:
        return "it repeats the request" if min(echoed, copied) > MOST_RETURNED else ""
    new = sum(word not in _FUNCTION_WORDS for word in set(found) - set(given)) / len(found)
    least_new = LEAST_NEW_TO_A_COPY if copied > MOST_COPIED and tuple(given[-_GRAM:]) in grams else LEAST_NEW
    return "it repeats the request" if echoed > MOST_ECHOED and new < least_new else ""


def repeats_request(text: str, prompt: str) -> bool:
    """Whether a text says again, though it was not asked to, a whole sentence that asks for something, or most of the request to its end."""
    if _WANTS_REPETITION.search(prompt):
        return False
    asking = {tuple(_words(part)) for part in sentences(prompt) if _ASKS.match(part)}
    if any(len(part) > 2 and part in asking for part in (tuple(_words(one)) for one in sentences(text))):
        return True
    found, given = _grams(_words(text)), _grams(_words(prompt))
    copied = len(set(given).intersection(found)) / max(1, len(set(given)))
    most = MOST_RETURNED if _GIVES_A_TEXT.search(prompt) or len(given) > LONG_REQUEST else MOST_COPIED
    return copied > most and given[-1] in found


def breaks_off(text: str) -> bool:
    """Whether a text of sentences ends in the middle of one. A line of fewer words need not end like a sentence, nor an item among such items."""
    *before, last = text.strip().split("\n")
    parts = sentences(last)
    if not parts or not _OPEN_END.search(last) or parts[-1].startswith("#"):
        return False
    if _ITEM.match(last):
        items = [line for line in before if _ITEM.match(line)]
        return len(items) > 1 and all(_SENTENCE_END.search(line.strip()[-4:]) for line in items)
    begun = _SENTENCE_END.search("\n".join(before)) if before else last[0].isupper()
    return len(parts) > 1 or (len(_words(last)) >= LEAST_WORDS and bool(begun))


def _saying(text: str, given: Collection[str], topic: Sequence[str]) -> list[str]:
    """The words of the sentences that say something: those with a word that is neither vague nor from the request nor the topic."""
    nothing, stems = _SAYS_NOTHING.union(given), tuple(map(_stem, topic))
    parts = (_words(part) for part in sentences(text))
    return [word for part in parts if any(w not in nothing and not w.startswith(stems) for w in part) for word in part]


def _strays(found: Sequence[str], topic: Sequence[str]) -> str:
    if not topic or any(word.startswith(_stem(key)) for key in topic for word in found):
        return ""
    return f"nothing about the topic ({', '.join(topic)})"


def _stem(word: str) -> str:
    """What "journeys" and "journey", "baking" and "baked" have in common, more or less."""
    return word.casefold()[: max(3, len(word) - 3)]


def _grams(found: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(found[start : start + _GRAM]) for start in range(len(found) - _GRAM + 1)]


def _without(text: str, arguments: Sequence[Mapping[str, Any]]) -> str:
    for args in arguments:
        for name in _PHRASES:
            given = args.get(name) or ()
            for phrase in [given] if isinstance(given, str) else given:
                text = re.sub(re.escape(phrase), " ", text, flags=re.IGNORECASE)
    return text


@lru_cache(maxsize=2)
def _punkt(abbreviations: str, *, starters: str = "") -> Any:
    punkt = _nltk().tokenize.punkt
    parameters = punkt.PunktParameters()
    parameters.abbrev_types = set(abbreviations.split())
    parameters.sent_starters = set(starters.split())
    return punkt.PunktSentenceTokenizer(parameters)


def seeded_langdetect() -> Any:
    """The module, made to judge the same text alike each time: it guesses by a random walk. Raises ImportError."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    return langdetect


def _nltk() -> Any:
    try:
        import nltk
    except ImportError as error:
        raise RewardError(
            f"the reward `instructions` needs nltk ({error}): pip install 'moe-align[evaluation]'"
        ) from error
    return nltk
