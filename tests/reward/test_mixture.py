"""The weighted sum, its domains, and what happens where a component cannot judge."""

import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reward import (
    DomainError,
    InfrastructureError,
    Mixture,
    ParameterError,
    RewardContractError,
    RewardError,
    RewardTerm,
    Sample,
    Score,
    UnknownReward,
    UnusableAnswer,
    Verdict,
    register,
)

pytestmark = pytest.mark.usefixtures("own_rewards")


def sample(completion: str = r"\boxed{4}", **fields: Any) -> Sample:
    return Sample(**{"id": "s", "prompt": "?", "completion": completion, "ground_truth": "4", **fields})


def good(count: int) -> list[Sample]:
    return [sample(id=f"good {row}") for row in range(count)]


def passing(value: Any) -> Callable[[Sample], Score]:
    return lambda sample: Score(value, Verdict.PASS)


def fails(times: int) -> Callable[[Sample], Score]:
    """A reward whose worker dies the first `times` times that it is asked about sample "s"."""
    deaths: list[str] = []

    def judge(sample: Sample) -> Score:
        if sample.id == "s" and len(deaths) < times:
            deaths.append(sample.id)
            return Score(0.0, Verdict.INFRA_ERROR, "the worker died")
        return Score(0.5, Verdict.PASS)

    return judge


@given(
    st.floats(-10, 10).filter(bool),
    st.floats(-10, 10),
    st.floats(-10, 10),
    st.floats(-10, 10),
    st.floats(-10, 10),
)
def test_the_reward_is_the_weighted_sum(
    weight: float, other_weight: float, right: float, wrong: float, form: float
) -> None:
    mixture = Mixture(
        [
            RewardTerm(name="exact_answer", weight=weight, params={"right": right, "wrong": wrong}),
            RewardTerm(name="answer_format", weight=other_weight, params={"right": form}),
        ]
    )
    rewards = mixture.score([sample(r"\boxed{4}"), sample(r"\boxed{5}")])
    expected = [weight * right + other_weight * form, weight * wrong + other_weight * form]
    assert [reward.value for reward in rewards] == pytest.approx(expected)


def test_results_keep_the_order_of_samples_and_the_primary_verdict() -> None:
    mixture = Mixture([RewardTerm(name="exact_answer"), RewardTerm(name="answer_format", weight=0.5)])
    rewards = mixture.score([sample(r"\boxed{5}"), sample(r"\boxed{4} done"), sample("4")])
    assert [reward.value for reward in rewards] == [0.5, 1.0, 0.0]
    assert [reward.verdict for reward in rewards] == [Verdict.WRONG, Verdict.PASS, Verdict.NO_ANSWER]
    assert list(rewards[0].components) == ["exact_answer", "answer_format"]
    assert mixture.score([]) == []


def test_each_domain_gets_its_own_terms() -> None:
    register("code_runs")(lambda sample: Score(7.0, Verdict.PASS))
    mixture = Mixture(
        [
            RewardTerm(name="exact_answer", domains=["math"]),
            RewardTerm(name="exact_answer", domains=["logic"], params={"right": 3.0}),
            RewardTerm(name="code_runs", domains=["code"]),
            RewardTerm(name="answer_format", weight=0.1),
        ]
    )
    rewards = mixture.score([sample(domain="code"), sample(domain="math"), sample(domain="logic")])
    assert [reward.value for reward in rewards] == pytest.approx([7.1, 1.1, 3.1])
    assert [next(iter(reward.components)) for reward in rewards] == [
        "code_runs",
        "exact_answer",
        "exact_answer",
    ]


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_domain_that_nothing_rewards_is_an_error(weight: float) -> None:
    measured = [] if weight else [RewardTerm(name="answer_format", weight=0)]
    mixture = Mixture([*measured, RewardTerm(name="exact_answer", domains=["math"])])
    with pytest.raises(DomainError, match=r"domain 'code' \(sample 's'\).*exact_answer"):
        mixture.score([sample(domain="code")])


def test_rewards_of_weight_0_alone_measure_and_are_worth_nothing() -> None:
    [right, wrong] = Mixture([RewardTerm(name="exact_answer", weight=0)]).score([sample(), sample(completion="6")])
    assert (right.value, right.verdict, right.components["exact_answer"].value) == (0.0, Verdict.PASS, 1.0)
    assert (wrong.value, wrong.verdict) == (0.0, Verdict.NO_ANSWER)


def test_a_component_that_cannot_judge_is_asked_once_more() -> None:
    register("flaky")(fails(times=1))
    [reward] = Mixture([RewardTerm(name="flaky")]).score([sample()])
    assert (reward.value, reward.verdict) == (0.5, Verdict.PASS)


