"""What a trick does to a reward, where it is known by construction."""

import os
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest

from align.errors import UserError
from align.evaluate.probe import MIXTURE, Effect, keep, kept, notes_on, probe, record_of
from align.recipe import ModelOptions
from align.statistics import Z
from reward import Mixture, Reward, RewardTerm, Sample, Score, Verdict
from reward.registry import _rewards as _registered
from reward.tricks import TRICKS, Trick

MODEL = ModelOptions(path="org/model")
LEAST = 11


def long_enough(sample: Sample) -> Score:
    return Score(float(len(sample.completion) >= LEAST), Verdict.PASS)


def begins_quoted(sample: Sample) -> Score:
    unknown = "?" in sample.completion
    return Score(float(sample.completion.startswith('"')), Verdict.INFRA_ERROR if unknown else Verdict.PASS)


@pytest.fixture(autouse=True)
def _rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for function in (long_enough, begins_quoted):
        reward = Reward(function.__name__, function, "", (), batched=False)
        monkeypatch.setitem(_registered.entries, function.__name__, reward)


def answers(*completions: tuple[str, str]) -> list[Sample]:
    return [Sample(f"{p}#{i}", f"Say {p}.", text, None, "user") for i, (p, text) in enumerate(completions)]


FOUR = answers(("a", "short"), ("a", "a long answer"), ("b", "brief"), ("b", "tiny"), ("c", "a long answer too"))


def one(effects: list[Effect], reward: str, trick: str) -> Effect:
    (found,) = [effect for effect in effects if (effect.reward, effect.trick) == (reward, trick)]
    return found


def effects(*tricks: str, samples: list[Sample] = FOUR, reward: str = "long_enough") -> list[Effect]:
    mixture = Mixture([RewardTerm(name=reward)], infra_error_limit=1.0)
    return probe(mixture, samples, [TRICKS[name] for name in tricks])


def test_a_change_is_a_mean_over_prompts_with_an_interval_by_prompts() -> None:
    """Doubled, one of two answers to a becomes long enough, one of two to b, none to c, which was."""
    found = one(effects("doubled"), "long_enough", "doubled")
    assert (found.prompts, found.changed) == (3, 1.0)
    assert found.before == pytest.approx((0.5 + 0 + 1) / 3)
    assert found.change == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found.interval is not None
    half = Z * sqrt(((0.5 - 1 / 3) ** 2 * 2 + (1 / 3) ** 2) / 2) / sqrt(3)
    assert found.interval == pytest.approx((found.change - half, found.change + half))


def test_the_advantage_is_that_of_changed_answers_in_groups_that_hold_both() -> None:
    found = one(effects("doubled"), "long_enough", "doubled")
    # a: 0 and 1 without the trick, 1 and 1 with it; b: 0 and 0, then 1 and 0; c: all 1, so that none has an advantage.
    in_a, in_b = (1 - 0.75) / (0.5 + 1e-4), (0.5 - 0.25) / (0.5 + 1e-4)
    assert found.advantage == pytest.approx((in_a + in_b + 0) / 3, abs=1e-6)


def test_what_always_helps_pays_and_what_always_hurts_does_not() -> None:
    found = effects("in quotation marks", "emptied", reward="begins_quoted")
    helps = one(found, "begins_quoted", "in quotation marks")
    assert (helps.change, helps.interval, helps.pays, helps.reinforced) == (1.0, None, True, True)
    assert not one(found, "begins_quoted", "emptied").pays


def test_from_a_single_prompt_nothing_is_known() -> None:
    helps = one(effects("in quotation marks", reward="begins_quoted"), "begins_quoted", "in quotation marks")
    single = replace(helps, prompts=1)
    assert (single.change, single.interval, single.pays, single.reinforced) == (1.0, None, False, False)


def test_answers_without_a_score_are_left_out() -> None:
    with_mark = [*FOUR, *answers(("d", "?"))]
    found = one(
        effects("in quotation marks", samples=with_mark, reward="begins_quoted"),
        "begins_quoted",
        "in quotation marks",
    )
    assert found.prompts == 3


