"""Rules on the final box, language, repetition and length, and several of them as one reward."""

import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward import (
    Mixture,
    RewardContractError,
    RewardError,
    RewardTerm,
    Sample,
    Score,
    UnusableAnswer,
    Verdict,
    register,
)
from reward.form import (
    answer_format,
    distinct_share,
    language_consistency,
    overlong_penalty,
    repetition,
    rule,
    soft_overlong,
    words,
)

ENGLISH = "First we add the two numbers, and then we divide the sum by three."
CHINESE = "首先我们把两个数相加，然后把和除以三。"
RUSSIAN = "Сначала сложим два числа, а затем разделим сумму на три."
JAPANESE = "まず二つの数を足し、次に和を三で割ります。"
KOREAN = "먼저 두 수를 더하고, 그 합을 삼으로 나눕니다."


def sample(completion: str, **fields: Any) -> Sample:
    return Sample(**{"id": "s", "prompt": "?", "completion": completion, "ground_truth": None, **fields})


@pytest.mark.parametrize(
    ("text", "language"),
    [(ENGLISH, "en"), (CHINESE, "zh"), (RUSSIAN, "ru"), (JAPANESE, "ja"), (KOREAN, "ko")],
    ids=["en", "zh", "ru", "ja", "ko"],
)
@pytest.mark.parametrize("other", [ENGLISH, CHINESE, RUSSIAN], ids=["en", "zh", "ru"])
def test_a_text_is_in_its_language_and_half_a_text_is_not(text: str, language: str, other: str) -> None:
    assert language_consistency(sample(text), language=language).value == 1.0
    assert language_consistency(sample("?", prompt=text), language="prompt").verdict is Verdict.NO_ANSWER
    same = language_consistency(sample(text, prompt=text), language="prompt")
    assert (same.value, same.verdict) == (1.0, Verdict.PASS)
    if other != text and not (language == "ja" and other == CHINESE):
        mixed = language_consistency(sample(text + other), language=language)
        assert 0.1 < mixed.value < 0.9
        assert mixed.verdict is Verdict.WRONG


def test_the_share_is_that_of_the_words() -> None:
    assert language_consistency(sample("one two три four")).value == 0.75
    assert language_consistency(sample("one 二 三 two")).value == 0.5


@pytest.mark.parametrize(
    "foreign",
    [
        r"$\frac{x}{y}$",
        r"\[ f(x) = \sin x \]",
        r"\(a+b\)",
        "`print(x)`",
        "```python\nfor x in y: pass\n```",
        r"\boxed{}",
    ],
)
def test_formulas_and_code_are_in_no_language(foreign: str) -> None:
    assert language_consistency(sample(f"{CHINESE} {foreign} {CHINESE}"), language="zh").value == 1.0


def test_half_a_word_in_another_script_counts() -> None:
    assert language_consistency(sample("a pаper")).value < 1.0  # the second a is Cyrillic


@pytest.mark.parametrize("completion", ["", "42", "$x$", "?!"])
def test_without_words_there_is_no_reward_for_the_language(completion: str) -> None:
    score = language_consistency(sample(completion))
    assert (score.verdict, score.value) == (Verdict.NO_ANSWER, 0.0)


def test_an_unknown_language_and_a_prompt_without_words() -> None:
    with pytest.raises(RewardError, match="unknown language 'xx'"):
        language_consistency(sample(ENGLISH), language="xx")
    with pytest.raises(UnusableAnswer, match="no word"):
        language_consistency(sample(ENGLISH, prompt="2 + 2 = ?"), language="prompt")


def test_repetition_is_the_share_of_different_ngrams() -> None:
    assert distinct_share(list("abab"), 2) == 2 / 3
    assert distinct_share(list("abc"), 4) == 1.0
    assert repetition(sample(ENGLISH)).value == 1.0
    looped = repetition(sample("and so on " * 200))
    assert looped.value < 0.02
    assert looped.verdict is Verdict.WRONG
    assert repetition(sample(CHINESE * 50)).value < 0.05
    assert repetition(sample("")).verdict is Verdict.NO_ANSWER


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 5))
def test_every_further_copy_lowers_the_share(tokens: list[str], n: int) -> None:
    share = distinct_share(tokens, n)
    assert 0.0 < share <= 1.0
    if len(tokens) >= n:
        assert distinct_share(tokens * 3, n) <= distinct_share(tokens * 2, n)