def test_a_sample_that_nobody_can_judge_is_masked_and_never_zero(caplog: pytest.LogCaptureFixture) -> None:
    register("dead")(fails(times=2))
    mixture = Mixture([RewardTerm(name="exact_answer"), RewardTerm(name="dead")])
    rewards = mixture.score([sample(), *good(19)])
    assert rewards[0].value is None
    assert rewards[0].verdict is Verdict.PASS
    assert rewards[0].components["dead"].verdict is Verdict.INFRA_ERROR
    assert math.isnan(rewards[0].components["dead"].value)
    assert all(reward.value == 1.5 for reward in rewards[1:])
    assert "1 of 20 samples masked" in caplog.text


def test_only_the_failed_samples_of_a_batch_are_asked_again() -> None:
    calls: list[list[str]] = []

    @register("batch", batched=True)
    def batch(samples: Sequence[Sample]) -> Sequence[Score]:
        calls.append([sample.id for sample in samples])
        return [
            Score(1.0, Verdict.INFRA_ERROR if sample.id == "good 1" and len(calls) == 1 else Verdict.PASS)
            for sample in samples
        ]

    rewards = Mixture([RewardTerm(name="batch")]).score(good(3))
    assert calls == [["good 0", "good 1", "good 2"], ["good 1"]]
    assert [reward.value for reward in rewards] == [1.0, 1.0, 1.0]


def test_a_reward_that_compares_samples_is_not_asked_of_some_of_them() -> None:
    calls: list[int] = []

    def ranked(samples: Sequence[Sample]) -> Sequence[Score]:
        calls.append(len(samples))
        return [Score(0.5, Verdict.INFRA_ERROR if sample.id == "good 1" else Verdict.PASS) for sample in samples]

    ranked.needs_whole_batch = True  # type: ignore[attr-defined]
    register("ranked", batched=True)(ranked)
    rewards = Mixture([RewardTerm(name="ranked")], infra_error_limit=1.0).score(good(3))
    assert calls == [3]
    assert [reward.value for reward in rewards] == [0.5, None, 0.5]


def test_a_missing_ground_truth_masks_the_sample_and_says_so() -> None:
    mixture = Mixture([RewardTerm(name="exact_answer", params={"wrong": 0.0})])
    rewards = mixture.score([sample(ground_truth=None), *good(19)])
    assert rewards[0].value is None
    assert rewards[0].verdict is Verdict.INFRA_ERROR
    assert "no ground truth" in rewards[0].components["exact_answer"].detail


def test_two_terms_for_one_reward_are_told_apart_by_their_labels() -> None:
    terms = [RewardTerm(name="exact_answer"), RewardTerm(name="exact_answer", label="again", weight=0.5)]
    [reward] = Mixture(terms).score([sample()])
    assert reward.value == 1.5
    assert list(reward.components) == ["exact_answer", "again"]
    with pytest.raises(RewardError, match="need a label each"):
        Mixture([*terms, terms[1]])


def test_too_many_masked_samples_stop_the_run() -> None:
    mixture = Mixture([RewardTerm(name="exact_answer")], infra_error_limit=0.5)
    half = [sample(ground_truth=None, id="bare"), sample()]
    assert mixture.score(half)[0].value is None
    with pytest.raises(InfrastructureError, match=r"66.7%.*50.0%.*'exact_answer' on sample 'bare'.*no ground truth"):
        mixture.score([*half, sample(ground_truth=None)])


def test_a_prompt_that_nobody_can_judge_ends_no_run_of_small_steps_and_a_judge_that_is_gone_does() -> None:
    mixture = Mixture([RewardTerm(name="exact_answer")], infra_error_limit=0.05)
    unusable = [sample(ground_truth=None)] * 16
    bad, good_ones = mixture.score_each(unusable), mixture.score_each([sample()] * 16)
    mixture.refuse_too_many_masked(unusable, bad, [*[good_ones] * 7, bad])
    mixture.refuse_too_many_masked(unusable, bad, [bad])
    for recent, share in (([*[good_ones] * 60, *[bad] * 4], "6.2%"), ([bad, bad], "100.0%")):
        with pytest.raises(InfrastructureError, match=f"{share} of the samples"):
            mixture.refuse_too_many_masked(unusable, bad, recent)
    single = [[one] for one in good_ones] * 15
    mixture.refuse_too_many_masked(unusable[:1], bad[:1], [*single, *[bad[:1]] * 12])
    with pytest.raises(InfrastructureError, match=r"5\.1% of the samples"):
        mixture.refuse_too_many_masked(unusable[:1], bad[:1], [*single, *[bad[:1]] * 13])


