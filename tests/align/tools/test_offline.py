"""`align eval`: the problems of a file, or of a split of a data card, answered on the engines that tests share, by whatever reward."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from align.cli import main
from align.errors import UserError
from align.evaluate.accuracy import Evaluation
from align.model.policy import load_tokenizer
from align.recipe import ModelOptions
from align.tools import offline
from align.tools.offline import asked_in, evaluate_file, problems_of, running_fleet, served
from reward import RewardTerm
from rollout import Fleet, FleetOptions

from ..rows import write_rows

PROBLEM = {"id": "1", "prompt": "1 + 1?", "answer": "2"}


@pytest.fixture(scope="module")
def fleet(policy: ModelOptions, ray_session: None) -> Iterator[Fleet]:
    """The rollout workers that a command gets here in place of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.tools.offline.local_ray", nullcontext)
        options = FleetOptions(workers=1, max_length=512)
        with running_fleet(policy, options, load_tokenizer(policy.path)) as fleet:
            patch.setattr("align.tools.offline.running_fleet", lambda *of: nullcontext(fleet))
            yield fleet


def test_a_policy_answers_a_users_own_file(
    policy: ModelOptions, fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = {"id": "b", "messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4"}
    data, out = write_rows(tmp_path / "problems.jsonl", [PROBLEM, chat]), tmp_path / "answers.jsonl"
    asked = ["eval", "--model", policy.path, "--data", str(data), "--out", str(out)]
    assert main([*asked, "--max-new-tokens", "8"]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["1", "b"]
    assert all({"completion", "reward", "verdict"} <= answer.keys() for answer in answers)
    assert "% of 2 right by exact_answer" in capsys.readouterr().out


def test_a_function_in_a_file_scores_the_answers_to_a_card_and_their_file_again(
    policy: ModelOptions, fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("align.tools.offline.problems_of", lambda data, split: problems_of(data, split)[:8])
    file, out, scores = (tmp_path / name for name in ("mine.py", "answers.jsonl", "scores.jsonl"))
    file.write_text(
        "def short(completions, messages): return [len(m) / (1 + len(c)) for c, m in zip(completions, messages)]\n"
    )
    own = ["--reward", f"{file}:short"]
    asked = ["eval", "--model", policy.path, "--data", "nano_math", "--split", "validation", "--samples", "2"]
    assert main([*asked, "--temperature", "0.7", "--out", str(out), *own, "--max-new-tokens", "8"]) == 0
    assert main(["score", "--data", str(out), "--out", str(scores), *own]) == 0
    answers, again = (list(map(json.loads, path.read_text().splitlines())) for path in (out, scores))
    assert [row["greedy"] for row in answers].count(True) == 8
    assert [row["greedy"] for row in answers].count(False) == 2 * 8
    assert [row["reward"] for row in answers] == [row["value"] for row in again]


def test_a_card_is_asked_by_its_split_that_of_the_test_first() -> None:
    assert {example.id.split("/")[1] for example in problems_of("nano_math", None)} == {"test"}
    assert {example.id.split("/")[1] for example in problems_of("nano_math", "validation")} == {"validation"}
    with pytest.raises(UserError, match="no data card 'nano_maths'"):
        problems_of("nano_maths", None)


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "problems.jsonl", [PROBLEM])
    assert [example.id for example in problems_of(str(file), None)] == ["1"]
    with pytest.raises(UserError, match="which has no splits"):
        problems_of(str(file), "test")


def test_more_new_tokens_than_there_is_room_for_are_told_by_the_options_of_the_command(
    policy: ModelOptions, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "problems.jsonl", [PROBLEM])
    for tokens, message in (
        (512, "--max-new-tokens 512 leaves no room for a prompt in --max-length 512"),
        (511, "raise --max-length"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_file(
                *(policy, str(file), tmp_path / "out.jsonl", FleetOptions(workers=1, max_length=512), tokens),
                RewardTerm(name="exact_answer"),
            )


def test_more_positions_than_the_model_has_are_told_before_engines_start(
    policy: ModelOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "running_fleet", Mock(side_effect=AssertionError))
    file = write_rows(tmp_path / "problems.jsonl", [PROBLEM])
    with pytest.raises(UserError, match=r"--max-length is 999999, and the model has \d+ positions"):
        evaluate_file(
            *(policy, str(file), tmp_path / "out.jsonl", FleetOptions(workers=1, max_length=999_999), 8),
            RewardTerm(name="exact_answer"),
        )


def test_rows_that_the_template_refuses_are_told_together(policy: ModelOptions, tmp_path: Path) -> None:
    brief = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    file = write_rows(tmp_path / "problems.jsonl", [PROBLEM, *({"prompt": brief, "answer": "2"} for _ in range(2))])
    with pytest.raises(
        UserError, match=r"2 of 3 rows cannot be used:\n.*prompt '2'.*\n.*prompt '3'.*\nCorrect them, or take"
    ):
        evaluate_file(
            *(policy, str(file), tmp_path / "out.jsonl", FleetOptions(workers=1, max_length=512), 8),
            RewardTerm(name="exact_answer"),
        )


def test_the_share_that_is_right_is_told_of_the_answers_that_could_be_judged(
    policy: ModelOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = Evaluation(100, 1.0, 8.0, 0.0, verdicts={"infra_error": 90, "pass": 10})
    for name, stand_in in {"running_fleet": nullcontext(Mock()), "ScoringPool": Mock(), "evaluate": found}.items():
        monkeypatch.setattr(offline, name, lambda *_, stand_in=stand_in, **__: stand_in)
    file = write_rows(tmp_path / "problems.jsonl", [PROBLEM])
    told = evaluate_file(
        *(policy, str(file), tmp_path / "out.jsonl", FleetOptions(workers=1, max_length=512), 8),
        RewardTerm(name="exact_answer"),
    )
    assert told.startswith("100.0% of 10 right by exact_answer")
    assert "(90 infra_error, 10 pass)" in told


@pytest.mark.parametrize("trusted", [False, True])
def test_a_model_runs_code_of_its_own_and_has_several_gpus_where_the_command_says_so(
    policy: ModelOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trusted: bool
) -> None:
    asked: list[tuple[ModelOptions, FleetOptions]] = []
    monkeypatch.setattr(
        offline, "evaluate_file", lambda model, data, out, fleet, *of, **named: asked.append((model, fleet))
    )
    monkeypatch.setattr(offline, "doctor", lambda model, fleet, **named: asked.append((model, fleet)))
    said = ["--trust-remote-code"] * trusted
    data = ["--data", "f.jsonl", "--out", str(tmp_path / "out.jsonl"), "--tensor-parallel", "2"]
    assert main(["eval", "--model", policy.path, *data, *said]) == main(["doctor", policy.path, *said]) == 0
    assert [model.trust_remote_code for model, _ in asked] == [trusted, trusted]
    assert [fleet.tensor_parallel for _, fleet in asked] == [2, 1]


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "falcon_mamba", "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 64},
        {"model_type": "qwen2_5_vl"},
        {"model_type": "nobody_knows"},
    ],
)
def test_of_what_transformers_cannot_build_or_has_no_attention_vllm_is_the_judge(
    config: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = FleetOptions(workers=1, max_length=512)
    assert served(ModelOptions(path=str(tmp_path)), given) == given


def test_weights_go_through_an_object_store_that_has_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "sent_bytes", lambda model, lora: 30 * 2**30)
    for free, expected in ((200 * 2**30, 30 * 2**30), (2**26, 0)):
        monkeypatch.setattr(offline, "shared_memory_bytes", lambda free=free: free)
        monkeypatch.setattr(offline, "memory_bytes", lambda: (2**40, 2**40))
        assert offline.sendable_bytes(ModelOptions(path="p")) == expected


def test_the_policy_of_a_run_is_asked_as_in_its_evaluations(tmp_path: Path) -> None:
    usual = asked_in(None)
    assert (usual["max_new_tokens"], usual["dtype"], usual["rollout"]["max_length"]) == (64, "float32", 512)
    # Nobody could raise a limit that long answers meet; a worker that hangs is found by `stall_timeout_s`.
    assert FleetOptions(**usual["rollout"]).batch_timeout_s is None
    recipe = tmp_path / "recipe.yaml"
    for text in ("stage: reward_model", "- damaged"):
        recipe.write_text(text)
        assert asked_in(tmp_path) == usual
    rollout = {"max_length": 2048, "kv_cache_gb": 4.0, "threads": 2}
    text = yaml.safe_dump({"rollout": rollout | {"workers": 3, "batch_timeout_s": 600, "tensor_parallel": 2}})
    recipe.write_text(f"evaluation: {{max_new_tokens: 1024}}\n{text}\nmodel: {{dtype: bfloat16}}")
    assert asked_in(tmp_path) == {
        "max_new_tokens": 1024,
        "dtype": "bfloat16",
        "rollout": rollout,
    }
