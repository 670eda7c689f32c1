"""`align init`: the recipe that it writes runs as it stands, and says why it is as it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import LlamaConfig

from align.errors import UserError
from align.model.sizes import empty_model, model_sizes
from align.plan.memory import GIB
from align.recipe import load_recipe
from align.tools import init_recipe
from align.tools.init_recipe import fitting, from_, last_answer
from align.tools.recipe_choices import Choice, Facts, Machine, batch, length, steps

from ..rows import write_rows

ROOT = Path(__file__).parents[3]
NANO = str(ROOT / "recipes/nano/policy")
LAPTOP = Machine(cores=4, memory=16 * GIB, gpus=0, gpu_memory=0)
WIDTHS = {"small": (64, 2), "billions": (4096, 32)}


def sizes(width: str) -> Any:
    hidden, layers = WIDTHS[width]
    shape = {"num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 1000}
    config = LlamaConfig(hidden_size=hidden, intermediate_size=4 * hidden, **shape)
    return model_sizes(empty_model(config.to_dict()))


def facts(machine: Machine = LAPTOP, width: str = "small", **changed: Any) -> Facts:
    made = Facts(400, [50, 60], [30, 40], [20, 20], sizes(width), 2048, machine)
    return replace(made, **changed)


def fitted(stage: Any, known: Facts, *overrides: str, lora: bool | None = None) -> tuple[Any, dict[str, Choice]]:
    more = {"grpo": [Choice("rewards", [{"name": "exact_answer"}])], "dpo": [Choice("evaluation.cards", ["nano_math"])]}
    named = [Choice("stage", stage), Choice("name", "a"), Choice("model.path", NANO), Choice("model.init", "random")]
    data = Choice("data.card", "nano_math")
    recipe, choices = fitting(stage, [*named, data, *more.get(stage, [])], known, overrides, Path("a.yaml"), lora)
    return recipe, {choice.key: choice for choice in choices}


@pytest.fixture
def _desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with conversations, as policy the nano one, and the laptop as machine."""
    write_rows(tmp_path / "chat.jsonl", ({"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(40)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: LAPTOP))


def init(out: str = "my_sft.yaml", *overrides: str, model: str = NANO, stage: Any = "sft", **options: Any) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        given = ["model.init=random", "machine.cores=1", *overrides]
        init_recipe.init_recipe(stage, "chat.jsonl", model, Path(out), given, console, **options)
    return captured.get()


@pytest.mark.parametrize("stage", ["sft", "grpo", "dpo", "reward_model"])
@pytest.mark.parametrize(
    ("machine", "width"),
    [
        (LAPTOP, "small"),
        (Machine(64, 400 * GIB, 2, 80 * GIB), "small"),
        (Machine(64, 400 * GIB, 8, 80 * GIB), "billions"),
    ],
)
def test_recipes_are_valid_and_fit_the_machine(stage: Any, machine: Machine, width: str) -> None:
    recipe, choices = fitted(stage, facts(machine, width))
    assert recipe.learner.ranks == max(1, machine.gpus)
    assert recipe.model.dtype == ("bfloat16" if machine.gpus else "float32")
    assert (recipe.learner.lora is None) == (width == "small")
    assert machine.gpus or recipe.machine.memory_gb * GIB <= machine.memory
    assert all(choice.why == "" or "\n" not in choice.why for choice in choices.values())


def test_adapters_are_trained_where_one_asks_or_the_model_is_large() -> None:
    assert fitted("sft", facts())[0].learner.lora is None
    recipe, choices = fitted("sft", facts(), lora=True)
    assert recipe.learner.lora is not None
    assert choices["learner.lora.targets"].why == "adapters are trained: asked for"
    roomy = Machine(64, 4000 * GIB, 0, 0)
    assert fitted("sft", facts(roomy, "billions"))[0].learner.lora is not None
    assert fitted("sft", facts(roomy, "billions"), lora=False)[0].learner.lora is None


def test_memory_is_saved_step_by_step_and_what_does_not_fit_is_refused() -> None:
    """Billions of parameters: adapters, activations computed again, then bfloat16."""
    known = facts(width="billions")
    needs = [fitted("sft", replace(known, machine=Machine(8, memory * GIB, 0, 0)))[0] for memory in (400, 90, 50)]
    assert [recipe.learner.lora is not None for recipe in needs] == [True] * 3
    assert [recipe.model.dtype for recipe in needs] == ["float32", "float32", "bfloat16"]
    with pytest.raises(UserError, match=r"cannot be trained on this machine: it needs .* at least, on 2 cores"):
        fitted("sft", replace(known, machine=Machine(2, 4 * GIB, 0, 0)))


@pytest.mark.parametrize(
    ("counts", "positions", "room", "why"),
    [
        ([10, 100], 512, 128, "the longest needs 100 tokens"),
        ([3], None, 64, "the longest needs 3 tokens"),
        ([100] * 200 + [900], 2048, 128, "99 % need at most 100 tokens; longer ones, up to 900, are left out"),
        ([700], 512, 512, "the model reads no more; the longest needs 700 tokens, and longer ones are left out"),
    ],
)
def test_sequences_have_room_for_what_the_data_need(
    counts: list[int], positions: int | None, room: int, why: str
) -> None:
    assert length("rollout.max_length", counts, positions) == ("rollout.max_length", room, why)


@pytest.mark.parametrize(
    ("overrides", "sampled", "evaluated", "room", "cache"),
    [
        ([], 128, 128, 192, 0.25),
        (["sampling.max_new_tokens=1024"], 1024, 1024, 1088, 0.25),
        (["evaluation={max_new_tokens: 600}"], 128, 600, 640, 0.25),
        (["rollout.max_length=100"], 36, 36, 100, 0.25),
        (["sampling.max_new_tokens=1024", "rollout.max_length=131072"], 1024, 1024, 131072, 0.5),
    ],
)
def test_what_is_chosen_goes_by_the_lengths_that_are_given(
    overrides: list[str], sampled: int, evaluated: int, room: int, cache: float
) -> None:
    recipe, _ = fitted("grpo", facts(positions=None), *overrides)
    assert (recipe.sampling.max_new_tokens, recipe.evaluation.max_new_tokens) == (sampled, evaluated)
    assert (recipe.rollout.max_length, recipe.rollout.kv_cache_gb) == (room, cache)
    assert recipe.learner.micro_batch_tokens == max(room, 1024)


def test_where_a_step_has_fewer_batches_of_the_usual_size_than_workers_each_gets_a_smaller_one() -> None:
    known = facts(Machine(64, 400 * GIB, 8, 80 * GIB))
    assert fitted("grpo", known)[0].rollout.batch_sequences == 32
    assert fitted("grpo", known, "grpo.prompts_per_step=64", "rollout.workers=5")[0].rollout.batch_sequences == 103
    assert fitted("grpo", known, "rollout.concurrent_sequences=64")[0].rollout.batch_sequences == 64
    for recipe in (fitted("grpo", known, "grpo.group_size=32")[0], fitted("sft", known)[0], fitted("grpo", facts())[0]):
        assert "batch_sequences" not in recipe.rollout.model_fields_set


def test_what_is_given_is_read_as_the_recipe_reads_it() -> None:
    recipe, _ = fitted("sft", facts(), 'sft.steps="400"', "model.dtype=fastest", 'rollout.max_length="512"')
    assert (recipe.sft.steps, recipe.sft.validate_every, recipe.rollout.max_length) == (400, 40, 512)


def test_what_is_refused_although_there_is_memory_is_no_reason_to_save_any() -> None:
    with pytest.raises(UserError, match=r"machine\.memory_gb"):
        fitted("sft", facts(), "machine.memory_gb=0.5")


def test_other_choices_go_by_what_is_given_too() -> None:
    recipe, _ = fitted("sft", facts(), "sft.sequences_per_step=4", "model.dtype=bfloat16")
    assert (recipe.sft.steps, recipe.sft.validate_every, recipe.agreement.warn_mean) == (200, 20, 0.08)


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (12, 1), (16, 2), (100, 8), (256, 32), (10**6, 32)])
def test_a_step_takes_a_power_of_two_and_an_epoch_has_eight_steps(rows: int, count: int) -> None:
    assert batch("sft.sequences_per_step", facts(rows=rows), 32).value == count


def test_there_is_a_sequence_for_each_rank() -> None:
    assert batch("sft.sequences_per_step", facts(Machine(64, GIB, 8, 80 * GIB), rows=20), 64).value == 8


def test_two_passes_are_made_or_as_many_steps_as_end_in_time() -> None:
    assert steps("sft", 8, facts(rows=100)) == ("sft.steps", 25, "2 passes over the data")
    assert steps("sft", 32, facts(rows=10**6)) == ("sft.steps", 2000, "0.1 passes over the data")


@pytest.mark.parametrize(("marks", "answer"), [("00110", (2, 4)), ("0110011", (5, 7)), ("000", (3, 3)), ("11", (0, 2))])
def test_the_last_answer_of_a_conversation(marks: str, answer: tuple[int, int]) -> None:
    assert last_answer([mark == "1" for mark in marks]) == range(*answer)


@pytest.mark.usefixtures("_desk")
def test_what_is_written_can_be_read_and_says_why() -> None:
    said = init()
    recipe: Any = load_recipe(Path("my_sft.yaml"))
    text = Path("my_sft.yaml").read_text()
    assert f"  steps: {recipe.sft.steps}  # 2 passes over the data" in text
    assert "form: completion" in said
    assert " 33 " in next(line for line in said.splitlines() if line.startswith(" train "))
    assert [line for line in said.splitlines() if "sft.steps" in line and "2 passes over the data" in line]
    assert said.endswith("my_sft.yaml is written. Next:\n  align sft my_sft.yaml\n")
    assert yaml.safe_load(text)["data"] == {"path": "chat.jsonl"}


@pytest.mark.usefixtures("_desk")
def test_pairs_alone_are_enough_for_dpo() -> None:
    answers = {"chosen": "Here it is, and more.", "rejected": "No."}
    write_rows(Path("chat.jsonl"), ({"prompt": f"Say {n}.", **answers} for n in range(40)))
    said = init("my_dpo.yaml", stage="dpo")
    recipe: Any = load_recipe(Path("my_dpo.yaml"))
    assert (recipe.dpo.pairs_per_step, recipe.dpo.steps, recipe.dpo.validate_every) == (4, 17, 1)
    assert recipe.evaluation.max_new_tokens >= 16
    assert recipe.rollout.max_length >= recipe.evaluation.max_new_tokens + 16
    assert recipe.learner.optimizer.learning_rate == 1e-6
    assert said.endswith("my_dpo.yaml is written. Next:\n  align dpo my_dpo.yaml\n")


@pytest.mark.usefixtures("_desk")
def test_overrides_go_before_what_would_be_chosen() -> None:
    said = init("mine.yaml", "sft.steps=3", "learner.lora.rank=4", "data.held_out=0.2")
    recipe: Any = load_recipe(Path("mine.yaml"))
    assert (recipe.sft.steps, recipe.learner.lora.rank, recipe.data[0].held_out) == (3, 4, 0.2)
    assert "passes over the data" not in said + Path("mine.yaml").read_text()


@pytest.mark.usefixtures("_desk")
def test_longer_answers_than_a_recipe_has_room_for_by_itself_can_be_asked_for() -> None:
    Path("mine.py").write_text("def f(completions): return [1.0] * len(completions)\n")
    init("mine.yaml", "sampling.max_new_tokens=1024", stage="grpo", reward="mine.py:f")
    recipe: Any = load_recipe(Path("mine.yaml"))
    assert recipe.evaluation.max_new_tokens == 1024 < recipe.rollout.max_length


@pytest.mark.usefixtures("_desk")
def test_what_a_run_would_refuse_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with Path("chat.jsonl").open("a") as file:
        file.write('{"prompt": "", "completion": "x"}\n')
    with pytest.raises(UserError, match=r"chat\.jsonl, line 41: .*(.|\n)*data.bad_rows=leave_out"):
        init()
    with pytest.raises(UserError, match=r"unknown key 'sft\.stepz' .*did you mean 'steps'"):
        init("my_sft.yaml", "sft.stepz=3")
    with pytest.raises(UserError, match=r"model\.path names none, which does not exist"):
        init(model="./none")
    assert list(tmp_path.iterdir()) == [tmp_path / "chat.jsonl"]
    assert "1 rows cannot be used, and are left out:" in init("my_sft.yaml", "data.bad_rows=leave_out")


@pytest.mark.usefixtures("_desk")
def test_nothing_is_overwritten_unasked() -> None:
    Path("my_sft.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"my_sft.yaml is there already: name another file with --out"):
        init()
    assert Path("my_sft.yaml").read_text() == "mine"
    init(overwrite=True)
    assert load_recipe(Path("my_sft.yaml")).stage == "sft"
    with pytest.raises(UserError, match="there is no directory none"):
        init("none/my_sft.yaml")


@pytest.mark.usefixtures("_desk")
def test_a_recipe_elsewhere_names_whole_paths(tmp_path: Path) -> None:
    Path("sub").mkdir()
    out = Path("sub/mine.yaml")
    assert from_(Path("mine.yaml"), "chat.jsonl") == "chat.jsonl"
    assert from_(out, "chat.jsonl") == str(tmp_path / "chat.jsonl")
    assert from_(out, "org/model") == "org/model"
    assert from_(out, "exact_answer") == "exact_answer"
    Path("mine.py").write_text("")
    assert from_(out, "mine.py:f") == f"{tmp_path}/mine.py:f"
    assert "align sft sub/mine.yaml" in init("sub/mine.yaml")
    assert load_recipe(out).data[0].path == tmp_path / "chat.jsonl"


@pytest.mark.usefixtures("_desk")
def test_a_run_that_is_there_already_is_told() -> None:
    from align.run import RunDirectory

    RunDirectory.create(Path("runs/my-sft")).enter("sft")
    assert "align sft my_sft.yaml run.overwrite=true  # runs/my-sft holds a run" in init()


@pytest.mark.parametrize(
    ("width", "memory", "cache"), [("small", 80, 0.25), ("billions", 80, 16.0), ("billions", 24, 2.0)]
)
def test_the_cache_of_a_gpu_is_for_many_sequences_and_leaves_room_for_the_weights(
    width: str, memory: int, cache: float
) -> None:
    machine = Machine(cores=16, memory=200 * GIB, gpus=1, gpu_memory=memory * GIB)
    recipe, _ = fitted("grpo", facts(machine, width, prompts=[900, 950]))
    assert recipe.rollout.kv_cache_gb == cache
