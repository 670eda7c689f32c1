"""A user's mistake gets one clear message and exit status 2, and leaves nothing behind."""

import errno
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from align.cli import EXIT_USER_ERROR, main
from align.run import RunDirectory

ROOT = Path(__file__).parents[2]
GRPO = "recipes/nano/grpo.yaml"

Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refusal:
    """Runs the command line and returns the error it must end with."""
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> str:
        assert main(arguments) == EXIT_USER_ERROR
        error = capfd.readouterr().err
        assert "Traceback" not in error
        assert not (tmp_path / "run").exists()
        return error[error.index("error: ") :]

    return run


def grpo(tmp_path: Path, *overrides: str) -> list[str]:
    return ["grpo", GRPO, f"run.dir={tmp_path / 'run'}", "init_from=null", "machine={}", *overrides]


def problems(tmp_path: Path, *lines: str) -> str:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    return str(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.0.name=exact_anser", "unknown reward 'exact_anser'. Did you mean 'exact_answer'?"),
        ("rewards.0.params={wrng: 1}", "unknown parameter 'wrng'. Did you mean 'wrong'?"),
        ("rewards.0.name=nowhere.py:f", "rewards.0.name names the file nowhere.py, which does not exist"),
        ("rewards.0.name=recipes/nano/make_policy.py:f", "it has no function 'f'; its functions: "),
        ("data.card=nano_maths", "no data card 'nano_maths'"),
        ("evaluation.cards=[gsm8]", "did you mean 'gsm8k'?"),
        (
            "rewards=[{name: exact_answer, domains: [code]}]",
            "rewards: none with a weight is for the domain 'arithmetic'",
        ),
        ("machine.cores=4096", "this machine is too small: the recipe needs 4096 cores"),
        ("machine.memory_gb=1e6", "GiB of free memory"),
        ("model.path=recipes/nano", "has no config.json"),
        ("data.levels=[9]", "no level 9; there are only 1, 2, 3"),
        ("data.limit=5", "grpo.prompts_per_step is 32, but data card 'nano_math' gives only 5 examples"),
        ("rollout.max_length=50", "tokens, but rollout.max_length leaves room for"),
    ],
)
def test_a_recipe_that_cannot_be_run(override: str, message: str, refusal: Refusal, tmp_path: Path) -> None:
    assert message in refusal(*grpo(tmp_path, override))


def test_a_share_of_data_that_is_too_small(refusal: Refusal, tmp_path: Path) -> None:
    data = "data=[{card: nano_math}, {card: nano_code, share: 0.01}]"
    assert "less than one example a step" in refusal(*grpo(tmp_path, data, "rewards=[{name: answer_format}]"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.0.name=exact_anser", "Did you mean 'exact_answer'?"),
        ("evaluation.split=train", "evaluation.split"),
        ("evaluation.hooks=[{name: needle, params: {length: 3}}]", "unknown parameter 'length'"),
        ("evaluation.hooks=[{name: lm_eval, params: {tasks: [no_such_task]}}]", "no_such_task"),
        ("machine.cores=4096", "this machine is too small: the recipe needs 4096 cores"),
        ("learner.expert_parallel=2", "cannot be divided"),
        ("learner.lora={targets: [no_such_part]}", "has nothing that is called 'no_such_part'"),
        ("model.path={}", "beyond the 64 rows of the model's embedding"),
        ("init_from=recipes/nano/chat_sft.yaml machine.cores=4096", "this machine is too small"),
    ],
)
def test_what_a_run_refuses_before_it_starts_check_refuses_in_the_same_words(
    override: str, message: str, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The harness's own index takes ten seconds to read.
    index = SimpleNamespace(task_index={}, all_tasks=[])
    monkeypatch.setattr("align.evaluate.lm_eval.task_manager", lambda *path, **which: index)
    if "{}" in override:
        shutil.copytree(ROOT / "recipes/nano/policy", tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
        override = override.replace("{}", str(tmp_path / "model"))
    if "expert_parallel" in override:
        shutil.copytree(ROOT / "recipes/nano/policy", tmp_path / "odd")
        config = json.loads((tmp_path / "odd" / "config.json").read_text())
        (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"n_routed_experts": 7}))
        override += f" model.path={tmp_path / 'odd'}"
    command, *arguments = grpo(
        tmp_path, "machine={}", *override.split(" " if " model" in override or "init_from" in override else "\0")
    )
    expected = refusal(command, *arguments)
    assert message in expected
    assert refusal("check", *arguments) == expected


