"""A recipe is checked before any process starts."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import align.recipe.options
from align.errors import UserError
from align.recipe import STAGES, GrpoRecipe, dump_recipe, kept_recipe, load_pipeline, load_recipe, load_stages
from align.recipe.load import INPUTS, with_inputs_found
from align.session.checks import check_names
from align.shipped import found

NANO = Path(__file__).parents[3] / "recipes" / "nano"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NANO.parents[1])


RECIPES = sorted(NANO.parent.glob("*/*.yaml"))


@pytest.mark.parametrize(
    "file", [f for f in RECIPES if not f.stem.startswith("pipeline")], ids=lambda f: f"{f.parent.name}/{f.stem}"
)
def test_every_recipe_is_valid_and_survives_being_saved(file: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Hello", "chosen": "Hi.", "rejected": "No."}\n')
    made_before = [f"data.path={tmp_path / 'pairs.jsonl'}"] if file.parts[-2:] == ("smollm2", "dpo.yaml") else []
    recipe = load_recipe(file, made_before)
    check_names(recipe.data, recipe.data_stage, recipe.roles())
    saved = tmp_path / "recipe.yaml"
    saved.write_text(dump_recipe(recipe))
    assert load_recipe(saved) == recipe


@pytest.mark.parametrize("size", ["nano", "v2_lite", "v2"])
def test_every_pipeline_is_valid_and_takes_each_product_from_the_stage_that_makes_it(size: str, tmp_path: Path) -> None:
    pipeline = load_pipeline(NANO.parent / size / "pipeline.yaml", [f"run.dir={tmp_path}"])
    by_name = {stage.name: stage.recipe for stage in pipeline.stages}
    assert next(iter(by_name)) == "sft"
    assert by_name["preference"].model.path == str(tmp_path / "reasoning" / "final")
    for stage in pipeline.stages:
        check_names(stage.recipe.data, stage.recipe.data_stage, stage.recipe.roles())


def test_a_loss_of_whole_completions_is_not_divided_by_their_length_again() -> None:
    sequence_level = ["grpo.level=sequence"]
    with pytest.raises(
        UserError, match="sample_mean would divide by the length a second time: set aggregation: sequence_sum"
    ):
        load_recipe(NANO / "grpo.yaml", sequence_level)
    with pytest.raises(UserError, match="token_mean would divide"):
        load_recipe(NANO / "grpo.yaml", [*sequence_level, "grpo.aggregation=token_mean"])
    recipe = load_recipe(NANO / "grpo.yaml", [*sequence_level, "grpo.aggregation=sequence_sum"])
    assert isinstance(recipe, GrpoRecipe)
    assert recipe.grpo.level == "sequence"


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_known_one(tmp_path: Path) -> None:
    file = tmp_path / "grpo.yaml"
    file.write_text((NANO / "grpo.yaml").read_text().replace("  group_size: 16", "  groupsize: 16"))
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if "groupsize" in text)
    with pytest.raises(UserError) as refused:
        load_recipe(file)
    assert f"line {line}: unknown key 'grpo.groupsize' (did you mean 'group_size'?" in str(refused.value)
    assert "missing key 'grpo.group_size'" in str(refused.value)


def test_overrides_are_typed_and_named_when_wrong() -> None:
    recipe = load_recipe(NANO / "grpo.yaml", ["grpo.steps=7", "data.levels=[1, 2]"])
    assert isinstance(recipe, GrpoRecipe)
    assert recipe.grpo.steps == 7
    assert recipe.data[0].levels == [1, 2]
    with pytest.raises(UserError, match=r"grpo\.steps.*integer.*'many'"):
        load_recipe(NANO / "grpo.yaml", ["grpo.steps=many"])
    with pytest.raises(UserError, match="key=value"):
        load_recipe(NANO / "grpo.yaml", ["grpo.steps"])


def test_a_key_of_the_data_is_that_of_their_only_entry_also_in_the_recipe_that_a_run_keeps(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(load_recipe(NANO / "grpo.yaml")))
    assert (
        load_recipe(file, ["data.levels=[1, 2]", "data.params.x=1"]).data
        == load_recipe(file, ["data.0.levels=[1, 2]", "data.0.params.x=1"]).data
    )
    with pytest.raises(UserError, match=r"data is a list and has no entry '7'; its entries are data\.0 to data\.0"):
        load_recipe(file, ["data.7.levels=[1]"])
    with pytest.raises(
        UserError, match=r"data is a list and has no entry 'levels'; its entries are data\.0 to data\.1"
    ):
        load_recipe(file, ["data=[{card: nano_math}, {card: nano_code}]", "data.levels=[1]"])


def test_old_names_of_keys_are_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "recipe.yaml"
    old = (NANO / "grpo.yaml").read_text().replace("  group_size: 16", "  group_size: 16\n  drop_uniform_groups: true")
    file.write_text(old)
    recipe = load_recipe(file, ["take_turns=true", "learner.zero_stage=2", "alarms={uniform_groups: 0.5}"])
    assert isinstance(recipe, GrpoRecipe)
    assert (recipe.grpo.drop_zero_variance_groups, recipe.colocate, recipe.alarms.zero_variance_groups) == (
        True,
        True,
        0.5,
    )
    assert f"{file}: grpo.drop_uniform_groups is called grpo.drop_zero_variance_groups now" in caplog.messages
    assert "take_turns=true: take_turns is called colocate now" in caplog.messages
    line = old[: old.index("drop_uniform_groups")].count("\n") + 1
    file.write_text(old.replace("drop_uniform_groups: true", "drop_uniform_groups: maybe"))
    with pytest.raises(UserError, match=rf"line {line}: grpo\.drop_zero_variance_groups"):
        load_recipe(file)
    file.write_text(
        old.replace("drop_uniform_groups: true", "drop_uniform_groups: true\n  drop_zero_variance_groups: true")
    )
    with pytest.raises(UserError, match="given twice, once by its old name"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.temperature=0", "greedy"),
        ("sampling.max_new_tokens=500", "leaves no room"),
        ("grpo.updates_per_step=5", "equal parts"),
        ("model.init=pretrained", "no weights"),
        ("data.path=/nowhere/x.jsonl", "does not exist"),
        ("learner.zero_stage=4", "zero_stage"),
        ("learner.lora={dropout: 0.1}", "learner.lora.dropout must be 0"),
        ("learner.lora={target: attention}", r"unknown key 'learner.lora.target' \(did you mean 'targets'"),
        ("data.levls=[1]", r"unknown key 'data.levls' \(did you mean 'levels'"),
        ("evaluation={cards: [nano_math, gsm8k], levels: [1]}", "evaluation.levels is for a single data card"),
        ("rewards.7.weight=0", r"rewards is a list and has no entry '7'; its entries are rewards\.0 to rewards\."),
        ("rewards.name=math", "rewards is a list and has no entry 'name'"),
        ("seed.first=1", "seed is a single value and has no key 'first'"),
        ("seed.first.second=1", "seed is a single value and has no key 'first'"),
    ],
)
def test_contradictions_and_missing_files_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(NANO / "grpo.yaml", [override])


def test_numbers_with_an_exponent_are_numbers_wherever_they_are_written(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((NANO / "grpo.yaml").read_text() + "\nscoring: {infra_error_limit: 1e-1}\n")
    given = [
        "rewards=[{name: exact_answer, params: {wrong: -1e-3, right: 2E+1}}]",
        "data=[{card: nano_math, params: {a: 1e3, b: e3}}]",
    ]
    loaded = load_recipe(recipe, [*given, f"model.path={NANO / 'policy'}", "init_from=null"])
    assert isinstance(loaded, GrpoRecipe)
    assert loaded.scoring.infra_error_limit == 0.1
    assert loaded.rewards[0].params == {"wrong": -0.001, "right": 20.0}
    assert loaded.data[0].params == {"a": 1000.0, "b": "e3"}


def test_an_alarm_that_cannot_come_in_sft_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"alarms\.stop: entropy, reward cannot come here \(nothing is sampled to be trained on\)"
    ):
        load_recipe(NANO / "sft.yaml", ["alarms.stop=[entropy, habit, reward]"])


def test_texts_that_look_like_numbers_stay_texts_in_a_run_s_own_copy(tmp_path: Path) -> None:
    recipe = load_recipe(NANO / "sft.yaml", ["name='1e-5'", "seed=7"])
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump_recipe(recipe))
    assert kept_recipe(copy) == recipe
    assert recipe.name == "1e-5"


def test_a_run_that_an_earlier_version_began_keeps_options_that_had_no_effect(tmp_path: Path) -> None:
    copy = tmp_path / "recipe.yaml"
    copy.write_text(
        dump_recipe(load_recipe(NANO / "sft.yaml", ["alarms.stop=[habit]"])).replace("- habit", "- entropy")
    )
    assert kept_recipe(copy).alarms.stop == ["entropy"]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="entropy cannot come here"):
        load_recipe(copy)


def test_experts_are_recorded_where_samples_are_written() -> None:
    with pytest.raises(UserError, match=r"rollout\.record_experts has no effect here \(no samples are written\)"):
        load_recipe(NANO / "preferences.yaml", ["rollout.record_experts=true"])


def test_the_targets_of_lora_are_one_or_several() -> None:
    for given, targets in (
        ("experts", ["experts"]),
        ("[attention, experts.down_proj]", ["attention", "experts.down_proj"]),
    ):
        recipe = load_recipe(NANO / "grpo.yaml", [f"learner.lora={{targets: {given}}}"])
        assert isinstance(recipe, GrpoRecipe)
        assert recipe.learner.lora is not None
        assert recipe.learner.lora.targets == targets


def test_the_data_of_a_recipe_are_one_card_or_several() -> None:
    one, several = load_recipe(NANO / "grpo.yaml"), load_recipe(NANO / "grpo_reasoning.yaml", ["data.1.share=5"])
    assert [data.card for data in one.data] == ["nano_math"]
    assert [(data.card, data.share) for data in several.data] == [("nano_math", 3), ("nano_code", 5)]
    assert several.evaluation_cards == ["nano_math", "nano_code"]
    with pytest.raises(UserError, match=r"unknown key 'data\.1\.crd' \(did you mean 'card'"):
        load_recipe(NANO / "grpo_reasoning.yaml", ["data.1.crd=nano_math"])


def with_reward(directory: Path, name: str) -> Path:
    recipe = directory / "grpo.yaml"
    recipe.write_text((NANO / "grpo.yaml").read_text().replace("name: exact_answer", f"name: {name}"))
    return recipe


def test_a_reward_file_is_found_beside_the_recipe_first_and_the_copy_has_its_whole_path(
    places: tuple[Path, Path],
) -> None:
    beside, working = places
    for directory in places:
        (directory / "mine.py").write_text("def f(sample): return 1\n")
    names = ["init_from=null", f"model.path={NANO / 'policy'}"]
    recipe = load_recipe(with_reward(beside, "mine.py:f"), names)
    assert isinstance(recipe, GrpoRecipe)
    assert recipe.rewards[0].name == f"{beside / 'mine.py'}:f"
    copy = working / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe
    (beside / "mine.py").unlink()
    recipe = load_recipe(beside / "grpo.yaml", names)
    assert isinstance(recipe, GrpoRecipe)
    assert recipe.rewards[0].name == f"{working / 'mine.py'}:f"


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ("{worth: {1: 0.2}}", "rewards.0.params.worth.1: the key 1 is not text"),
        ("{worth: {yes: 1, other: 0}}", "rewards.0.params.worth.True: the key True is not text"),
        ("{worth: {low: .inf}}", "rewards.0.params.worth.low: inf would be null"),
        ("{since: 2026-01-02}", "rewards.0.params.since: 2026-01-02 is a date"),
    ],
)
def test_what_a_resumed_run_would_be_given_as_another_value_is_refused(params: str, said: str, tmp_path: Path) -> None:
    """A run's files are JSON, and have text in the place of such a key or a date."""
    file = tmp_path / "grpo.yaml"
    file.write_text((NANO / "grpo.yaml").read_text())
    with pytest.raises(UserError, match="when the run is resumed") as refused:
        load_recipe(file, [f"rewards=[{{name: exact_answer, params: {params}}}]"])
    assert said in str(refused.value)


