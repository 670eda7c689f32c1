"""Tasks of lm-evaluation-harness on the nano policy: local ones, some that cannot be had, some that must not run."""

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml

from align.data.chat import encode_prompt
from align.errors import UserError
from align.evaluate import lm_eval
from align.evaluate.hooks import EvaluationError, Metrics, PolicyCheckpoint, check_params, check_ready, run
from align.evaluate.lm_eval import REPORT_TASKS, Harness, HarnessEngine, find_tasks, flatten, runs_code
from align.model.policy import load_policy
from align.recipe import ModelOptions
from align.tasks.arithmetic import generate

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("the extra `evaluation` is not installed", allow_module_level=True)

# With the tests of the hook's own process: the harness and its thousands of task files are read once.
pytestmark = pytest.mark.usefixtures("ray_session")
NO_FLEET: Any = None
NANO_TASKS = Path(__file__).parents[3] / "recipes" / "nano" / "lm_eval"
SUMS = [{"question": f"{i} + 1 =", "choices": ["17", str(i + 1), "3 or 4"], "answer": 1} for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of our own: a choice, a generation, one whose data are not there, and one that is marked as unsafe."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    files = {"train": str(folder / "sums.jsonl"), "test": str(folder / "sums.jsonl")}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = common | {
        "task": "nano_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    generation = common | {
        "task": "nano_generation",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    absent = {**choice, "task": "nano_absent", "dataset_kwargs": {"data_files": {"test": str(folder / "none.jsonl")}}}
    unsafe = choice | {"task": "nano_unsafe", "unsafe_code": True}
    group = {"group": "nano_group", "task": ["nano_choice", "nano_unsafe"]}
    for number, task in enumerate((choice, generation, absent, unsafe, group)):
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(task))
    return folder


def harness(checkpoint: PolicyCheckpoint, tasks: dict[str, int | None], folder: Path, **options: Any) -> Metrics:
    """What the harness says in this process, where the hook starts another one."""
    model = (checkpoint.model, "hf", None, HarnessEngine())
    return Harness().evaluate(
        tasks, folder, model, unsafe_code=False, **{"limit": 8, "apply_chat_template": False} | options
    )


@pytest.fixture(scope="module")
def own_tasks_alone(folder: Path) -> Callable[..., Any]:
    """In the place of `task_manager`: an index without the harness's own tasks, which are thousands of files."""
    index = lm_eval.task_manager(folder, include_defaults=False)
    return lambda *_, **__: index