@pytest.mark.parametrize("key", ["grpo.distill.teacher", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tokens", "has other token ids than"),
        ("rows", "has probabilities of 912 token ids, and"),
        ("positions", "has 64 positions, and rollout.max_length is"),
        ("weights", "has no weights (*.safetensors); give a trained model"),
        ("names", "the files have 1 tensors that the architecture does not know and lack"),
        ("gone", " names "),
    ],
)
def test_a_teacher_or_a_reference_that_is_not_for_this_policy_is_refused_before_an_engine_starts(
    key: str, change: str, message: str, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("an engine starts"))
    teacher, policy = tmp_path / "teacher", tmp_path / "policy"
    for directory in (teacher, policy):
        shutil.copytree(ROOT / "recipes/nano/policy", directory)
    (teacher / "model.safetensors").touch()
    if change == "tokens":
        file = teacher / "tokenizer.json"
        tokens = json.loads(file.read_text())
        vocabulary = tokens["model"]["vocab"]
        (one, first), (other, second) = list(vocabulary.items())[-2:]
        vocabulary[one], vocabulary[other] = second, first
        tokens["model"]["merges"] = []
        file.write_text(json.dumps(tokens))
    elif change == "rows":
        file = policy / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 1024}))
    elif change == "positions":
        file = teacher / "config.json"
        config = json.loads(file.read_text()) | {"max_position_embeddings": 64, "rope_scaling": None}
        file.write_text(json.dumps(config))
    elif change == "weights":
        (teacher / "model.safetensors").unlink()
    elif change == "names":  # such as a reward model's
        save_file({"score.weight": torch.zeros(1, 128)}, teacher / "model.safetensors", {"format": "pt"})
    else:
        shutil.rmtree(teacher)
    arguments = grpo(
        tmp_path, f"model.path={policy}", f"{key}={teacher}", *(["grpo.kl_coefficient=0.1"] * (key == "reference"))
    )
    error = refusal(*arguments)
    assert message in error
    assert key in error
    assert refusal("check", *arguments[1:]) == error


def test_every_stage_of_a_file_is_checked(refusal: Refusal, tmp_path: Path) -> None:
    machine = ["machine={}"]
    file = tmp_path / "pipeline.yaml"
    stages = [
        {"name": "sft", "recipe": "recipes/nano/sft.yaml", "set": machine},
        {"name": "math", "recipe": GRPO, "set": ["model={path: '${sft}'}", "machine.cores=4096", "init_from=null"]},
    ]
    file.write_text(json.dumps({"name": "two", "run": {"dir": str(tmp_path / "run")}, "stages": stages}))
    for command in ("check", "pipeline"):
        assert f"error: {ROOT / GRPO}: this machine is too small" in refusal(command, str(file))


def test_a_recipe_without_a_mistake_is_called_valid_and_what_is_still_to_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["check", GRPO, "machine={}", f"run.dir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out == (
        f"{ROOT / 'recipes/nano/sft.yaml'}: a valid sft recipe; its run would go to {tmp_path / 'run' / 'sft'}\n"
        f"{GRPO}: a valid grpo recipe; its run would go to {tmp_path / 'run'}\n"
    )
    assert main(["check", "recipes/nano/pipeline.yaml", f"run.dir={tmp_path}"]) in (0, EXIT_USER_ERROR)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ((errno.EACCES, "Permission denied", "/read-only/out"), "/read-only/out: Permission denied"),
        ((errno.ENOSPC, "No space left on device"), "a file could not be written: No space left on device"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: tuple[Any, ...], told: str
) -> None:
    def merge(*_: object, **__: object) -> None:
        raise OSError(*error)

    monkeypatch.setattr("align.tools.merge.merge_adapter", merge)
    assert main(["merge", "adapter", "/read-only/out"]) == EXIT_USER_ERROR
    assert capsys.readouterr().err == f"error: {told}\n"


def test_a_misspelt_command_or_option_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, nearest in ((["grop", GRPO], "'grpo'"), (["plan", GRPO, "--node", "2"], "--nodes")):
        assert main(arguments) == EXIT_USER_ERROR
        error = capsys.readouterr().err
        assert "error: No such" in error
        assert nearest in error


def test_overrides_may_come_before_and_after_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    options = ["--gpus-per-node", "0"]
    shown = []
    for arguments in ([*options, "name=other"], ["name=other", *options], ["seed=1", *options, "name=other"]):
        main(["plan", GRPO, *arguments])
        shown.append(capsys.readouterr().out)
    assert "\nother (grpo) on one machine without GPUs\n" in shown[0]
    assert len(set(shown)) == 1


