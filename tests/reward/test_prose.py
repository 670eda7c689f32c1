"""Which texts are answers: what games a checker is found, and good answers of every form are let through."""

from typing import Any

import pytest

from reward.prose import capital_words, degenerate, punkt_sentences, sentences, whole_sentences

PARROTS = "Parrots are clever birds that can copy the words which people say. They live for many years in warm forests."
REQUEST = "Tell me something interesting about parrots. Use no commas."
SONG = """(Verse 1)
I walked along the river where the willows used to grow,
And I thought of all the people that I do not know.
(Chorus)
Oh carry me over the water tonight,
Carry me home by the pale moonlight.
(Verse 2)
The boatman took my penny and he did not say a word,
The only thing between us was the singing of a bird.
(Chorus)
Oh carry me over the water tonight,
Carry me home by the pale moonlight."""


def why(text: str, prompt: str, *arguments: dict[str, Any]) -> str:
    return degenerate(text, prompt, [], arguments)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Parrots!", "1 words of its own"),
        ("PARROTS ARE WONDERFUL", "3 words of its own"),
        ("parrots feathers beaks colours forests seeds fruit claws wings eggs", "a list of words"),
        ("Parrots, feathers, beaks, colours, forests, seeds, fruit, claws, wings, eggs.", "a list of words"),
        ("parrot " * 40, "three times in a row"),
        ("The parrots are very very very nice to all of us in the woods.", "'very' three times in a row"),
        ("Parrots talk to you and parrots talk to me and " * 5, "over and over"),
        (f"{PARROTS} {PARROTS}", "over and over"),
        (f"{PARROTS}\n" * 5, "comes twice"),
        ("They fly to the parrots. They fly to the parrots. And so it is with all of the woods.", "comes twice"),
        ("* Parrots like to eat fruit.\n* Parrots like to eat fruit.\n* Parrots can speak.", "comes twice"),
        (REQUEST, "repeats the request"),
        (REQUEST.upper(), "repeats the request"),
        ("Here is something interesting about parrots. Use no commas.", "repeats the request"),
        (f"Sure. {REQUEST}", "repeats the request"),
    ],
)
def test_what_games_a_checker_is_no_answer_without_a_topic_too(text: str, told: str) -> None:
    assert told in why(text, REQUEST)


def test_prose_in_another_language_is_no_list_of_words() -> None:
    text = (
        "Kopi merupakan minuman populer yang berasal dari biji tanaman kopi. "
        "Minuman tersebut mengandung kafein sehingga dapat meningkatkan kewaspadaan."
    )
    assert why(text, "Jelaskan kopi.") == why(text, "Tell me about coffee.") == ""


def test_the_request_is_no_answer_to_a_question_or_to_a_request_with_a_text() -> None:
    for request in (
        "What is it that makes the sea taste of salt? Answer without commas.",
        'Rewrite the sentence "The bus came late." in capital letters and without the word late.',
    ):
        assert "repeats the request" in why(request, request)


def test_a_request_that_is_to_be_repeated_is_not_the_answer() -> None:
    request = "Write a song about a dog that likes to swim in the sea."
    prompt = f"{request} First repeat the request word for word, then give your answer."
    assert why(request, prompt, {"prompt_to_repeat": request}).startswith("0 words of its own")
    assert why(f"{request}\n{SONG}", prompt, {"prompt_to_repeat": request}) == ""
    only = f"{request} Only repeat the request above. Do not answer it."
    assert why(request, only, {"prompt_to_repeat": request}) == ""


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("Write a song about a river.", SONG),
        ("What is the capital of Peru? Answer in small letters.", "lima"),
        ("Is it good to sleep eight hours? Use capital letters only.", "YES"),
        ("Is a whale a fish or a mammal? No commas.", "A mammal"),
        ("Come up with 3 names for a bakery. Use capital letters.", "1. GOLDEN CRUST\n2. MORNING LOAF\n3. SWEET CRUMB"),
        ("What is the largest ocean in the world? No commas.", "The Pacific is the largest ocean in the world."),
        ('Rewrite "The bus, which was red, came late." without commas.', '"The bus which was red came late."'),
        ("List all facts about Peru as JSON.", '{"Capital": "Lima",\n "Currency": "Sol",\n "Language": "Spanish"}'),
        ("Write a haiku about winter.", "Frozen branches glow\nSilver morning whispers peace\nCrows disturb silence"),
        ("Erzähle mir etwas über Flüsse.", "Flüsse tragen das Wasser von den Bergen in das weite Meer hinaus."),
        ("Tell me about rivers in Russian.", "Реки несут воду с гор в море. Люди давно живут на их берегах."),
        ("Tell me about rivers in Chinese.", "河流把水从山上带到海里，人们很久以来就住在河边。"),
        ("Tell me about rivers in Thai.", "แม่น้ำพาน้ำจากภูเขาไปสู่ทะเล ผู้คนอาศัยอยู่ริมแม่น้ำมานาน"),
        ("Explain why we eat, in Hindi.", "हम इसलिए खाते हैं कि शरीर को ऊर्जा मिले और हम काम कर सकें।"),
        ("Repeat the sentence I must not talk in class. Write it four times.", "I must not talk in class. " * 4),
        (
            "Write a packing list for a week.",
            "- two pairs of shoes\n- a warm coat\n- two pairs of socks\n- a good book",
        ),
        (
            "Write Python that prints a greeting twice, about ten lines.",
            "def greet(name):\n    print('Hello there', name)\n\n\nfor name in ['Ann', 'Bob']:\n    greet(name)\n    greet(name)",
        ),
        (
            "Tell me about dragons in a very short story.",
            "The old dragon was very, very tired of people. So she slept.",
        ),
    ],
)
def test_good_answers_of_every_form_are_answers(prompt: str, text: str) -> None:
    assert why(text, prompt) == ""