@pytest.fixture(scope="module")
def outcome(checkpoint: PolicyCheckpoint, folder: Path, own_tasks_alone: Callable[..., Any]) -> Metrics:
    unavailable = dict.fromkeys(["nano_absent", "nano_unsafe", "nano_group"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval, "task_manager", own_tasks_alone)
        return harness(checkpoint, {"nano_choice": None, "nano_generation": 2, **unavailable}, folder)


def likeliest(model: Any, tokenizer: Any, row: Mapping[str, Any]) -> str:
    """The choice of the highest log-likelihood after the question, by transformers alone."""
    scores = []
    for choice in row["choices"]:
        before, whole = (tokenizer(text)["input_ids"] for text in (row["question"], f"{row['question']} {choice}"))
        with torch.no_grad():
            log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        scores.append(sum(float(log_probs[i - 1, whole[i]]) for i in range(len(before), len(whole))))
    return " " + row["choices"][max(range(3), key=scores.__getitem__)]


def test_choices_are_those_that_transformers_finds_likeliest(outcome: Metrics, checkpoint: PolicyCheckpoint) -> None:
    rows = [row for row in outcome.rows if row["task"] == "nano_choice"]
    model = load_policy(checkpoint.model)
    expected = [likeliest(model, checkpoint.tokenizer, row) for row in SUMS[:8]]
    assert [row["completion"] for row in rows] == expected
    right = [choice == f" {i + 1}" for i, choice in enumerate(expected)]
    assert outcome.values["nano_choice/acc"] == sum(right) / 8
    assert [json.loads(row["scores"])["acc"] for row in rows] == right
    assert outcome.values["nano_choice/acc_stderr"] >= 0


def test_a_task_gets_its_shots_and_its_generations_are_kept(outcome: Metrics) -> None:
    rows = [row for row in outcome.rows if row["task"] == "nano_generation"]
    assert [row["id"] for row in rows] == list(range(8))
    assert all(row["prompt"].count(" + 1 = ") == 2 and row["prompt"].endswith(" + 1 =") for row in rows)
    assert all(row["prompt"].endswith(SUMS[row["id"]]["question"]) for row in rows)
    assert 0 <= outcome.values["nano_generation/exact_match"] <= 1


def test_what_cannot_be_had_and_what_must_not_run_is_said_and_is_no_number(outcome: Metrics) -> None:
    assert outcome.not_run.keys() == {"nano_absent", "nano_unsafe", "nano_group"}
    assert "it cannot be loaded: FileNotFoundError" in outcome.not_run["nano_absent"]
    for name in ("nano_unsafe", "nano_group"):
        assert "executes what the model writes" in outcome.not_run[name]
        assert "code_tests" in outcome.not_run[name]
    assert {name.split("/")[0] for name in outcome.values} == {"nano_choice", "nano_generation"}


def test_the_task_of_the_nano_pipeline_asks_test_problems_in_the_words_of_training(
    checkpoint: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(NANO_TASKS.parents[2])
    metrics = harness(checkpoint, {"nano_arithmetic": None}, NANO_TASKS, apply_chat_template=True, limit=4)
    assert metrics.not_run == {}
    assert "nano_arithmetic/exact_match/boxed" in metrics.values
    test = {example.prompt_text: example.answer for example in generate("test", worked_share=0, seed=0)}
    rows = [json.loads(line) for line in (NANO_TASKS / "nano_arithmetic.jsonl").read_text().splitlines()]
    assert len({row["question"] for row in rows}) == 96
    for row in rows:
        assert test[row["question"]] == row["answer"]
    for row, asked in zip(rows, metrics.rows, strict=False):
        prompt = encode_prompt(checkpoint.tokenizer, [{"role": "user", "content": row["question"]}])
        assert checkpoint.tokenizer(asked["prompt"], add_special_tokens=False)["input_ids"] == prompt


def test_the_task_of_the_nano_pipeline_reads_the_last_boxed_number() -> None:
    task = yaml.safe_load((NANO_TASKS / "nano_arithmetic.yaml").read_text())
    pattern = task["filter_list"][0]["filter"][0]["regex_pattern"]
    for text, answers in (
        (r"45-3: 5-3=2, 4-0=4 \boxed{-42}", ["-42"]),
        (r"\boxed{1} \boxed{23}", ["1", "23"]),
        ("42", []),
    ):
        assert re.findall(pattern, text) == answers
    assert task["filter_list"][0]["filter"][0]["group_select"] == -1


def test_the_hook_gives_what_the_harness_says_in_another_process(
    outcome: Metrics, checkpoint: PolicyCheckpoint, ray_session: None, folder: Path
) -> None:
    params = {"tasks": ["nano_choice", "nano_unsafe"], "include_path": folder, "limit": 8}
    metrics = run("lm_eval", checkpoint, NO_FLEET, params)
    assert metrics.values == {name: outcome.values[name] for name in ("nano_choice/acc", "nano_choice/acc_stderr")}
    assert metrics.rows == [row for row in outcome.rows if row["task"] == "nano_choice"]
    assert metrics.not_run == {"nano_unsafe": outcome.not_run["nano_unsafe"]}
    nowhere = replace(checkpoint, model=ModelOptions(path=str(folder / "nowhere")))
    with pytest.raises(UserError, match="nowhere does not exist"):
        run("lm_eval", nowhere, NO_FLEET, params)
    with pytest.raises(EvaluationError, match=r"longer than timeout_s = 0\.5"):
        run("lm_eval", checkpoint, NO_FLEET, params | {"timeout_s": 0.5})


@pytest.mark.slow
def test_the_tasks_of_the_report_are_known_to_the_harness(checkpoint: PolicyCheckpoint, folder: Path) -> None:
    manager = find_tasks(REPORT_TASKS, folder)
    assert {name for name in REPORT_TASKS if runs_code(manager.task_index, name)} == {"humaneval", "mbpp"}
    told = harness(checkpoint, {"humaneval": None}, folder).not_run["humaneval"]
    assert "executes what the model writes" in told


def test_a_task_that_the_harness_does_not_know_gets_the_nearest(
    folder: Path, own_tasks_alone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval, "task_manager", own_tasks_alone)
    with pytest.raises(UserError, match=r"lm_eval: unknown task 'nano_choices' \(did you mean 'nano_choice'\?\)"):
        check_ready("lm_eval", {"tasks": {"nano_choices": 0}, "include_path": folder})


def test_without_the_package_it_says_what_to_install(
    checkpoint: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'moe-align\[evaluation\]'"):
        run("lm_eval", checkpoint, NO_FLEET, {"tasks": ["piqa"]})
    with pytest.raises(UserError, match=r"pip install 'moe-align\[evaluation\]'"):
        check_ready("lm_eval", {"tasks": ["piqa"]})


def test_parameters_are_checked_before_anything_starts(tmp_path: Path) -> None:
    for params, message in (
        ({"tasks": "deepseek_v3_report"}, "tasks.*'deepseek_v2_report'"),
        ({"tasks": ["piqa"], "include_path": tmp_path / "none"}, "include_path: Path does not point to a directory"),
        ({"tasks": ["piqa"], "engine": {"max_lenght": 1}}, "engine.max_lenght: Extra inputs are not permitted"),
        ({"tasks": {"piqa": -1}}, "tasks.*greater than or equal to 0"),
    ):
        with pytest.raises(UserError, match=message):
            check_params("lm_eval", params)
    check_params("lm_eval", {"tasks": "deepseek_v2_report", "backend": "vllm", "engine": {"tensor_parallel": 2}})


def test_the_harness_computes_with_the_cores_that_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("align.run.machine.cores_available", lambda: 2.5)
    monkeypatch.setattr("ray.remote", lambda **options: given.update(options) or MagicMock())
    lm_eval.start_harness(0, unsafe_code=False)
    assert given["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "2"


def test_where_every_gpu_is_taken_the_tasks_are_not_run_and_it_is_told(
    checkpoint: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval, "on_gpus", lambda: True)
    nodes = {"one": {"CPU": 4.0, "GPU": 0.3}, "other": {"GPU": 0.3}, "head": {"CPU": 4.0}}
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: nodes)
    monkeypatch.setattr(lm_eval, "start_harness", lambda gpus, **_: pytest.fail("a harness starts"))
    found = run("lm_eval", checkpoint, NO_FLEET, {"tasks": ["piqa"], "engine": {"gpus": 0.4}})
    assert found.values == {}
    assert (
        "takes 0.4 GPUs beside those of learners and rollout workers, and no node has more than 0.3 free"
        in found.not_run["piqa"]
    )


def test_gpus_that_another_run_took_first_are_not_waited_for_without_end(
    checkpoint: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[Any] = []
    harness = SimpleNamespace(__ray_ready__=SimpleNamespace(remote=lambda: "a call"))
    monkeypatch.setattr(lm_eval, "on_gpus", lambda: True)
    monkeypatch.setattr(lm_eval, "free_gpus", lambda: 8.0)
    monkeypatch.setattr(lm_eval, "start_harness", lambda gpus, **_: harness)
    monkeypatch.setattr("ray.wait", lambda calls, timeout: ([], calls))
    monkeypatch.setattr("ray.kill", killed.append)
    found = run("lm_eval", checkpoint, NO_FLEET, {"tasks": ["piqa"]})
    assert "did not start within 300 s: another run may have taken the 1 GPUs" in found.not_run["piqa"]
    assert killed == [harness]


def test_code_is_found_in_groups_under_tags_and_in_what_a_group_overrides() -> None:
    def entry(kind: str, cfg: dict[str, Any] | None = None, tags: set[str] | None = None) -> Any:
        return SimpleNamespace(kind=SimpleNamespace(name=kind), cfg=cfg, tags=tags or set())

    index = {
        "plain": entry("TASK", {"task": "plain"}, {"a_tag"}),
        "code": entry("TASK", {"task": "code", "unsafe_code": True}),
        "tag": entry("TAG", tags={"plain", "code"}),
        "group": entry("GROUP", {"group": "group", "task": ["plain", {"task": "code", "num_fewshot": 1}]}),
        "outer": entry("GROUP", {"group": "outer", "task": [{"group": "inner", "task": ["plain", "tag"]}]}),
        "changed": entry("GROUP", {"group": "changed", "task": [{"task": "plain", "unsafe_code": True}]}),
        "harmless": entry("GROUP", {"group": "harmless", "task": ["plain", {"group": "inner", "task": ["plain"]}]}),
    }
    assert {name for name in index if runs_code(index, name)} == {"code", "tag", "group", "outer", "changed"}


def test_numbers_are_told_apart_by_task_metric_and_filter() -> None:
    results = {
        "gsm8k": {
            "alias": "gsm8k",
            "sample_len": 5,
            "exact_match,strict-match": 0.5,
            "exact_match_stderr,strict-match": "N/A",
        },
        "mmlu": {"acc,none": 1, "acc_stderr,none": float("nan")},
        "group": {" ": " ", "alias": "group"},
    }
    assert flatten(results) == {"gsm8k/exact_match/strict-match": 0.5, "mmlu/acc": 1.0}


@pytest.mark.slow
def test_vllm_makes_the_same_choices(
    outcome: Metrics, checkpoint: PolicyCheckpoint, ray_session: None, folder: Path
) -> None:
    params = {
        "tasks": ["nano_choice", "nano_unsafe"],
        "include_path": folder,
        "limit": 8,
        "backend": "vllm",
        "engine": {"max_length": 128, "kv_cache_gb": 0.25},
        "unsafe_code": True,
    }
    metrics = run("lm_eval", checkpoint, NO_FLEET, params)
    assert metrics.not_run == {}
    assert metrics.values["nano_choice/acc"] == metrics.values["nano_unsafe/acc"] == outcome.values["nano_choice/acc"]
    choices = [row["completion"] for row in outcome.rows if row["task"] == "nano_choice"]
    assert [row["completion"] for row in metrics.rows if row["task"] == "nano_choice"] == choices