def test_help_needs_nothing_heavy() -> None:
    code = "import sys; from align.cli import main; main(['--help']); print({'torch', 'ray', 'vllm', 'rich'} & sys.modules.keys())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "reinforcement learning with GRPO" in shown
    assert shown.endswith("set()\n")


def test_a_model_directory_without_a_tokenizer(refusal: Refusal, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes/nano/policy", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert "has no tokenizer (tokenizer.json)" in refusal(*grpo(tmp_path, f"model.path={tmp_path / 'model'}"))


def test_a_port_in_use(refusal: Refusal, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"learner.port: {port} cannot be used" in refusal(*grpo(tmp_path, f"learner.port={port}"))


def test_a_run_directory_that_holds_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(ROOT)
    RunDirectory.create(tmp_path / "run").finish()
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert main(grpo(tmp_path)) == EXIT_USER_ERROR
    assert "already holds a run, finished" in capfd.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "1", "prompt": "What is 1 + 1?", "answer": "2"}', '{"id": "2", '], "problems.jsonl, line 2: "),
        ([], "problems.jsonl is empty"),
        (
            ['{"id": "1", "prompt": "What is 1 + 1?"}'],
            "problems.jsonl: no row has a ground truth to compare answers with",
        ),
        ([json.dumps({"id": "long", "prompt": "x" * 900, "answer": "2"})], "prompt 'long' has"),
    ],
    ids=["broken line", "empty", "no answer", "longer than the context"],
)
def test_a_file_of_problems_that_cannot_be_used(
    lines: list[str], message: str, refusal: Refusal, tmp_path: Path, policy
) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out.jsonl"
    data = problems(tmp_path, *lines)
    assert message in refusal("eval", "--model", policy.path, "--data", data, "--out", str(out))
    assert not out.exists()


ASK, ANSWER = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
RESULT = {"role": "tool", "content": "2"}
FIRST_ROW, DEEP = 0, 90


def sft(tmp_path: Path, place: int, row: Any, *overrides: str) -> list[str]:
    """Arguments of a run on a file of 100 conversations, of which one is `row`."""
    rows = [{"id": str(n), "messages": [{"role": "user", "content": f"{n} + 1?"}, ANSWER]} for n in range(100)]
    lines = [json.dumps(one) for one in rows]
    lines[place] = row if isinstance(row, str) else json.dumps({"id": str(place)} | row)
    data = problems(tmp_path, *lines)
    return ["recipes/nano/sft.yaml", "machine={}", "rewards=[]", f"data={{path: {data}}}", f"run.dir={tmp_path / 'run'}", *overrides]  # fmt: skip


