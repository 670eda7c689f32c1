"""`align score`: completions in, one line of score each out."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.types import Example
from align.errors import UserError
from align.experience import ScoredTrajectory, row_of
from align.run import RunDirectory, read_jsonl, write_samples
from align.tools.score_file import default_out, rows_of, sample_of_line, score_file, score_run
from reward import RewardTerm, SampleReward, Score, Verdict
from rollout import FinishReason, Prompt, Trajectory

from ..rows import write_rows

EXACT = RewardTerm(name="exact_answer")


def lines(tmp_path: Path, *rows: Any) -> Path:
    return write_rows(tmp_path / "completions.jsonl", rows)


def scores(tmp_path: Path) -> list[dict[str, Any]]:
    """What was written of each completion."""
    return read_jsonl(tmp_path / "out.jsonl")


def test_every_line_gets_value_verdict_and_detail(tmp_path: Path) -> None:
    data = lines(
        tmp_path,
        {"id": "right", "completion": r"\boxed{4}", "ground_truth": "4"},
        {"id": "wrong", "completion": r"\boxed{5}", "ground_truth": "4"},
        {"id": "unusable", "completion": r"\boxed{5}"},
    )
    summary = score_file(EXACT, data, tmp_path / "out.jsonl")
    right, wrong, unusable = scores(tmp_path)
    assert (right["id"], right["value"], right["verdict"].lower()) == ("right", 1.0, "pass")
    assert (wrong["value"], wrong["detail"]) == (0.0, "'5' is not '4'")
    assert unusable["value"] is None, "what nobody could judge is never 0"
    assert {"seconds"} <= right.keys()
    assert "3 completions, mean value 0.500" in summary


def test_a_prompt_that_is_the_json_text_of_messages_is_read_as_in_training(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    data = lines(tmp_path, {"id": "1", "prompt": json.dumps(messages), "completion": "4"})
    [row] = rows_of(data)
    sample = sample_of_line(row)
    assert sample.prompt == "What is 2 + 2?"
    said = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "What is 2 + 2?"}]
    [row] = rows_of(lines(tmp_path, {"id": "1", "messages": said, "completion": "4"}))
    assert sample_of_line(row) == sample
    assert sample.metadata["messages"] == messages


@pytest.mark.parametrize(
    ("term", "row", "value"),
    [
        (RewardTerm(name="math"), {"completion": r"\boxed{0.00001}", "ground_truth": 1e-05}, 1.0),
        (EXACT, {"completion": r"\boxed{4}", "answer": "4", "ground_truth": ["for the reward"]}, 1.0),
        (RewardTerm(name="exact_answer", params={"right": 5.0}), {"completion": r"\boxed{4}", "answer": "4"}, 5.0),
    ],
    ids=["a number", "a truth called answer", "a parameter"],
)
def test_truths_and_parameters_reach_the_reward(
    tmp_path: Path, term: RewardTerm, row: dict[str, Any], value: float
) -> None:
    score_file(term, lines(tmp_path, {"id": "1", **row}), tmp_path / "out.jsonl")
    assert scores(tmp_path)[0]["value"] == value


def test_rows_as_ifeval_publishes_them_are_scored_and_an_odd_one_is_masked_alone(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    row = {
        "prompt": "Is it good to walk?",
        "response": "It is good for most of us.",
        "instruction_id_list": ["punctuation:no_comma"],
    }
    data = lines(
        tmp_path,
        {**row, "key": 1000, "kwargs": [{"num_words": None}]},
        {**row, "key": 1001, "kwargs": [{}], "response": "Yes, it is."},
        {**row, "key": 1002, "kwargs": [{}], "instruction_id_list": ["length_constraints:number_words"]},
    )
    summary = score_file(RewardTerm(name="instructions"), data, tmp_path / "out.jsonl")
    found = scores(tmp_path)
    assert [(one["id"], one["value"], one["verdict"]) for one in found] == [
        ("1000", 1.0, "pass"),
        ("1001", 0.0, "wrong"),
        ("1002", None, "infra_error"),
    ]
    assert "['num_words', 'relation']" in found[2]["detail"]
    assert "3 completions, mean value 0.500" in summary


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": ', "completions.jsonl, line 1"),
        ({"id": "1"}, "line 1: completion is missing"),
        ({"id": [1], "completion": "x"}, "line 1: id must be text, not list"),
        ({"id": "1", "completion": "x", "prompt": 7}, "line 1: prompt must be text, not int"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        score_file(EXACT, lines(tmp_path, row), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_an_unknown_reward_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    data = lines(tmp_path, {"id": "1", "completion": "x"})
    with pytest.raises(UserError, match="Did you mean 'exact_answer'"):
        score_file(RewardTerm(name="exact_anser"), data, tmp_path / "out.jsonl")
    empty = lines(tmp_path)
    with pytest.raises(UserError, match="is empty"):
        score_file(EXACT, empty, tmp_path / "out.jsonl")


def stored(completion: str, index: int, **fields: Any) -> dict[str, Any]:
    """A completion as a run stores it, of a problem with a unit."""
    example = Example("p", ({"role": "user", "content": "How far?"},), None, "3", "math", metadata={"unit": "m"})
    trajectory = Trajectory.of_one_turn(Prompt("p", [1]), index, [5], [-1.0], FinishReason.STOP)
    reward = SampleReward(0.25, Verdict.WRONG, {"math": Score(0.25, Verdict.WRONG)})
    return row_of(example, ScoredTrajectory(trajectory, completion, reward)) | fields


@pytest.fixture
def says_unit(tmp_path: Path) -> RewardTerm:
    file = tmp_path / "my_rewards.py"
    file.write_text("def says_unit(sample): return float(sample.metadata['unit'] in sample.completion.split())\n")
    return RewardTerm(name=f"{file}:says_unit")


def test_what_align_eval_wrote_is_scored_again_with_the_columns_of_the_data(
    tmp_path: Path, says_unit: RewardTerm
) -> None:
    data = lines(tmp_path, stored("3 m", 0, greedy=True), stored("3 km", 0, greedy=False))
    score_file(says_unit, data, tmp_path / "out.jsonl")
    found = scores(tmp_path)
    assert [(one["id"], one["greedy"], one["value"]) for one in found] == [("p#0", True, 1.0), ("p#0", False, 0.0)]


def test_a_reward_of_several_samples_gets_those_of_a_prompt_together(tmp_path: Path) -> None:
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "import reward\n\n@reward.batched\ndef count(samples): return [float(len(samples)) for _ in samples]\n"
    )
    rows = [{"id": str(n), "prompt": prompt, "completion": "a"} for n, prompt in enumerate(["P", "P", "Q", "P"])]
    score_file(RewardTerm(name=f"{file}:count"), lines(tmp_path, *rows), tmp_path / "out.jsonl")
    assert [one["value"] for one in scores(tmp_path)] == [2.0, 2.0, 1.0, 1.0]


def test_a_file_that_cannot_be_written_is_told_before_anything_is_scored(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"/file/out\.jsonl cannot be written"):
        score_file(
            EXACT, lines(tmp_path, {"id": "1", "completion": "4", "answer": ["4"]}), tmp_path / "file" / "out.jsonl"
        )


def test_a_runs_stored_samples_give_the_curve_of_another_reward(tmp_path: Path, says_unit: RewardTerm) -> None:
    run = RunDirectory.create(tmp_path / "run")
    for step, texts in {2: ["3 km", "3 m"], 10: ["3 m", "4 m"]}.items():
        write_samples(run.samples_file(step), [stored(text, index) for index, text in enumerate(texts)])
    out = default_out(run.path, "says_unit")
    said = list(score_run(says_unit, run.path, out))
    assert said[:2] == [
        "step 2: 0.5000 by says_unit, 0.2500 in the run",
        "step 10: 1.0000 by says_unit, 0.2500 in the run",
    ]
    found = read_jsonl(out)
    assert [(one["step"], one["id"], one["value"], one["reward"]) for one in found][1:3] == [
        (2, "p#1", 1.0, 0.25),
        (10, "p#0", 1.0, 0.25),
    ]
    assert default_out(run.path, "says_unit").name == "says_unit-2.jsonl", "nothing is written over"
    run.interrupt()
    RunDirectory.reopen(run.path)  # what was scored afterwards is no foreign file


def test_the_answers_to_a_prompt_are_scored_together_as_in_training(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from reward import batched\n@batched\ndef shortest(samples):\n"
        "    least = min(len(s.completion) for s in samples)\n    return [len(s.completion) == least for s in samples]\n"
    )
    run = RunDirectory.create(tmp_path / "run")
    rows = [stored(text, n % 2) | {"id": f"p{n // 2}"} for n, text in enumerate(["aa", "a", "aaaa", "aaa"])]
    write_samples(run.samples_file(1), rows)
    term = RewardTerm(name=f"{tmp_path / 'mine.py'}:shortest")
    assert next(iter(score_run(term, run.path, tmp_path / "out.jsonl"))).startswith("step 1: 0.5000 by")


def test_samples_of_an_earlier_version_are_scored_as_far_as_they_go(tmp_path: Path, says_unit: RewardTerm) -> None:
    run = RunDirectory.create(tmp_path / "run")
    old = {key: value for key, value in stored("3 m", 0).items() if key != "metadata"}
    write_samples(run.samples_file(1), [old])
    said = list(score_run(says_unit, run.path, tmp_path / "out.jsonl"))
    assert said[0].endswith("1 of 1 not scored")
    assert "is of an earlier version, which stored no columns of the data" in said[1]
    assert "KeyError: 'unit'" in said[2]


def test_a_directory_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has stored no samples of steps"):
        list(score_run(EXACT, tmp_path, tmp_path / "out.jsonl"))
    with pytest.raises(UserError, match="holds no run"):
        default_out(tmp_path, "exact_answer")
