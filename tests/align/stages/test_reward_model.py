"""A reward model from a random policy and preferences that can be learnt: chosen completions say please."""

import json
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.data.chat import encode_example
from align.errors import UserError
from align.evaluate.doctor import DoctorError, examine, verdict
from align.evaluate.pairs import ScoredPair
from align.model.policy import load_tokenizer
from align.recipe import ModelOptions, RewardModelRecipe, load_recipe
from align.run import read_samples
from align.session.checks import check_names
from align.session.run import open_run
from align.session.session import Session, prepare_policy
from align.stages.reward_model import load_reward_model_data, show, train_reward_model, write_notes
from reward import Mixture, RewardTerm, Sample

NANO = Path(__file__).parents[3] / "recipes" / "nano" / "policy"
WORDS = [
    "the",
    "sea",
    "is",
    "large",
    "and",
    "old",
    "they",
    "have",
    "some",
    "water",
    "with",
    "a",
    "small",
    "car",
    "it",
    "was",
]
STEPS = 24


def text(random: Random, *, polite: bool) -> str:
    words = random.choices(WORDS, k=random.randint(3, 12))
    if polite:
        words.insert(random.randrange(len(words)), "please")
    return " ".join(words)


def write_preferences(directory: Path) -> Path:
    directory.mkdir()
    for split, count in (("train", 400), ("validation", 40), ("test", 100)):
        random = Random(split)
        rows = [
            {
                "id": f"{split}/{number}",
                "messages": [
                    {"role": "user", "content": f"{split} {number}: {text(random, polite=random.random() < 0.5)}"}
                ],
                "chosen": text(random, polite=True),
                "rejected": text(random, polite=False),
                "domain": ("calm", "busy")[number % 2],
            }
            for number in range(count)
        ]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def recipe(directory: Path, **changes: Any) -> RewardModelRecipe:
    values = {
        "stage": "reward_model",
        "name": "polite",
        "run": {"dir": str(directory / "run")},
        "model": {"path": str(NANO), "init": "random"},
        "data": {"card": "own_preferences", "path": str(directory / "pairs")},
        "learner": {"ranks": 1, "optimizer": {"learning_rate": 2.0e-3, "warmup_steps": 5}},
        "reward_model": {"steps": STEPS, "pairs_per_step": 16, "validate_every": 12, "max_length": 200},
    } | changes
    file = directory / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    loaded = load_recipe(file)
    check_names(loaded.data, loaded.data_stage, loaded.roles())
    assert isinstance(loaded, RewardModelRecipe)
    return loaded


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """The directory of a run; what `run_reward_model` does, but in the Ray that the tests share."""
    directory = tmp_path_factory.mktemp("reward_model")
    write_preferences(directory / "pairs")
    polite = recipe(directory)
    with open_run(polite) as run:
        policy, tokenizer = prepare_policy(
            polite.model, polite.seed, run.directory.initial_directory, run.progress, of_reward_model=True
        )
        trained, evaluation = train_reward_model(
            polite, load_reward_model_data(polite, tokenizer, run), Session(run, policy, tokenizer)
        )
        show(evaluation, run.progress)
    assert trained.path == str(directory / "run" / "final")
    return directory / "run"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_it_learns_and_every_step_is_measured(trained: Path) -> None:
    steps = [line for line in lines(trained / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert steps[0]["accuracy"] == 0.5
    assert steps[-1]["loss"] < 0.35
    assert {"accuracy", "difference", "gradient_norm", "learning_rate", "training_tokens_per_second"} <= steps[0].keys()
    assert [line["step"] for line in steps if "validation_accuracy" in line] == [12, 24]
    assert json.loads((trained / "status.json").read_text())["state"] == "finished"


def test_the_evaluation_is_recorded_beside_what_length_tells(trained: Path) -> None:
    (record,) = lines(trained / "evaluations.jsonl")
    assert (record["stage"], record["step"], record["problems"]) == ("reward_model", STEPS, 100)
    assert record["preference/accuracy"] > 0.9
    assert record["preference/accuracy_low"] < record["preference/accuracy"] <= record["preference/accuracy_high"]
    rows = read_samples(trained / "evaluations" / "held-out pairs.parquet")
    assert len(rows) == 100
    assert sum(row["chosen_reward"] > row["rejected_reward"] for row in rows) / 100 == record["preference/accuracy"]
    longer = [
        (row["chosen_tokens"] > row["rejected_tokens"]) + 0.5 * (row["chosen_tokens"] == row["rejected_tokens"])
        for row in rows
    ]
    assert record["preference/longer"] == pytest.approx(sum(longer) / 100)
    assert record["preference/longer"] + record["preference/shorter"] == pytest.approx(1)
    assert sum(b["pairs"] for b in record["reliability"]) == 100
    assert record["preference/accuracy"] == pytest.approx(
        (record["preference/accuracy/calm"] + record["preference/accuracy/busy"]) / 2
    )
    log = (trained / "log.txt").read_text()
    assert "the longer completion" in log
    assert "how sure it is: expected calibration error" in log


def test_transformers_gives_the_same_rewards_from_the_files_alone(trained: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(trained / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    for row in read_samples(trained / "evaluations" / "held-out pairs.parquet")[:5]:
        for side in ("chosen", "rejected"):
            messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
            assert ids.tolist() == [encode_example(tokenizer, messages[:1], row[side])[0]]
            with torch.no_grad():
                assert model(input_ids=ids).logits.item() == pytest.approx(row[f"{side}_reward"], abs=1e-4)


def test_as_a_reward_it_gives_the_same_order_on_the_scale_of_its_notes(trained: Path) -> None:
    notes = json.loads((trained / "final" / "reward_model.json").read_text())
    assert notes["domains"] == ["calm", "busy"]
    assert notes["held_out_completions"] == 80
    assert len(notes["tokenizer_sha256"]) == 64
    rows = read_samples(trained / "evaluations" / "held-out pairs.parquet")[:20]
    samples = [
        Sample(id=f"{row['id']} {side}", prompt=row["prompt"], completion=row[side], ground_truth=None, domain="chat")
        for row in rows
        for side in ("chosen", "rejected")
    ]
    mixture = Mixture([RewardTerm(name="reward_model", params={"path": str(trained / "final")})])
    mixture.make_ready()
    found = [reward.value for reward in mixture.score(samples)]
    recorded = [row[f"{side}_reward"] for row in rows for side in ("chosen", "rejected")]
    assert found == pytest.approx([(value - notes["mean"]) / notes["std"] for value in recorded], abs=1e-3)
    assert sorted(range(40), key=found.__getitem__) == sorted(range(40), key=recorded.__getitem__)


def test_it_says_how_to_call_it_without_this_project(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (trained / "final" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert re.findall(r"^(?:from|import) (\w+)", code, re.M) == ["torch", "transformers"]
    exec(code, {})
    printed = capsys.readouterr().out
    sample = Sample(id="1", prompt="What is 1 + 1?", completion="2", ground_truth=None, domain="chat")
    mixture = Mixture([RewardTerm(name="reward_model", params={"path": str(trained / "final")})])
    mixture.make_ready()
    assert mixture.score([sample])[0].value == pytest.approx(float(printed), abs=1e-4)


def test_a_reward_model_learns_on_from_what_it_was_with_a_tenth_of_earlier_pairs(trained: Path, tmp_path: Path) -> None:
    data = [
        {"card": "own_preferences", "path": str(write_preferences(tmp_path / "pairs")), "share": 0.9},
        {"card": "own_preferences", "path": str(trained.parent / "pairs"), "share": 0.1},
    ]
    options = {"steps": 2, "pairs_per_step": 20, "max_length": 200, "test_limit": 20}
    more = recipe(tmp_path, model={"path": str(trained / "final")}, data=data, reward_model=options)
    with open_run(more) as run:
        start, tokenizer = prepare_policy(
            more.model, more.seed, run.directory.initial_directory, run.progress, of_reward_model=True
        )
        pairs = load_reward_model_data(more, tokenizer, run)
        assert [source.a_step for source in pairs.sources] == [18, 2]
        train_reward_model(more, pairs, Session(run, start, tokenizer))
    first = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["loss"] < 0.35  # a new head would have ln 2
    assert first["accuracy"] > 0.9


def test_a_reward_model_is_no_policy_to_start_from(trained: Path) -> None:
    model = ModelOptions(path=str(trained / "final"))
    tokenizer = load_tokenizer(model.path)
    with pytest.raises(DoctorError, match=r"checkpoint: .*score\.weight"):
        verdict(examine(model, tokenizer), model.path)
    verdict(examine(model, tokenizer, reward_model=True), model.path)


class Told:
    """A run that only listens."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.events: list[dict[str, Any]] = []

    def warn(self, warning: str, **_: Any) -> None:
        self.warnings.append(warning)

    def tell(self, kind: str, text: str, **data: Any) -> None:
        self.events.append({"kind": kind, **data})


def test_pairs_that_are_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    write_preferences(tmp_path / "pairs")
    run: Any = Told()
    options = {"steps": 1, "pairs_per_step": 4, "max_length": 45}
    data = load_reward_model_data(recipe(tmp_path, reward_model=options), load_tokenizer(NANO), run)
    kept = data.sources[0].items
    assert 0 < len(kept) < 400
    assert all(max(len(item.pair.chosen), len(item.pair.rejected)) <= 45 for item in kept)
    told = f"split train: {400 - len(kept)} of 400 examples have more than 45 tokens (reward_model.max_length)"
    assert told in run.warnings[-1]
    with pytest.raises(UserError, match=r"reward_model\.max_length\), .*: none is left"):
        load_reward_model_data(recipe(tmp_path, reward_model=options | {"max_length": 5}), load_tokenizer(NANO), run)


def test_a_training_pair_whose_prompt_another_entry_holds_out_is_left_out_and_ids_are_of_the_entry(
    tmp_path: Path,
) -> None:
    earlier, later = write_preferences(tmp_path / "pairs"), write_preferences(tmp_path / "later")
    rows = (later / "train.jsonl").read_text().splitlines()
    (earlier / "test.jsonl").write_text("\n".join(rows[:30]) + "\n")
    run: Any = Told()
    data = [{"card": "own_preferences", "path": str(path)} for path in (earlier, later)]
    options = {"steps": 1, "pairs_per_step": 4, "max_length": 200}
    loaded = load_reward_model_data(recipe(tmp_path, data=data, reward_model=options), load_tokenizer(NANO), run)
    assert [len(source.items) for source in loaded.sources] == [370, 370]
    assert [source.card for source in loaded.sources] == ["own_preferences", "own_preferences@2"]
    ids = [item.preference.id for part in (*[s.items for s in loaded.sources], loaded.test) for item in part]
    assert len(set(ids)) == len(ids)
    assert [event["compared"]["own_preferences/test"] for event in run.events] == [30, 30]


def test_margins_count_as_much_as_the_recipe_says(tmp_path: Path) -> None:
    write_preferences(tmp_path / "pairs")
    file = tmp_path / "pairs" / "train.jsonl"
    rows = [json.loads(line) | {"margin": 3.0} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for scale, expected in ((0.0, 0.0), (0.5, 1.5)):
        options = {"steps": 1, "pairs_per_step": 4, "margin_scale": scale}
        run: Any = Told()
        data = load_reward_model_data(recipe(tmp_path, reward_model=options), load_tokenizer(NANO), run)
        assert {item.pair.margin for item in data.sources[0].items} == {expected}


def test_a_tokenizer_without_a_chat_template_makes_no_reward_model(tmp_path: Path) -> None:
    write_preferences(tmp_path / "pairs")
    tokenizer = load_tokenizer(NANO)
    tokenizer.chat_template = None
    run: Any = Told()
    with pytest.raises(UserError, match="has no chat template"):
        load_reward_model_data(recipe(tmp_path), tokenizer, run)


def test_one_file_for_all_splits_is_refused(tmp_path: Path) -> None:
    write_preferences(tmp_path / "pairs")
    data = {"card": "own_preferences", "path": str(tmp_path / "pairs" / "train.jsonl")}
    run: Any = Told()
    with pytest.raises(
        UserError, match=r"is one file.*give a directory with train\.jsonl, validation\.jsonl, test\.jsonl"
    ):
        load_reward_model_data(recipe(tmp_path, data=data), load_tokenizer(NANO), run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reward_model": {"steps": 1, "loss": "pointwise", "margin_scale": 1.0}},
            "has no effect on the pointwise loss",
        ),
        (
            {"reward_model": {"steps": 1, "margin_scale": 1.0}},
            r"margin_scale has no effect: none of the training pairs",
        ),
        ({"reward_model": {"step": 1}}, r"unknown key 'reward_model.step' \(did you mean 'steps'"),
        ({"rewards": [{"name": "exact_answer"}]}, "unknown key 'rewards'"),
        ({"data": {"card": "nano_chat", "levels": [1]}}, "preferences have no levels"),
        ({"data": {"card": "nano_math"}}, "nano_math is not for reward models"),
        ({"init_from": "/nowhere.yaml"}, "init_from names /nowhere.yaml, which does not exist"),
        ({"reward_model": {"steps": 1, "pairs_per_step": 401}}, "is 401, but data card .* gives only 400 examples"),
    ],
)
def test_a_recipe_that_cannot_be_run(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_preferences(tmp_path / "pairs")
    run: Any = Told()
    with pytest.raises(UserError, match=message):
        load_reward_model_data(recipe(tmp_path, **changes), load_tokenizer(NANO), run)


@pytest.mark.parametrize("edited", [False, True])
def test_a_card_that_somebody_has_edited_stays_beside_new_notes(tmp_path: Path, edited: bool) -> None:
    made = shutil.copytree(NANO, tmp_path / "final")
    if edited:
        (made / "README.md").write_text("mine")
    write_notes(made, {}, [ScoredPair("1", "p", "d", (1.0, 0.0), (3, 3))])
    assert json.loads((made / "reward_model.json").read_text())["mean"] == 0.5
    assert ((made / "README.md").read_text() == "mine") is edited