def test_words_are_characters_where_there_are_no_spaces() -> None:
    assert words("It's 二つ!") == ["it", "'", "s", "二", "つ", "!"]


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (20481, -1.0), (10**9, -1.0)],
)
def test_the_overlong_penalty_is_that_of_the_paper(length: int, penalty: float) -> None:
    # DAPO's own setting: 16,384 expected tokens and a cache of 4,096 (arXiv:2503.14476, section 4.1)
    assert overlong_penalty(length, 20480, 4096) == penalty
    score = soft_overlong(sample("", metadata={"completion_tokens": length}), max_length=20480, cache=4096)
    assert (score.value, score.verdict) == (penalty, Verdict.PASS if penalty == 0.0 else Verdict.WRONG)


@given(st.integers(0, 3000), st.integers(1, 1000), st.integers(0, 1000))
def test_the_penalty_falls_with_the_length_and_stays_in_its_range(length: int, cache: int, more: int) -> None:
    longest = cache + more
    assert -1.0 <= overlong_penalty(length + 1, longest, cache) <= overlong_penalty(length, longest, cache) <= 0.0


def test_the_length_is_in_tokens_or_in_characters() -> None:
    assert soft_overlong(sample("x" * 75), max_length=100, cache=50, unit="characters").value == -0.5
    for wrong in (None, "5", True, -1, 2.0):
        with pytest.raises(UnusableAnswer, match="completion_tokens"):
            soft_overlong(sample("x", metadata={"completion_tokens": wrong}), max_length=100, cache=50)
    for max_length, cache in ((100, 0), (100, 101), (0, 0)):
        with pytest.raises(RewardError, match="cache"):
            soft_overlong(sample("x"), max_length=max_length, cache=cache)
    with pytest.raises(RewardError, match="not in 'words'"):
        soft_overlong(sample("x"), max_length=100, cache=50, unit="words")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        (r"<think>\boxed{4}?</think> It is \boxed{4}.", Verdict.PASS),
        (r"<think>\boxed{4}", Verdict.NO_ANSWER),
        (r"It is \boxed{4}. <think>Or \boxed{5}?</think> No.", Verdict.WRONG),
    ],
)
def test_boxes_of_a_thought_are_of_no_format(completion: str, verdict: Verdict) -> None:
    assert answer_format(sample(completion)).verdict is verdict


def test_several_rules_are_their_weighted_mean() -> None:
    rules = [{"name": "answer_format", "weight": 3}, {"name": "language_consistency", "params": {"language": "zh"}}]
    good, foreign, formless = rule(
        [sample(rf"{CHINESE} \boxed{{4}}"), sample(rf"{ENGLISH} \boxed{{4}}"), sample(CHINESE)], rules=rules
    )
    assert (good.value, good.verdict) == (1.0, Verdict.PASS)
    assert (foreign.value, foreign.verdict) == (0.75, Verdict.WRONG)
    assert (formless.value, formless.verdict) == (0.25, Verdict.NO_ANSWER)
    assert foreign.detail == "answer_format 1; language_consistency 0 (0.0% of the words)"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "at least one"),
        ([{"weight": 1}], "name"),
        ([{"name": "repetition", "weight": 0}], "greater than 0"),
        ([{"name": "repetition", "wieght": 1}], "wieght"),
        ([{"name": "rule", "params": {"rules": []}}], "a rule in a rule"),
        ([{"name": "mine.py:f"}], "a function in a file, whose columns, changes and time limit"),
        ([{"name": "repetitoin"}], "Did you mean 'repetition'"),
        ([{"name": "repetition", "params": {"m": 2}}], "unknown parameter 'm'"),
        ([{"name": "repetition"}, {"name": "repetition"}], "two terms"),
    ],
)
def test_a_malformed_list_of_rules_is_refused(rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        rule([sample("x")], rules=rules)


def test_a_rule_may_be_there_twice_under_two_labels() -> None:
    rules = [{"name": "repetition", "params": {"n": n}, "label": f"of {n} words"} for n in (1, 8)]
    (score,) = rule([sample("and so on and so on")], rules=rules)
    assert score.value == (3 / 6 + 1.0) / 2
    assert "of 1 words 0.5" in score.detail


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("language_consistency", {"language": "it"}, "unknown language 'it'"),
        ("soft_overlong", {"max_length": 512, "cache": 1024}, "0 < cache <= max_length"),
        ("soft_overlong", {"max_length": 512, "cache": 64, "unit": "words"}, "not in 'words'"),
        ("soft_overlong", {"max_length": "512", "cache": 64}, "raised TypeError"),
    ],
)
def test_values_that_no_rule_can_have_are_told_before_anything_is_sampled(
    name: str, params: dict[str, Any], message: str
) -> None:
    for term in (
        {"name": name, "params": params},
        {"name": "rule", "params": {"rules": [{"name": name, "params": params}]}},
    ):
        with pytest.raises(RewardError, match=message):
            Mixture([RewardTerm(**term)]).check_ready()


