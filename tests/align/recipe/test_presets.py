"""A preset stands for keys that the recipe then spells out; given keys win, but for those that make it what it is."""

from pathlib import Path
from typing import Any, get_args

import pytest

from align.errors import UserError
from align.recipe import GrpoRecipe, dump_recipe, load_recipe
from align.recipe.presets import PRESETS, PresetName, expansion, unclipped

ROOT = Path(__file__).parents[3]
NANO = ROOT / "recipes/nano/grpo.yaml"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def options(*overrides: str) -> Any:
    recipe = load_recipe(NANO, [f"grpo.{override}" for override in overrides])
    assert isinstance(recipe, GrpoRecipe)
    return recipe.grpo


def test_every_name_has_a_preset() -> None:
    assert tuple(PRESETS) == get_args(PresetName)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_spelled_out_in_the_recipe_of_the_run_which_is_read_back_as_it_is(
    name: str, tmp_path: Path
) -> None:
    recipe = load_recipe(NANO, [f"grpo.preset={name}"])
    assert isinstance(recipe, GrpoRecipe)
    for key, value in {**PRESETS[name].usual, **PRESETS[name].defining}.items():
        assert getattr(recipe.grpo, key) == value
    saved = tmp_path / "recipe.yaml"
    saved.write_text(dump_recipe(recipe))
    assert load_recipe(saved) == recipe
    without = recipe.model_dump(mode="json") | {"grpo": recipe.grpo.model_dump(mode="json") | {"preset": None}}
    assert GrpoRecipe.model_validate(without).grpo.model_dump(exclude={"preset"}) == recipe.grpo.model_dump(
        exclude={"preset"}
    )


def test_the_presets_are_those_that_users_know() -> None:
    dapo, gspo, plain = options("preset=dapo"), options("preset=gspo"), options()
    assert (dapo.clip_low, dapo.clip_high, dapo.aggregation, dapo.kl_coefficient) == (0.2, 0.28, "token_mean", 0)
    assert dapo.refill_rounds > 0
    assert (gspo.level, gspo.clip_low, gspo.clip_high, gspo.aggregation) == ("geometric", 3e-4, 4e-4, "sample_mean")
    assert options("preset=dr_grpo").aggregation == "constant_length"
    assert (options("preset=cispo").cispo_max, options("preset=rloo").baseline) == (5.0, "leave_one_out")
    reinforce = options("preset=reinforce++")
    assert (reinforce.baseline, reinforce.advantage_scale) == ("batch", "batch")
    assert options("preset=grpo").model_copy(update={"preset": None}) == plain


def test_a_given_key_wins_and_the_expansion_says_so() -> None:
    found = options("preset=dapo", "clip_high=0.3", "refill_rounds=0")
    assert (found.clip_low, found.clip_high, found.refill_rounds) == (0.2, 0.3, 0)
    text = expansion(found)
    assert text.startswith("grpo.preset: dapo is level: token, clip_low: 0.2, clip_high: 0.3 (given, for 0.28), ")
    assert "refill_rounds: 0 (given, for 10)" in text
    assert "cispo_max" not in text
    assert options("preset=reinforce++", "baseline=group").baseline == "group"
    assert options("preset=cispo", "cispo_max=8").cispo_max == 8


def test_clipping_that_never_happens_is_told_with_a_preset_and_without() -> None:
    never = "with a single update a step (grpo.updates_per_step) all ratios are 1, and nothing is clipped"
    assert expansion(options("preset=grpo")).endswith(f"; {never}")
    assert unclipped(options("clip_low=0.1", "clip_high=0.28")) == f"grpo.clip_low, grpo.clip_high: {never}"
    assert unclipped(options("clip_high=0.28", "updates_per_step=2")) == unclipped(options()) == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["preset=gspo", "level=token"], r"preset: gspo \(.*\) is level: geometric, which level: token contradicts"),
        (["preset=dr_grpo", "advantage_scale=std"], "dr_grpo .* advantage_scale: std contradicts"),
        (["preset=dapo", "aggregation=sample_mean"], "dapo .* aggregation: sample_mean contradicts"),
        (["preset=rloo", "baseline=group"], "rloo .* baseline: group contradicts"),
        (["preset=reinforce++", "advantage_scale=none"], "advantage_scale: none contradicts"),
        (["preset=cispo", "level=sequence", "aggregation=sequence_sum"], "cispo .* level: sequence contradicts"),
        (["preset=gspo", "baseline=leave_one_out"], "gspo .* baseline: leave_one_out contradicts"),
        (["preset=dapo", "cispo_max=5"], "dapo .* has no cispo_max, which"),
        (["preset=ppo"], "grpo.preset"),
        (["baseline=batch"], "advantage_scale: std"),
        (["preset=reinforce++", "refill_rounds=2"], "baseline: batch"),
        (["skip_zero_gradient=true", "kl_coefficient=0.1"], "skip_zero_gradient has no effect"),
        (["correction={kind: icepop, low: 5, high: 0.5}"], r"low \(5.0\) must be below 1 and high \(0.5\)"),
        (["correction={kind: geometric_mask, low: 0.2, high: 0.28}"], r"high \(0.28\) no lower than 1"),
        (["correction={kind: geometric_mask, low: 1.0}"], r"low \(1.0\) must be below 1"),
        (["correction={kind: tis, high: 0.5}"], r"grpo.correction: high \(0.5\) must not be lower than 1"),
        (["correction={kind: mask}"], "grpo.correction.kind"),
        (["correction={king: tis}"], "kind"),
    ],
)
def test_what_contradicts_a_preset_or_itself_is_refused_in_a_sentence(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        options(*given)
    assert "\n" not in str(refused.value).strip()


def test_with_a_balance_loss_every_sample_teaches() -> None:
    with pytest.raises(UserError, match=r"skip_zero_gradient has no effect beside learner\.balance"):
        load_recipe(NANO, ["grpo.skip_zero_gradient=true", "learner.balance.expert=0.001"])


def test_a_corrections_bounds_are_spelled_out() -> None:
    assert options("correction.kind=icepop").correction.model_dump() == {
        "kind": "icepop",
        "level": "token",
        "low": 0.5,
        "high": 5.0,
    }
    found = options("correction={kind: tis, level: sequence, high: 4}").correction
    assert (found.level, found.low, found.high) == ("sequence", None, 4)
    assert options("correction.kind=geometric_mask").correction.level is None