@pytest.mark.parametrize("place", [FIRST_ROW, DEEP])
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [ASK, {"role": "bot", "content": "2"}]}, "column 'messages', message 2: unknown role 'bot'"),
        ({"messages": [ASK, CALL, ANSWER]}, "column 'messages', message 2: 1 of its tool calls have no result after it"),
        ({"messages": [ASK, RESULT, ANSWER]}, "column 'messages', message 2: a tool's result, and no tool call before it"),
        ({"messages": [ASK, ANSWER | {"content": 2}]}, "column 'messages', message 2: content must be text"),
        ({"messages": [ASK, ANSWER | {"content": [{"type": "image_url"}]}]}, "message 2: content has a part that is no text"),
        ({"messages": [ASK, ANSWER | {"weight": 2}]}, "message 2: weight must be 0 or 1"),
        ({"messages": "1 + 1?"}, "column 'messages' must hold text or a list of messages"),
        ({"messages": []}, "column 'messages' is empty"),
        ({"messages": [ASK, ANSWER], "tools": "{"}, "column 'tools' is not JSON"),
        ({"messages": [ASK, ANSWER], "id": "50"}, "is already that of "),
        ({}, "its columns (id) have no form that is known"),
        ('{"messages": [', "not JSON"),
        ("3", "a JSON int, where each line must be one JSON object"),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_told_with_its_file_line_and_column_wherever_it_is(
    row: Any, said: str, place: int, refusal: Refusal, tmp_path: Path
) -> None:
    error = refusal("check", *sft(tmp_path, place, row))
    named = max(place, 50 if "already" in said else 0) + 1
    assert "1 of 100 rows cannot be used" in error
    assert f"problems.jsonl, line {named}: " in error
    assert said in error


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m.role == 'user') == (loop.index0 % 2 == 1) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("place", [FIRST_ROW, DEEP])
@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([{"role": "system", "content": "Be brief."}, ASK, ANSWER], "refuses messages of system, user: no system role"),
        ([ASK, ASK, ANSWER], "refuses messages of user, user: roles must alternate"),
        ([ANSWER, ASK, ANSWER], "message 1 is the assistant's, and no message of the user comes before it"),
    ],
    ids=["system", "order", "answer first"],
)
def test_a_row_that_the_chat_template_refuses_is_named_before_an_engine_starts(
    turns: list[Any], said: str, place: int, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("an engine starts"))
    shutil.copytree(ROOT / "recipes/nano/policy", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(STRICT)
    arguments = sft(tmp_path, place, {"id": "this one", "messages": turns}, f"model.path={tmp_path / 'model'}")
    error = refusal("sft", *arguments)
    assert "example 'problems/this one'" in error
    assert said in error


def test_a_reward_without_its_column_is_refused_before_an_engine_starts(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("an engine starts"))
    data = problems(tmp_path, *(json.dumps({"prompt": f"{n} + 1?", "unit": "cm"}) for n in range(100)))
    for reward, column in (("exact_answer", "answer"), ("math", "answer"), ("code_tests", "tests")):
        error = refusal(
            *grpo(tmp_path, f"data={{path: {data}}}", f"rewards=[{{name: {reward}}}]", "evaluation={limit: 4}")
        )
        assert f"rewards: {reward} reads the column '{column}', which the data of the domain 'user' lack" in error
        assert "their columns: completion_tokens, messages, unit" in error
        assert "Is " not in error
    own = tmp_path / "own.py"
    own.write_text("def f(completions, prompt): return [0.0 for _ in completions]\n")
    error = refusal(
        *grpo(tmp_path, f"data={{path: {data}}}", f"rewards=[{{name: '{own}:f'}}]", "evaluation={limit: 4}")
    )
    assert "Is 'prompt' the prompt? Read it from `sample.prompt`, or in a function for TRL from `prompts`" in error


def test_an_output_file_is_never_written_over(refusal: Refusal, tmp_path: Path, policy) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    data = problems(tmp_path, '{"id": "1", "prompt": "What is 1 + 1?", "answer": "2"}')
    assert "exists already" in refusal("eval", "--model", policy.path, "--data", data, "--out", str(out))
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0.5"], "--temperature has no effect on greedy answers"),
        (["--split", "test", "--out", "out.jsonl"], "is a file, which has no splits"),
        ([], "is in no run, below which the answers would be written"),
        (["--reward", "nowhere.py:f", "--out", "out.jsonl"], "the reward file nowhere.py does not exist"),
    ],
)
def test_options_of_an_evaluation_that_do_nothing_or_name_nothing(
    arguments: list[str], message: str, refusal: Refusal, tmp_path: Path, policy: Any
) -> None:
    data = problems(tmp_path, '{"id": "1", "prompt": "1 + 1?", "answer": "2"}')
    assert message in refusal("eval", "--model", policy.path, "--data", data, *arguments)


def test_what_is_scored_is_a_run_or_a_file(refusal: Refusal, tmp_path: Path) -> None:
    for arguments in ([], [str(tmp_path), "--data", "x.jsonl"]):
        assert "give either a run directory or --data FILE" in refusal("score", *arguments, "--reward", "exact_answer")
    assert "holds no run" in refusal("score", str(tmp_path), "--reward", "exact_answer")


@pytest.mark.parametrize("params", ["{partial", "[1]", "{1: 2}"])
def test_parameters_of_a_reward_that_are_no_mapping(params: str, refusal: Refusal, tmp_path: Path) -> None:
    data = problems(tmp_path, '{"id": "1", "completion": "x", "answer": "2"}')
    out = str(tmp_path / "out.jsonl")
    arguments = ["score", "--reward", "exact_answer", "--params", params, "--data", data, "--out", out]
    assert "is no mapping of names to values" in refusal(*arguments)


def test_a_time_limit_is_for_a_function_of_ones_own(refusal: Refusal, tmp_path: Path) -> None:
    data = problems(tmp_path, '{"id": "1", "completion": "x", "answer": "2"}')
    out = str(tmp_path / "out.jsonl")
    said = refusal("score", "--reward", "exact_answer", "--timeout", "5", "--data", data, "--out", out)
    assert "--timeout is a number of seconds for a call of a function in a file, and exact_answer is none" in said


def test_a_run_that_has_finished_or_is_none_cannot_be_resumed(refusal: Refusal, tmp_path: Path) -> None:
    assert "holds no run" in refusal("resume", str(tmp_path / "nowhere"))
    done = RunDirectory.create(tmp_path / "done")
    done.save_recipe("{stage: pipeline, stages: []}")
    done.finish()
    assert "has finished" in refusal("resume", str(tmp_path / "done"))
