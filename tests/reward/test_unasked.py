"""Marks of form that nobody asked for, and answers that look as if they had one and have none."""

import json
import time
from pathlib import Path

import pytest

from reward import Mixture, RewardTerm, Sample, Verdict
from reward.instructions import FOR_A_MARK, instructions
from reward.tricks import TRICKS, Trick
from reward.unasked import unasked

REQUEST = 'Tell me something interesting about parrots. Use the words "garden".'
PARROTS = (
    "Parrots are clever birds, and some of them can copy the words which people say in the garden. They live for many years in warm "
    "forests, where they eat fruit, nuts and seeds. A flock of them is loud enough to be heard from far away."
)


def written(text: str) -> Trick:
    """A trick that puts answer and topic into a text."""
    return Trick(text, lambda sample, _: text.format(sample.completion, " ".join(sample.metadata["topic"])))


MORE = [
    written(text)
    for text in (
        "Here is something about {1} that you may want to know. It is good to know about it.",
        "{1} is a very interesting topic. Many people love {1} and want to know more about it.",
        "This is about {1}. {0}",
        "# {1}\n\n{0}",
        "{1}:\n{0}",
        r"{0} \boxed{{7}}",
        r"\boxed{{{0}}}",
    )
]
CORPUS = Path(__file__).parent / "corpus" / "smollm2_answers.jsonl"


@pytest.mark.parametrize(
    ("text", "mark", "kind"),
    [
        (f'"{PARROTS}"', "quotation marks", "startend:quotation"),
        (f"“{PARROTS}”", "quotation marks", "startend:quotation"),
        (f'"{PARROTS}', "quotation marks", "startend:quotation"),
        (f'{PARROTS}"', "quotation marks", "startend:quotation"),
        (PARROTS.upper(), "capitals", "change_case:english_capital"),
        (PARROTS.lower(), "lowercase", "change_case:english_lowercase"),
        (PARROTS.replace(",", ""), "no commas", "punctuation:no_comma"),
        (f"<<Parrots>>\n{PARROTS}", "a title", "detectable_format:title"),
        (f"{PARROTS}\n\nP.S. They bite.", "a postscript", "detectable_content:postscript"),
        (f"{PARROTS} P.P.S They bite.", "a postscript", "detectable_content:postscript"),
        (f"{PARROTS}\n***\nThey bite.", "dividers", "length_constraints:number_paragraphs"),
        (f"**{PARROTS}**", "brackets or emphasis", "detectable_format:number_highlighted_sections"),
        (f"[{PARROTS}]", "brackets or emphasis", "detectable_content:number_placeholders"),
        (json.dumps({"answer": PARROTS}), "JSON", "detectable_format:json_format"),
        (f"{REQUEST}\n\n{PARROTS}", "the request", "combination:repeat_prompt"),
        (f"Tell me something interesting about parrots.\n\n{PARROTS}", "the request", "combination:repeat_prompt"),
    ],
)
def test_a_mark_is_one_where_nobody_asked_for_it(text: str, mark: str, kind: str) -> None:
    assert unasked(text, REQUEST, ["keywords:existence"]) == [mark]
    assert unasked(text, REQUEST, ["keywords:existence", kind]) == []


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (PARROTS, REQUEST),
        ("lima", "What is the capital of Peru?"),
        ('"The bus which was red came late."', 'Rewrite "The bus, which was red, came late." without the commas.'),
        ('"Come in," said the parrot, and she did. "You are late."', "Tell a very short story about a parrot."),
        (
            "Rivers run far.\n\nWater is in all of them and it moves down to the sea.\n\nBoats go on them.",
            "Write about rivers.",
        ),
        (
            "- two pairs of shoes\n- a warm coat\n- two pairs of socks\n- a good book",
            "Write a packing list for a week.",
        ),
        (
            "1. PIXEL PRODIGY\n2. CODE CONSTRUCT\n3. DIGITAL DYNAMICS",
            "Three names for a company, in all capital letters.",
        ),
        (f"Dear Ann,\n\n{PARROTS}\n\nP.S. Say hello to Bob.", "Write a short note to a friend about parrots."),
        ("I must not talk in class. " * 4, "Repeat the sentence I must not talk in class. Write it four times."),
        ("河流把水从山上带到海里，人们很久以来就住在河边。" * 3, "Tell me about rivers in Chinese."),
        ("FLÜSSE", "Ein Wort über Flüsse"),
        (
            "Mto unaanza milimani na kutiririka hadi baharini ambako maji yake huchanganyika na chumvi. Watu wengi hu"
            "tumia mto huu kwa kilimo na usafiri wa boti kila siku. Samaki wengi huishi ndani ya maji haya safi.",
            "Eleza kuhusu mto.",
        ),
        (
            "თბილისი საქართველოს დედაქალაქია და მდებარეობს მდინარე მტკვრის ნაპირებზე, სადაც ბევრი ხალხი ცხოვრობს.",
            "მომიყევი თბილისზე.",
        ),
        ("« Bonjour », dit-il en entrant dans la maison, puis il ajouta : « Au revoir »", "Raconte une scène."),
        ("„Guten Tag“, sagte er beim Eintreten, und nach einer Weile: „Auf Wiedersehen“", "Erzähl eine Szene."),
        (r"Seven and five are \boxed{12}.", "How many are seven and five?"),
    ],
)
def test_ordinary_answers_have_no_mark(text: str, prompt: str) -> None:
    assert unasked(text, prompt, []) == []