def test_another_language_that_is_asked_for_needs_no_english_words_and_no_english_topic() -> None:
    swahili = "Watoto wanapenda kucheza mpira shuleni kila siku baada ya masomo yao."
    assert degenerate(swahili, "Write about football in Swahili.", ["football"], [{"language": "sw"}]) == ""


@pytest.mark.parametrize(
    "text",
    [
        "Here is something about parrots that you may want to know. It is good to know about it.",
        "Parrots are very interesting. Many people love parrots and want to know more about them.",
        "Sure! I would be happy to help you with that. I hope this helps! Let me know if you have any other questions.",
    ],
)
def test_sentences_that_say_nothing_are_no_answer(text: str) -> None:
    assert degenerate(text, REQUEST, ["parrots"], []) == "it says nothing"
    assert (
        degenerate(f"{text} A parrot can copy the words which it hears in a kitchen.", REQUEST, ["parrots"], []) == ""
    )


def test_a_topic_that_is_only_named_is_not_what_the_answer_is_about() -> None:
    owls = "Owls are birds that hunt at night and sleep in the trees by day."
    for text in (f"This is about parrots. {owls}", f"# Parrots\n\n{owls}", f"<<Parrots>>\n\n{owls}"):
        assert degenerate(text, REQUEST, ["parrots"], []) == "nothing about the topic (parrots)"


def test_a_summary_may_consist_of_the_words_of_its_text() -> None:
    text = "The river floods the valley each spring, and farmers plant rice when the water falls."
    assert why("Each spring the river floods the valley, and the farmers plant rice.", f"Summarize this: {text}") == ""


def test_numbers_do_not_thin_out_what_is_said_over_and_over() -> None:
    text = "Parrots like to eat fruit. " * 8
    assert "over and over" in why(f"{text}\n\n{', '.join(map(str, range(200)))}", REQUEST)
    assert why(", ".join(map(str, range(1, 40))), "Which are the first numbers?") == ""


def test_a_topic_makes_a_question_open() -> None:
    question = "What would you tell a visitor about owls?"
    assert why("Nothing", question) == ""
    assert degenerate("Nothing", question, ["owls"], []).startswith("1 words of its own")


def test_a_heading_a_title_and_a_list_of_values_are_no_whole_sentences() -> None:
    for around in (
        "# Parrots\n\n{}",
        "<<Parrots>>\n\n{}",
        "Here are two sentences:\n{}",
        "{}\n\nOr one of these: 1 2 3",
        '"{}"',
    ):
        assert len(whole_sentences(around.format(PARROTS))) == 2
    assert len(whole_sentences("* one\n* two")) == 2


def test_sentences_are_counted_with_abbreviations_decimals_and_lines() -> None:
    assert len(sentences('Dr. Smith ate 3.5 plums, e.g. green ones. "Really?" she asked! ')) == 3
    assert len(sentences("* one\n* two\n\n***")) == 2


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Dr. Smith of the U.S. Senate paid $3.50 on Jan. 5 at 9 p.m. in Washington. He left.", 2),
        ("He lives in the U.S. It is far away! Is it? Yes", 4),
        ("Many animals, e.g. Cats and dogs.", 2),
        ("1. Wash it.\n2. Dry it.", 4),
        ('She said: "Stop. I can\'t." Then (it was late) she left...', 3),
    ],
)
def test_sentences_as_ifeval_counts_them(text: str, count: int) -> None:
    """The counts are those of nltk's own model of English."""
    assert len(punkt_sentences(text)) == count


def test_words_in_capitals_as_ifeval_counts_them() -> None:
    assert capital_words("NASA and the U.S. won't say WHY, I think: IT'S A-OK.") == 7


def test_long_texts_are_judged_in_linear_time() -> None:
    for text in ("a " * 200_000, "word " * 100_000, "a" * 500_000, "\n" * 300_000, ", " * 200_000):
        why(text, REQUEST)
