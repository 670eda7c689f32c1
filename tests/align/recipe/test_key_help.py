"""Every key of a recipe is in the help of its stage, with the text and the default that it has in the options."""

import pytest

from align.cli import main
from align.recipe import STAGES
from align.recipe.keys import keys_of

from . import sections


def unwrapped(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_has_a_description(stage: str) -> None:
    assert [key.path for key in keys_of(stage) if len(key.description) < 5] == []


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_of_a_stage_has_every_key_with_its_text_and_none_that_is_refused(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([stage.replace("_", "-"), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown, first_words = unwrapped(" ".join(lines)), {line.split()[0].rstrip(":") for line in lines if line.strip()}
    for path, section, name in sections.keys_of(STAGES[stage]):
        if path in STAGES[stage].no_effect:
            assert path not in first_words
        else:
            assert path in first_words
            assert unwrapped(section.model_fields[name].description or "") in shown


def test_defaults_are_those_that_a_recipe_gets(capsys: pytest.CaptureFixture[str]) -> None:
    main(["grpo", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for expected in (
        "  stage (required) ",
        "  seed = 0 ",
        "  model.dtype = float32 ",
        "  rollout.native_rotary = true ",
        "  learner.optimizer.betas = [0.9, 0.95] ",
        "  learner.lora.targets = [attention] ",
        "  data.path  ",
    ):
        assert any(line.startswith(expected) for line in lines), expected
    assert "learner (required): The DeepSpeed learners." in lines
    assert max(map(len, lines)) <= 110


def test_keys_of_a_prefix_are_those_of_all_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "learner.lora."]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("learner.lora [sft, reward_model, dpo, grpo]: train adapters alone")
    assert {line.split()[0] for line in lines[1:] if line.startswith("  learner")} == {
        f"learner.lora.{name}" for name in ("rank", "alpha", "dropout", "targets")
    }
    assert main(["keys", "see"]) == 0
    assert "[" not in capsys.readouterr().out
    assert main(["keys"]) == 0
    everything = capsys.readouterr().out
    assert "  reward_model.margin_scale = 0.0 " in everything
    assert "  preferences.samples = 8 " in everything


def test_a_prefix_of_no_key_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "grop.steps"]) == 2
    assert "no key begins with 'grop.steps' (did you mean 'grpo.steps'?)" in capsys.readouterr().err