@pytest.mark.parametrize(
    ("earlier", "text"),
    [
        ({"role": "system", "content": "Reply with a JSON object only."}, json.dumps({"answer": PARROTS})),
        ({"role": "system", "content": [{"type": "text", "text": "Write in capital letters."}]}, PARROTS.upper()),
        ({"role": "user", "content": "From now on write in lowercase only."}, PARROTS.lower()),
    ],
)
def test_what_an_earlier_turn_asks_for_is_asked_for(earlier: dict[str, object], text: str) -> None:
    turns = [earlier, {"role": "assistant", "content": None}, {"role": "user", "content": REQUEST}]
    asked = {"instructions": [], "messages": turns}
    assert instructions(Sample("1", REQUEST, text, None, metadata=asked)).verdict is Verdict.PASS
    assert instructions(Sample("1", REQUEST, text, None, metadata={"instructions": []})).verdict is Verdict.WRONG


def test_a_system_message_about_anything_asks_for_no_mark() -> None:
    system = "You are helpful. Answer each message in a suitable format; write code, titles or lists of numbers where it helps."
    for text, mark in (
        (f"{PARROTS}\n\nP.S. They bite.", "a postscript"),
        (f"**{PARROTS}**", "brackets or emphasis"),
        (json.dumps({"answer": PARROTS}), "JSON"),
    ):
        assert unasked(text, "Tell me about parrots.", [], system) == [mark]


@pytest.mark.parametrize("loop", ["\n", "\n ", "!", "`", "`x", "*", '"', "*\n", ".)", " ", "- \n"])
def test_a_loop_of_one_character_is_judged_in_linear_time(loop: str) -> None:
    asked = {"instructions": [{"kind": "detectable_format:number_bullet_lists", "args": {"num_bullets": 3}}]}
    start = time.process_time()
    for text in (f"{PARROTS}{loop * 12_000}{PARROTS}", f"{loop * 12_000}{PARROTS}"):
        instructions(Sample("1", REQUEST, text, None, metadata=asked), partial=True)
    assert time.process_time() - start < 2.5


@pytest.mark.parametrize(
    "text",
    [
        PARROTS[:-30],
        "Parrots are clever birds that can copy the words which",
        f"A few things about them:\n* {PARROTS}\n* They bite.\n* They live in the",
    ],
)
def test_an_end_in_the_middle_of_a_sentence_is_a_mark(text: str) -> None:
    assert unasked(text, "Describe parrots.", []) == ["an end in the middle of a sentence"]
    assert unasked(f"{text} That is all", "Describe parrots.", ["startend:end_checker"]) == []


def test_a_box_is_a_mark() -> None:
    assert unasked(rf"{PARROTS} Some live for \boxed{{60}} years.", REQUEST, []) == ["a boxed value"]


def asked(completion: str, *kinds: str) -> Sample:
    metadata = {"topic": ["parrots"], "instructions": [{"kind": kind, "args": {}} for kind in kinds]}
    return Sample("1", "Describe parrots.", completion, None, "instructions", metadata=metadata)


def test_an_answer_with_a_mark_does_not_pass_and_is_paid_a_part_of_its_share() -> None:
    quoted = asked(f'"{PARROTS}"', "detectable_format:title", "startend:quotation")
    assert instructions(quoted, partial=True).value == 0.5
    small = asked(PARROTS.lower().replace(",", ""), "punctuation:no_comma")
    found = instructions(small, partial=True)
    assert (found.value, found.verdict) == (FOR_A_MARK, Verdict.WRONG)
    assert found.detail == "nobody asked for lowercase; no_comma: yes"
    assert instructions(small).value == 0


def test_no_trick_pays_on_a_real_model_s_own_answers() -> None:
    """SmolLM2-135M-Instruct at temperature 1: 128 of the requests that it is trained on, an answer each."""
    rows = [json.loads(line) for line in CORPUS.open(encoding="utf-8")]
    samples = [
        Sample(
            *(row[name] for name in ("id", "prompt", "completion", "answer", "domain")),
            truncated=row["finish_reason"] == "length",
            metadata=json.loads(row["metadata"]),
        )
        for row in rows
    ]
    mixture = Mixture([RewardTerm(name="instructions", params={"partial": True})])

    def mean(them: list[Sample]) -> float:
        return sum(reward.value or 0.0 for reward in mixture.score(them)) / len(them)

    before = mean(samples)
    others = [*samples[1:], samples[0]]
    paid = {
        trick.name: mean([trick.apply(*pair) for pair in zip(samples, others, strict=True)]) - before
        for trick in (*TRICKS.values(), *MORE)
        if any(trick.change(*pair) is not None for pair in zip(samples, others, strict=True))
    }
    assert before > 0.08
    assert {name: change for name, change in paid.items() if change > 0.02} == {}