def test_a_reward_file_that_is_nowhere_is_named_with_its_line(tmp_path: Path) -> None:
    file = with_reward(tmp_path, "mine.py:f")
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if "mine.py" in text)
    with pytest.raises(UserError) as refused:
        load_recipe(file)
    assert f"{file}, line {line}: rewards.0.name names the file mine.py, which does not exist" in str(refused.value)
    assert f"({tmp_path / 'mine.py'} and {Path('mine.py').absolute()} were tried)" in str(refused.value)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A directory of recipes, and the working directory; both have a file `mine.jsonl`."""
    beside, working = tmp_path / "beside", tmp_path / "working"
    for directory in (beside, working):
        directory.mkdir()
        (directory / "mine.jsonl").write_text("{}\n")
    monkeypatch.chdir(working)
    return beside, working


def recipe_on(directory: Path, data: str) -> Path:
    file = directory / "grpo.yaml"
    text = (NANO / "grpo.yaml").read_text().replace("card: nano_math", f"path: {data}")
    file.write_text(text.replace("recipes/nano/policy", str(NANO / "policy")))
    return file


@pytest.mark.parametrize("pattern", ["mine.jsonl", "min*.jsonl"])
def test_what_is_read_is_found_beside_the_recipe_and_else_from_the_working_directory(
    pattern: str, places: tuple[Path, Path]
) -> None:
    beside, working = places
    file = recipe_on(beside, pattern)
    assert load_recipe(file).data[0].path == beside / pattern
    assert load_recipe(file, [f"data.path={pattern}"]).data[0].path == working / pattern
    (beside / "mine.jsonl").unlink()
    assert load_recipe(file).data[0].path == working / pattern
    (working / "mine.jsonl").unlink()
    with pytest.raises(UserError, match=rf"data.path names {re.escape(pattern)}, which does not exist"):
        load_recipe(file)


def test_a_run_s_own_copy_is_the_same_recipe_from_anywhere(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(recipe_on(places[0], "mine.jsonl"), ["reference=.", "grpo.kl_coefficient=0.1"])
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump_recipe(recipe))
    monkeypatch.chdir("/")
    assert load_recipe(copy) == recipe
    assert recipe.directory == Path("runs/nano-grpo")


def test_files_of_a_pipeline_are_found_beside_it_and_its_own_copy_has_whole_paths(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, _ = places
    recipe_on(beside, "mine.jsonl")
    hook = "evaluation.hooks=[{name: drift}, {name: lm_eval, params: {include_path: ., tasks: [x]}}]"
    stages = [{"name": "a", "recipe": "grpo.yaml", "set": ["init_from=null", "evaluation.path=mine.jsonl", hook]}]
    file = beside / "pipeline.yaml"
    file.write_text(json.dumps({"name": "one", "stages": stages}))
    pipeline = load_pipeline(file, [f"run.dir={tmp_path}"])
    copy = tmp_path / "recipe.yaml"
    copy.write_text(pipeline.text)
    monkeypatch.chdir("/")
    for loaded in (pipeline, load_pipeline(copy)):
        recipe = loaded.stages[0].recipe
        assert isinstance(recipe, GrpoRecipe)
        assert recipe.evaluation.path == beside / "mine.jsonl"
        assert recipe.evaluation.hooks[1].params == {"include_path": str(beside), "tasks": ["x"]}


def test_a_directory_with_any_name_is_that_of_its_stages(tmp_path: Path) -> None:
    place = tmp_path / "exp #1: a, [b] \U0001f680"
    pipeline = load_pipeline(
        found(Path("recipes/nano/pipeline.yaml")), [f"run.dir={json.dumps(str(place), ensure_ascii=False)}"]
    )
    for stage in pipeline.stages:
        assert stage.recipe.directory.parent == place


def test_the_nano_pipeline_can_be_started_by_its_name_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = load_pipeline(found(Path("recipes/nano/pipeline.yaml")))
    [hook] = pipeline.stages[-1].recipe.roles().evaluation.hooks  # type: ignore[union-attr]
    assert hook.params["include_path"] == str(NANO / "lm_eval")
    assert pipeline.directory == tmp_path / "runs" / "nano-pipeline"


def test_every_key_that_holds_a_path_is_looked_for_but_the_run_s_directory() -> None:
    def paths(options: type[BaseModel], at: str) -> Iterator[str]:
        for name, field in options.model_fields.items():
            if "Path" in str(field.annotation):
                yield at + name
            for inner in re.findall(r"[\w.]+Options", str(field.annotation)):
                section = getattr(align.recipe.options, inner.rpartition(".")[2], None)
                if section is not None:
                    yield from paths(section, f"{at}{name}.")

    keys = {key for stage in STAGES.values() for key in paths(stage, "")}
    assert {"data.path", "evaluation.against.run", "init_from", "run.dir"} <= keys
    assert keys - {"run.dir"} <= set(INPUTS)


def test_names_on_the_hub_and_names_of_cards_stay_as_they_are(places: tuple[Path, Path]) -> None:
    (places[0] / "nano_math").mkdir()
    values = {"model": {"path": "org/model"}, "data": [{"card": "nano_math"}, {"path": "hf://org/data"}]}
    assert with_inputs_found(values, "", places[0]) == values


def test_a_run_directory_may_be_in_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe(NANO / "grpo.yaml", ["run.dir=~/runs/x"]).directory == tmp_path / "runs/x"


def test_a_step_s_mean_is_something_to_compare_a_single_completion_with() -> None:
    alone = ["grpo.group_size=1", "grpo.drop_zero_variance_groups=false"]
    load_recipe(NANO / "grpo.yaml", [*alone, "grpo.preset=reinforce++"])
    with pytest.raises(UserError, match="leaves a completion nothing"):
        load_recipe(NANO / "grpo.yaml", alone)
    with pytest.raises(UserError, match="drops every group of one completion"):
        load_recipe(NANO / "grpo.yaml", ["grpo.group_size=1", "grpo.drop_zero_variance_groups=true"])


def test_a_recipe_beside_a_directory_sft_is_no_runs_and_keeps_its_init_from(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    for name, steps in (("sft/recipe.yaml", 3), ("mine.yaml", 5)):
        recipe = load_recipe(NANO / "sft.yaml", [f"sft.steps={steps}"])
        (tmp_path / name).write_text(dump_recipe(recipe))
    (tmp_path / "grpo.yaml").write_text(
        dump_recipe(load_recipe(NANO / "grpo.yaml", [f"init_from={tmp_path}/mine.yaml"]))
    )
    [before, _] = load_stages(tmp_path / "grpo.yaml")
    assert before.recipe.sft.steps == 5  # type: ignore[attr-defined]