def test_a_term_without_weight_measures_and_never_masks_and_that_it_could_not_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    register("dead")(fails(times=100))
    mixture = Mixture([RewardTerm(name="exact_answer"), RewardTerm(name="dead", weight=0.0)])
    [reward] = mixture.score([sample()])
    assert reward.value == 1.0
    assert reward.components["dead"].verdict is Verdict.INFRA_ERROR
    assert "1 values of rewards with weight 0 are missing. The first: reward 'dead'" in caplog.text


def raises(sample: Sample) -> Score:
    raise KeyError("lost")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (raises, "raised KeyError"),
        (lambda sample: 1.0, r"returned 1\.0, not a Score .*: return reward\.Score\(value, reward\.Verdict\.PASS\)"),
        (lambda sample: None, "not a Score"),
        (lambda sample: Score(1.0, "pass"), "not a Score with a Verdict"),  # type: ignore[arg-type]
    ],
)
def test_a_reward_that_breaks_its_contract_is_named(function: Callable[[Sample], Any], why: str) -> None:
    register("broken")(function)
    mixture = Mixture([RewardTerm(name="exact_answer"), RewardTerm(name="broken")])
    with pytest.raises(RewardContractError, match=f"'broken' on sample 's 7': .*{why}"):
        mixture.score([sample(id="s 7")])


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None])
def test_a_value_that_is_no_finite_number_masks_its_sample(value: Any) -> None:
    register("broken")(lambda sample: Score(value if sample.id == "bad" else 1.0, Verdict.PASS))
    mixture = Mixture([RewardTerm(name="broken")], infra_error_limit=0.5)
    bad, good = mixture.score([sample(id="bad"), sample(id="good")])
    assert bad.value is None
    assert "not a finite number" in bad.components["broken"].detail
    assert good.value == 1.0


def unusable(samples: Sequence[Sample]) -> Sequence[Score]:
    raise UnusableAnswer(samples[1].id, "none")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda samples: [Score(1.0, Verdict.PASS)], "1 scores for 3 samples"),
        (lambda samples: [], "0 scores for 3 samples"),
        (lambda samples: Score(1.0, Verdict.PASS), "not a sequence"),
        (lambda samples: None, "not a sequence"),
        (unusable, "good 1.*returns INFRA_ERROR for the one sample"),
    ],
)
def test_a_batched_reward_gives_one_score_for_each_sample(function: Callable[..., Any], why: str) -> None:
    register("broken", batched=True)(function)
    with pytest.raises(RewardContractError, match=f"'broken' on sample .*{why}"):
        Mixture([RewardTerm(name="broken")]).score(good(3))


def test_every_component_is_timed() -> None:
    register("timed")(lambda sample: Score(1.0, Verdict.PASS, seconds=3.0))
    register("batch", batched=True)(lambda samples: [Score(1.0, Verdict.PASS) for _ in samples])
    mixture = Mixture([RewardTerm(name=name) for name in ("timed", "batch", "exact_answer")])
    [reward] = mixture.score([sample()])
    assert reward.components["timed"].seconds == 3.0
    assert 0.0 < reward.components["batch"].seconds < 1.0
    assert 0.0 < reward.components["exact_answer"].seconds < 1.0


def test_a_mixture_is_refused_before_the_run_starts() -> None:
    with pytest.raises(UnknownReward, match="Did you mean 'exact_answer'"):
        Mixture([RewardTerm(name="exact_answers")])
    with pytest.raises(ParameterError, match="Did you mean 'wrong'"):
        Mixture([RewardTerm(name="exact_answer", params={"wrongs": 0})])
    with pytest.raises(RewardError, match="at least one term"):
        Mixture([])
    with pytest.raises(RewardError, match=r"infra_error_limit is a share in \[0, 1\], not 5"):
        Mixture([RewardTerm(name="exact_answer")], infra_error_limit=5)
    with pytest.raises(RewardError, match="same reward and domain"):
        Mixture([RewardTerm(name="exact_answer"), RewardTerm(name="exact_answer", domains=["math"])])


@pytest.mark.parametrize("field", [{"wieght": 2.0}, {"weight": math.nan}, {"weight": math.inf}, {"domains": []}])
def test_a_term_that_would_do_nothing_or_harm_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RewardTerm(name="exact_answer", **field)


def test_a_mixture_can_be_sent_to_another_process() -> None:
    mixture = pickle.loads(pickle.dumps(Mixture([RewardTerm(name="exact_answer")])))
    assert mixture.score([sample()])[0].value == 1.0


@pytest.mark.parametrize(
    "error",
    [
        UnknownReward("a", ["b"]),
        ParameterError("a", "p", "unknown", ["q"]),
        DomainError("code", "s", ["t"]),
        RewardContractError("a", "s", "why"),
        InfrastructureError(0.5, 0.05, "why"),
        UnusableAnswer("s", "why"),
    ],
)
def test_errors_keep_their_message_across_processes(error: RewardError) -> None:
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
