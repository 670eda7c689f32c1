"""`align check` reads the data as a run does: what it calls valid, the run does not refuse."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.cli import EXIT_USER_ERROR, main
from align.errors import UserError
from align.recipe import load_stages
from align.stages import commands
from align.stages.commands import check_stages

OWN = ["machine={}", "evaluation.limit=8"]
MADE = ["model={path: '${a}'}", "data={card: own_preferences, path: '${b}/arithmetic'}"]


def chats(count: int, *others: dict[str, Any]) -> list[dict[str, Any]]:
    said = [[("user", f"Say {n}."), ("assistant", str(n))] for n in range(count)]
    return [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in said] + list(others)


def found(tmp_path: Path, stage: str, rows: list[dict[str, Any]], *overrides: str, whole: bool = False) -> Any:
    """What is found in the recipe of a stage on a file of these rows, or without any, on the file as it is."""
    file = tmp_path / "mine.jsonl"
    if rows:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [*OWN, f"data={{path: {file}}}", f"run.dir={tmp_path / 'run'}", *overrides]
    return check_stages(load_stages(Path(f"recipes/nano/{stage}.yaml"), given), whole=whole)


def sft(tmp_path: Path, rows: list[dict[str, Any]], *overrides: str, whole: bool = False) -> Any:
    return found(tmp_path, "sft", rows, "rewards=[]", "sft.sequences_per_step=8", *overrides, whole=whole)


def test_what_a_preset_stands_for_is_shown(tmp_path: Path) -> None:
    given = [*OWN, "init_from=null", "grpo.preset=gspo", "grpo.clip_high=0.01", f"run.dir={tmp_path / 'run'}"]
    [shown] = [
        n for n in check_stages(load_stages(Path("recipes/nano/grpo.yaml"), given), whole=False).notes if "preset" in n
    ]
    assert shown == (
        "recipes/nano/grpo.yaml: grpo.preset: gspo is advantage_scale: std, clip_low: 0.0003, clip_high: 0.01 (given, for 0.0004), "
        "baseline: group, level: geometric, aggregation: sample_mean; with a single update a step (grpo.updates_per_step) all ratios are 1, and "
        "nothing is clipped"
    )


DEVELOPER = {
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hm."},
        {"role": "assistant", "content": "x"},
    ]
}


def test_rows_that_the_template_refuses_are_named(tmp_path: Path) -> None:
    for path in ("mine.jsonl", "mine*.jsonl"):
        with pytest.raises(UserError, match=r"recipes/nano/sft.yaml: .*1 of \d+ rows cannot be used:(.|\n)*mine/41"):
            sft(tmp_path, chats(40, DEVELOPER), f"data.path={tmp_path}/{path}")
    warnings = sft(
        tmp_path, chats(40, DEVELOPER), f"data={{path: {tmp_path}/mine.jsonl, bad_rows: leave_out}}"
    ).warnings
    assert any("1 of" in text and "cannot be encoded, and are left out" in text for text in warnings)


def test_rows_after_the_first_are_looked_at_where_the_whole_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "FIRST_ROWS", 40)
    assert sft(tmp_path, chats(60, {"messages": "none"})).warnings == []
    with pytest.raises(UserError, match=r"mine\.jsonl, line 61"):
        sft(tmp_path, [], whole=True)
    with pytest.raises(UserError, match=r"mine\.jsonl, line 61"):
        sft(tmp_path, [], "sft.sequences_per_step=31")


def test_a_step_that_takes_more_than_there_is_and_rows_without_room_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sft.sequences_per_step is 64, but .* gives only 1\d examples"):
        sft(tmp_path, chats(20), "sft.sequences_per_step=64")
    long = [{"prompt": f"Say {n}.", "completion": "very " * 40} for n in range(20)]
    with pytest.raises(UserError, match="none is left; give them more room"):
        sft(tmp_path, long, "rollout.max_length=24", "evaluation.max_new_tokens=1")


def test_what_is_still_to_be_made_or_on_the_hub_is_named_and_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pipeline.yaml"
    stages = [
        {"name": "a", "recipe": "recipes/nano/sft.yaml", "set": OWN},
        {"name": "b", "recipe": "recipes/nano/grpo.yaml", "set": [*OWN, "init_from=null", "model={path: '${a}'}"]},
        {"name": "c", "recipe": "recipes/nano/reward_model.yaml", "set": ["machine={}", *MADE]},
    ]
    file.write_text(json.dumps({"name": "two", "run": {"dir": str(tmp_path / "run")}, "stages": stages}))
    assert main(["check", str(file)]) == 0
    said = capsys.readouterr().out
    assert f"grpo.yaml: not looked at: model.path: {tmp_path}/run/a/final is still to be made" in said
    assert "reward_model.yaml: not looked at: data that are still to be made" in said
    assert main(["check", "recipes/nano/sft.yaml", *OWN, "rewards=[]", "data={card: math}"]) == 0
    assert "the rows of data card math, which are on the hub; --whole reads them" in capsys.readouterr().out


def test_check_and_the_run_refuse_in_the_same_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chats(20, DEVELOPER)))
    recipe = ["recipes/nano/sft.yaml", *OWN, f"data={{path: {file}}}", f"run.dir={tmp_path / 'run'}", "rewards=[]"]
    said = []
    for command in ("check", "sft"):
        assert main([command, *recipe, "sft.sequences_per_step=8"]) == EXIT_USER_ERROR
        error = capfd.readouterr().err.rpartition("error: ")[2].removeprefix("recipes/nano/sft.yaml: ")
        said.append(re.sub(r"template of \S+", "template of MODEL", error))
    assert said[0] == said[1]
    assert "mine/21" in said[0]


def test_rows_of_a_level_may_all_be_behind_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "FIRST_ROWS", 30)
    rows = [{"prompt": f"Say {n}.", "answer": "1", "level": 1 + (n >= 100)} for n in range(140)]
    given = ["init_from=null", "rewards=[{name: exact_answer}]", "grpo.prompts_per_step=8"]
    found(tmp_path, "grpo", rows, *given, f"data={{path: {tmp_path / 'mine.jsonl'}, levels: [2]}}")


@pytest.mark.parametrize(
    ("recipe", "given"),
    [
        ("reward_model", ["data={path: '${a}/arithmetic'}", "init_from=null"]),
        ("sft", ["data={path: '${a}/arithmetic'}", "rewards=[]"]),
        ("sft", ["data={path: '${a}/x'}", "evaluation={path: '${a}/arithmetic', limit: 8}", "rewards=[]"]),
    ],
)
def test_data_that_a_stage_before_makes_need_no_card(tmp_path: Path, recipe: str, given: list[str]) -> None:
    (tmp_path / "pipeline.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "p",
                "stages": [
                    {"name": "a", "recipe": "recipes/nano/sft.yaml", "set": OWN},
                    {
                        "name": "b",
                        "recipe": f"recipes/nano/{recipe}.yaml",
                        "set": ["machine={}", "model={path: '${a}'}", *given],
                    },
                ],
            }
        )
    )
    stages = load_stages(tmp_path / "pipeline.yaml", [f"run.dir={tmp_path / 'run'}"])
    assert any("still to be made" in note for note in check_stages(stages, whole=False).notes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "guard={learned: exact_anser, trusted: exact_answer}",
            r"guard\.learned: no reward .* 'exact_anser' \(did you mean 'exact_answer'",
        ),
        ("guard={learned: a, trusted: b}", "guard: its two rewards judge samples of no domain in common"),
        (
            "evaluation.against={run: recipes, judge: nobody}",
            "evaluation.against.judge: no reward of the recipe is called 'nobody'",
        ),
    ],
)
def test_components_that_a_recipe_names_are_those_of_its_rewards(tmp_path: Path, override: str, message: str) -> None:
    terms = [("a", "a"), ("a", "arithmetic"), ("b", "b"), ("exact_answer", "user")]
    named = ", ".join(f"{{name: exact_answer, label: {label}, domains: [{domain}]}}" for label, domain in terms)
    rows = [{"prompt": f"Say {n}.", "answer": "1"} for n in range(40)]
    given = ["init_from=null", "grpo.prompts_per_step=8", f"rewards=[{named}]"]
    with pytest.raises(UserError, match=message):
        found(tmp_path, "grpo", rows, *given, override)
    # A name may be that of several terms.
    found(tmp_path, "grpo", rows, *given, "rewards.2.domains=[arithmetic]", "guard={learned: a, trusted: b}")