@pytest.mark.usefixtures("own_rewards")
def test_what_a_rule_needs_is_started_with_it() -> None:
    calls = []

    @register("needs_a_start", batched=True)
    def needs_a_start(samples: Sequence[Sample]) -> list[Score]:
        calls.append(len(samples))
        return [Score(1.0, Verdict.PASS) for _ in samples]

    Mixture([RewardTerm(name="rule", params={"rules": [{"name": "needs_a_start"}]})]).make_ready()
    assert calls == [0]


def test_a_rule_that_cannot_judge_masks_its_sample_alone() -> None:
    rules = [{"name": "soft_overlong", "params": {"max_length": 100, "cache": 50}}, {"name": "repetition"}]
    unknown, known = rule([sample("x"), sample("x", metadata={"completion_tokens": 75})], rules=rules)
    assert unknown.verdict is Verdict.INFRA_ERROR
    assert known.value == (-0.5 + 1.0) / 2


@pytest.mark.usefixtures("own_rewards")
def test_a_rule_that_breaks_the_contract_is_an_error_with_the_samples_id() -> None:
    @register("broken")
    def broken(sample: Sample) -> Score:
        return 1.0  # type: ignore[return-value]

    with pytest.raises(RewardContractError, match="sample 's'"):
        rule([sample("x")], rules=[{"name": "broken"}])


@pytest.mark.parametrize(
    "text",
    [
        "\\(\\[" * 100_000,
        "a" * 1_000_000,
        "a " * 300_000,
        "$" * 500_000,
        "`" * 500_000,
        "\\[" * 300_000,
        "二" * 300_000,
    ],
)
def test_a_long_completion_takes_linear_time(text: str) -> None:
    started = time.process_time()
    language_consistency(sample(text))
    repetition(sample(text))
    assert time.process_time() - started < 30.0


@pytest.mark.parametrize("ending", ["", ".", " .\n", "$", "$.", "$$", r"\)", "\n\\]\n", r".\]"])
def test_one_box_at_the_end_passes(ending: str) -> None:
    assert answer_format(sample(rf"So \boxed{{\frac{{1}}{{2}}}}{ending}")).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("completion", "verdict", "detail"),
    [
        ("42", Verdict.NO_ANSWER, "no"),
        (r"\boxed{42", Verdict.WRONG, "unclosed"),
        (r"\boxed{}", Verdict.WRONG, "empty"),
        (r"\boxed{ }", Verdict.WRONG, "empty"),
        (r"\boxed{1} \boxed{1}", Verdict.WRONG, "2"),
        (r"\boxed{\boxed{1}}", Verdict.WRONG, "2"),
        (r"\boxed{1 then \boxed{1}", Verdict.WRONG, "2"),
        (r"\boxed{42} is it", Verdict.WRONG, "after"),
        (r"\boxed{42}..", Verdict.WRONG, "after"),
    ],
)
def test_the_detail_says_what_is_missing(completion: str, verdict: Verdict, detail: str) -> None:
    score = answer_format(sample(completion), right=2.0, wrong=-0.5)
    assert score.verdict is verdict
    assert score.value == -0.5
    assert detail in score.detail


def test_a_completion_that_was_cut_off_fails() -> None:
    score = answer_format(sample(r"\boxed{42}", truncated=True))
    assert score.verdict is Verdict.WRONG
    assert "cut off" in score.detail


def test_a_long_blank_tail_takes_linear_time() -> None:
    started = time.process_time()
    answer_format(sample(r"\boxed{42}" + " " * 200_000 + "x"))
    assert time.process_time() - started < 5.0