def test_several_rewards_have_effects_each_and_together() -> None:
    terms = [
        RewardTerm(name="long_enough", weight=2),
        RewardTerm(name="begins_quoted", domains=["user"]),
    ]
    found = probe(Mixture(terms, infra_error_limit=1.0), FOUR, [TRICKS["in quotation marks"]])
    by_name = {effect.reward: effect.change for effect in found}
    assert list(by_name) == ["long_enough", "begins_quoted", MIXTURE]
    assert by_name[MIXTURE] == pytest.approx(2 * by_name["long_enough"] + 1)


def test_the_other_answer_is_to_another_prompt() -> None:
    seen = []

    def look(sample: Sample, other: Sample) -> str:
        seen.append((sample.prompt, other.prompt))
        return "changed"

    probe(Mixture([RewardTerm(name="long_enough")], infra_error_limit=1.0), FOUR, [Trick("look", look)])
    assert len(seen) == 5
    assert all(mine != theirs for mine, theirs in seen)


@pytest.mark.parametrize(
    ("samples", "function", "change", "why"),
    [
        (FOUR[:2], "long_enough", lambda s, o: "", "two prompts at least"),
        (FOUR, "long_enough", lambda s, o: 5, "returned int"),
    ],
)
def test_what_cannot_be_probed_is_told(
    samples: list[Sample], function: str, change: Callable[..., str], why: str
) -> None:
    mixture = Mixture([RewardTerm(name=function)], infra_error_limit=1.0)
    with pytest.raises(UserError, match=why):
        probe(mixture, samples, [Trick("mine", change)])


def test_a_probe_is_kept_for_a_reward_its_parameters_its_code_and_a_model(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def long_enough(sample, *, least=10):\n    return len(sample.completion) >= least\n")
    term = RewardTerm(name=f"{file}:long_enough", params={"least": 10})
    recipe = Path("my.yaml")
    assert kept(term, MODEL) is None
    assert "`align rewards probe my.yaml`" in notes_on([term], MODEL, recipe)[0]

    keep(record_of(effects("doubled", "in quotation marks"), MODEL.path, 5), [term], MODEL)
    record = kept(term, MODEL)
    assert record is not None
    assert [row["trick"] for row in record["effects"]] == ["doubled", "in quotation marks"]
    assert not any("never probed" in note for note in notes_on([term], MODEL, recipe))

    assert kept(term.model_copy(update={"params": {"least": 11}}), MODEL) is None
    assert kept(term, ModelOptions(path="org/other")) is None
    assert kept(term.model_copy(update={"weight": 2.0}), MODEL) == record
    file.write_text(file.read_text() + "\n# changed\n")
    assert kept(term, MODEL) is None


def test_what_scored_nothing_is_not_kept() -> None:
    unknown = answers(("a", "a?"), ("b", "b?"))
    with pytest.raises(
        UserError, match="none of the 2 answers could be scored: reward 'begins_quoted' on sample 'a#0'"
    ):
        effects("doubled", samples=unknown, reward="begins_quoted")
    terms = [RewardTerm(name="long_enough"), RewardTerm(name="begins_quoted", domains=["poetry"])]
    found = probe(Mixture(terms, infra_error_limit=1.0), FOUR, [TRICKS["doubled"]])
    keep(record_of(found, MODEL.path, 5), terms, MODEL)
    assert kept(terms[0], MODEL) is not None
    assert kept(terms[1], MODEL) is None


def test_a_model_that_is_trained_anew_in_its_place_is_another_one(tmp_path: Path) -> None:
    weights, model, term = tmp_path / "x.safetensors", ModelOptions(path=str(tmp_path)), RewardTerm(name="long_enough")
    weights.write_bytes(b"12")
    os.utime(weights, (1, 1))
    keep(record_of(effects("doubled"), model.path, 5), [term], model)
    assert kept(term, model) is not None
    weights.write_bytes(b"34")
    assert kept(term, model) is None


def test_a_note_names_the_tricks_that_pay() -> None:
    term = RewardTerm(name="begins_quoted")
    found = effects("in quotation marks", "emptied", reward="begins_quoted")
    keep(record_of(found, MODEL.path, 5), [term], MODEL)
    (note,) = notes_on([term], MODEL, Path("my.yaml"))
    assert note.startswith("rewards: begins_quoted pays for tricks")
    assert note.endswith(": in quotation marks")
