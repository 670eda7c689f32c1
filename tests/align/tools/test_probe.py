"""`align rewards probe` on answers that are there: what it prints, writes, keeps and refuses. No engine starts."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from align.cli import EXIT_USER_ERROR, main
from align.data.drawing import Source
from align.data.types import Example
from align.evaluate.probe import notes_on
from align.experience import Problem
from align.recipe import GrpoRecipe, ModelOptions, load_stages
from align.stages.commands import check_stages
from align.tools import probe as tools
from align.tools.probe import first_problems
from rollout import FinishReason, Group, Prompt, Trajectory

from ..rows import write_rows

ROOT = Path(__file__).parents[3]
GRPO = "recipes/nano/grpo.yaml"


@pytest.fixture(autouse=True)
def _in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")


def answers(tmp_path: Path, **more: Any) -> str:
    """To four sums a right answer and a wrong one."""
    rows = [
        {
            "id": f"{n}-{said}",
            "prompt": f"What is {n} + 1?",
            "completion": f"\\boxed{{{n + said}}}",
            "answer": str(n + 1),
        }
        | {"domain": "arithmetic"}
        | more
        for n in range(4)
        for said in (1, 2)
    ]
    return str(write_rows(tmp_path / "answers.jsonl", rows))


def hints() -> list[str]:
    """What `align check` says of the recipe, with all else that takes it longer left out."""
    recipe = load_stages(Path(GRPO), [])[-1].recipe
    assert isinstance(recipe, GrpoRecipe)
    return notes_on(recipe.rewards, recipe.model, Path(GRPO))


def test_it_prints_a_table_writes_the_numbers_and_keeps_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, mine = tmp_path / "probe.json", tmp_path / "mine.py"
    mine.write_text("def corrected(sample, other):\n    return f'\\\\boxed{{{sample.ground_truth}}}'\n")
    assert check_stages(load_stages(Path(GRPO), ["machine={}"]), whole=False).hints == [
        f"{GRPO}: {hint}" for hint in hints()
    ]
    (hint,) = hints()
    assert hint.startswith("rewards: exact_answer, answer_format: never")
    assert f"never probed with this model; `align rewards probe {GRPO}`" in hint

    given = ["--answers", answers(tmp_path), "--trick", f"{mine}:corrected", "--out", str(out)]
    assert main(["rewards", "probe", GRPO, *given, "machine={}"]) == 0
    said = capsys.readouterr().out
    assert "exact_answer: 0.500 on average of 4 prompts (8 answers)" in said
    assert "exact_answer pays for 1 of" in said
    assert "one output for all tests" in said.partition("corrected; ")[2].partition("no answer to apply to")[0]
    assert "No trick moves exact_answer" not in said
    assert said.rstrip().endswith(f"the numbers are in {out}")

    effects = {row["trick"]: row for row in json.loads(out.read_text())["effects"] if row["reward"] == "exact_answer"}
    corrected = effects["corrected"]
    assert (corrected["change"], corrected["pays"], corrected["reinforced"]) == (0.5, True, True)
    assert effects["emptied"]["change"] == -0.5
    assert not effects["all values in a box"]["pays"]
    (hint,) = [hint for hint in hints() if "exact_answer" in hint]
    assert hint.endswith(": corrected")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["recipes/nano/sft.yaml", "--answers", "{answers}"], "stage sft trains on no rewards"),
        (["recipes/nano/distill.yaml", "--answers", "{answers}"], "stage grpo trains on no rewards"),
        ([GRPO, "--answers", "{other}"], "no reward with a weight is for answers of the domain 'poetry'"),
        ([GRPO, "--answers", "nowhere.jsonl"], "nowhere.jsonl"),
        ([GRPO, "--answers", "{answers}", "--trick", "corrected"], "--trick: a trick of your own is named by its file"),
        ([GRPO, "--answers", "{answers}", "--trick", "{mine}:doubled"], "two tricks are called 'doubled'"),
        ([GRPO, "--answers", "{answers}", "--out", "{answers}"], "exists already"),
        ([GRPO, "--answers", "{answers}", "--prompts", "8"], "--prompts and --samples have no effect with --answers"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_an_engine_starts(
    arguments: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "mine.py").write_text("def doubled(sample, other):\n    return 2 * sample.completion\n")
    known = {
        "answers": answers(tmp_path),
        "other": answers(tmp_path / "other", domain="poetry"),
        "mine": str(tmp_path / "mine.py"),
    }
    refine = [argument.format(**known) for argument in arguments]
    if "nano/grpo" in refine[0]:
        refine.insert(1, "rewards=[{name: exact_answer, domains: [arithmetic]}]")
    assert main(["rewards", "probe", *refine]) == EXIT_USER_ERROR
    assert why in capsys.readouterr().err


def test_the_prompts_are_those_of_the_first_steps_each_once() -> None:
    problems = [
        Problem(Example(str(n), ({"role": "user", "content": str(n)},), None, None, "d"), Prompt(str(n), [n]))
        for n in range(5)
    ]
    found = first_problems([Source("five", problems, 2)], 0, 4)
    assert len({problem.example.id for problem in found}) == 4
    assert found[:2] == first_problems([Source("five", problems, 2)], 0, 2)
    assert len(first_problems([Source("five", problems, 2)], 0, 99)) == 5


class ParrotFleet:
    """A fleet whose answers are the token ids of their prompts."""

    def wait_until_ready(self) -> None: ...

    def sample(self, prompts: Sequence[Prompt], count: int, sampling: object, **seeds: int) -> Iterator[Group]:
        for prompt in prompts:
            ids = prompt.token_ids
            answers = (
                Trajectory.of_one_turn(prompt, index, ids, [0.0] * len(ids), FinishReason.LENGTH, weight_version=0)
                for index in range(count)
            )
            yield Group(prompt, list(answers))


def test_a_reward_that_cannot_be_used_is_told_before_the_policy_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tools, "running_fleet", lambda *_: pytest.fail("an engine starts"))
    penalty = "rewards=[{name: exact_answer}, {name: soft_overlong, params: {max_length: 4, cache: 9}}]"
    assert main(["rewards", "probe", GRPO, "machine={}", penalty]) == EXIT_USER_ERROR
    assert "rewards: soft_overlong needs 0 < cache <= max_length" in capsys.readouterr().err


def test_without_answers_the_start_policy_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = []

    @contextmanager
    def running(policy: ModelOptions, *others: object) -> Iterator[ParrotFleet]:
        asked.append((policy.path, (Path(policy.path) / "model.safetensors").is_file()))
        yield ParrotFleet()

    monkeypatch.setattr(tools, "running_fleet", running)
    given = ["machine={}", f"run.dir={tmp_path / 'run'}", "--prompts", "3", "--samples", "2"]
    assert main(["rewards", "probe", GRPO, *given]) == 0
    said = capsys.readouterr().out
    assert "sft.yaml has not been run yet: the answers are those of the model before it" in " ".join(said.split())
    assert "exact_answer: 0.000 on average of 3 prompts (6 answers)" in said
    assert "No trick moves exact_answer at all: the answers are all worth the same to it" in " ".join(said.split())
    assert [was_written for _, was_written in asked] == [True]
    assert not (tmp_path / "run").exists()
