"""What a run leaves for others: a card that says what its model is made of, and both in a repository that nobody else's files are lost from."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from align.cli import main
from align.model.policy import load_tokenizer
from align.model.reward_model import write_usage
from align.report.model_card import is_edited

from .hub import Hub, Repository, serving

TOKEN = "hf_planted0planted0planted0"
POLICY = Path(__file__).parents[3] / "recipes" / "nano" / "policy"
WEIGHTS = b"weights " * 1000


def make_run(path: Path, stage: str = "grpo", model: str | dict[str, Any] = "org/base-7b", **recipe: Any) -> Path:
    """A finished run without its engines."""
    (path / "final").mkdir(parents=True)
    for file in POLICY.iterdir():
        (path / "final" / file.name).write_bytes(file.read_bytes())
    (path / "final" / "model.safetensors").write_bytes(WEIGHTS)
    keys = {"stage": stage, "name": path.name, "model": {"path": model} if isinstance(model, str) else model}
    keys |= {"data": [{"card": "gsm8k", "path": None}], "run": {"dir": str(path)}, **recipe}
    (path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    (path / "environment.json").write_text(json.dumps({"python": "3.11.7", "packages": {"torch": "2.13.0"}}))
    metrics = [{"step": step, "stage": stage, "time": 0, "reward": step / 10, "loss": 0.5} for step in range(1, 11)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    evaluations = [
        {
            "stage": stage,
            "step": step,
            "name": name,
            "accuracy": right / 200,
            "problems": 200,
            "verdicts": {"pass": right},
        }
        for step, name, right in ((0, "before GRPO", 20), (10, "after GRPO", 150))
    ]
    evaluations.append(
        {"stage": stage, "step": 10, "name": "after GRPO: mine", "hook": "mine", "degenerate_share": 0.5}
    )
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    status = {"state": "finished", "stage": stage, "started": "2026-01-01", "ended": "2026-01-02", "error": None}
    (path / "status.json").write_text(json.dumps(status))
    return path


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub({TOKEN}, readers={"hf_reads"})) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        disable_progress_bars()
        yield hub
        enable_progress_bars()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "sums")


def card(run: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a run's card, written now."""
    assert main(["publish", str(run)]) == 0
    _, front, text = (run / "final" / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `align publish` says, in one line, where it refuses."""
    assert main(["publish", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert TOKEN not in told
    return told


def test_the_front_matter_is_what_the_hub_reads(run: Path) -> None:
    about, _ = card(run)
    [result] = about.pop("model-index")[0]["results"]
    assert about == {
        "base_model": "org/base-7b",
        "datasets": ["openai/gsm8k"],
        "library_name": "transformers",
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["moe-align", "grpo"],
    }
    assert result["dataset"]["type"] == "openai/gsm8k"
    assert result["metrics"][0]["value"] == 0.75
    assert result["metrics"][0]["name"] == "accuracy of 200 held-out problems (95 % interval 0.686 to 0.805)"


def test_its_interval_is_of_the_answers_that_could_be_judged(run: Path) -> None:
    file = run / "evaluations.jsonl"
    file.write_text(file.read_text().replace('{"pass": 150}', '{"pass": 135, "infra_error": 20}'))
    [result] = card(run)[0]["model-index"][0]["results"]
    assert result["metrics"][0]["name"] == "accuracy of 180 held-out problems (95 % interval 0.682 to 0.808)"


def test_the_text_has_data_evaluations_curves_and_how_to_load_it(run: Path) -> None:
    _, text = card(run)
    assert (
        "| grpo | GSM8K, grade-school mathematics in words | MIT | https://github.com/openai/grade-school-math |"
        in text
    )
    assert "| after GRPO | 10 | 200 | 75.0% (68.6% to 80.5%) |" in text
    assert "| step | 1 | 3 | 5 | 8 | 10 |" in text
    assert "| reward | 0.1 | 0.3 | 0.5 | 0.8 | 1 |" in text
    assert 'AutoModelForCausalLM.from_pretrained("sums"' in text
    assert "vllm serve sums" in text
    assert "Python 3.11.7, torch 2.13.0" in text
    assert "PeftModel" not in text


def test_it_says_where_another_policy_than_these_weights_was_evaluated(run: Path, tmp_path: Path) -> None:
    rounded = make_run(tmp_path / "rounded", weights={"precision": "int8"})
    assert "weights rounded to int8, as in training; the weights here are not rounded." in card(rounded)[1]
    assert "rounded" not in card(run)[1]


def test_it_names_the_teacher_of_a_distillation_and_heeds_its_licence(run: Path, tmp_path: Path) -> None:
    small = base(tmp_path / "small", "mit")
    teacher = make_run(tmp_path / "larger", model=base(tmp_path / "large", "cc-by-nc-4.0"))
    card(teacher)
    student = make_run(tmp_path / "student", model=small, grpo={"distill": {"teacher": str(teacher / "final")}})
    about, text = card(student)
    assert "Trained from `small` (licence: mit) by grpo" in text
    assert "Distilled from the teacher `larger` (licence: made-of-non-commercial-sources)" in text
    assert about["license_name"] == "made-of-non-commercial-sources"
    assert text.count("> **Not for commercial use:** it was made of larger") == 1
    named = make_run(tmp_path / "named", model=small, grpo={"distill": {"teacher": "org/large"}})
    assert "the teacher [org/large](https://huggingface.co/org/large) (licence: unknown)" in card(named)[1]
    assert "teacher" not in card(run)[1]


def test_of_an_adapter_it_says_how_peft_loads_it(run: Path) -> None:
    (run / "final" / "adapter").mkdir()
    assert 'PeftModel.from_pretrained(base_model, "sums", subfolder="adapter")' in card(run)[1]


def test_of_a_reward_model_it_says_how_to_call_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "judge", "reward_model")
    (run / "final" / "reward_model.json").write_text('{"mean": 1.5, "std": 2.0}')
    write_usage(run / "final", load_tokenizer(run / "final"), 1.5, 2.0)
    about, text = card(run)
    assert about["pipeline_tag"] == "text-classification"
    assert "path = 'judge'" in text
    assert "AutoModelForSequenceClassification" in text
    assert "return (model(input_ids=ids).logits.item() - 1.5) / 2.0" in text
    assert "AutoModelForCausalLM" not in text


def test_of_a_reward_model_it_has_the_accuracy_on_held_out_pairs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "judge", "reward_model")
    (run / "final" / "reward_model.json").write_text('{"mean": 1.5, "std": 2.0}')
    numbers = {"accuracy": 0.8, "accuracy_low": 0.72, "accuracy_high": 0.86, "difference": 1.3, "longer": 0.5}
    evaluation = {"step": 10, "name": "held-out pairs", "problems": 128} | {
        f"preference/{k}": v for k, v in numbers.items()
    }
    (run / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    _, text = card(run)
    assert "| evaluation | step | problems | preference/accuracy | preference/longer |" in text
    assert "| held-out pairs | 10 | 128 | 80.0% (72.0% to 86.0%) | 50.0% |" in text


def test_no_place_of_this_machine_and_no_secret_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "planted-planted")
    rewards = [{"name": "/home/me/my_rewards.py:f", "params": {"api_key": "k", "url": "planted-planted"}}]
    run = make_run(tmp_path / "own", data=[{"path": str(tmp_path / "mine.jsonl"), "card": None}], rewards=rewards)
    _, text = card(run)
    assert "the file mine.jsonl" in text
    assert "name: my_rewards.py:f" in text
    for hidden in (str(tmp_path), "/home/me", "planted", "api_key: k"):
        assert hidden not in text


def test_of_runs_that_were_moved_together_it_knows_both_and_of_a_base_that_is_gone_its_name(tmp_path: Path) -> None:
    first = make_run(tmp_path / "all" / "sft", "sft", base(tmp_path / "small", "mit"))
    make_run(tmp_path / "all" / "grpo", model=str(first / "final"))
    (tmp_path / "all").rename(tmp_path / "archive")
    shutil.rmtree(tmp_path / "small")
    _, text = card(tmp_path / "archive" / "grpo")
    assert "Trained from `small`" in text
    assert str(tmp_path) not in text
    assert "stage: sft" in text


def test_data_of_the_hub_and_of_an_evaluation_of_its_own_are_called_by_their_names(tmp_path: Path) -> None:
    data = [{"path": "org/dolly", "card": None}, {"path": "hf:/datasets/org/name@main/a/*.jsonl", "card": None}]
    front, text = card(make_run(tmp_path / "run", data=data, evaluation={"path": str(tmp_path / "held_out.jsonl")}))
    assert front["datasets"] == ["org/dolly", "org/name"]
    assert "file dolly" not in text
    [result] = front["model-index"][0]["results"]
    assert result["dataset"]["name"] == "held_out.jsonl"


def base(path: Path, licence: str, *more: str) -> str:
    path.mkdir()
    (path / "README.md").write_text("\n".join(["---", f"license: {licence}", *more, "---", ""]))
    return str(path)


def test_the_licence_is_that_of_the_base_where_everything_is_known(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model=base(tmp_path / "small", "apache-2.0"))
    about, text = card(run)
    assert about["license"] == "apache-2.0"
    assert "Trained from `small` (licence: apache-2.0)" in text
    assert "Unknown licence" not in text


def test_a_licence_with_a_name_is_given_as_the_hub_wants_it(tmp_path: Path) -> None:
    named = base(tmp_path / "lite", "other", "license_name: deepseek", "license_link: https://deepseek.com/LICENSE")
    about, text = card(make_run(tmp_path / "run", model=named))
    assert (about["license"], about["license_name"]) == ("other", "deepseek")
    assert about["license_link"] == "https://deepseek.com/LICENSE"
    assert "Trained from `lite` (licence: deepseek)" in text
    # What is made of that model passes the licence on as well.
    about, _ = card(make_run(tmp_path / "second", model=str(tmp_path / "run" / "final")))
    assert (about["license"], about["license_name"]) == ("other", "deepseek")


def test_an_unknown_licence_is_called_unknown(tmp_path: Path) -> None:
    data = [{"path": "mine.jsonl", "card": None}]
    about, text = card(make_run(tmp_path / "run", model=base(tmp_path / "small", "mit"), data=data))
    assert about["license"] == "unknown"
    assert "> **Unknown licence:** that of the file mine.jsonl is not known here." in text
    about, text = card(make_run(tmp_path / "new", model={"path": "recipes/nano/policy", "init": "random"}))
    assert (about["license"], about.get("base_model")) == ("unknown", None)
    assert "Trained from new weights" in text


def test_a_licence_that_forbids_commercial_use_is_passed_on_from_data_base_and_earlier_runs(tmp_path: Path) -> None:
    data_card = tmp_path / "stories.md"
    kept = (POLICY.parents[2] / "data_cards" / "gsm8k.md").read_text()
    data_card.write_text(kept.replace("name: gsm8k", "name: stories").replace("licence: MIT", "licence: CC BY-NC 4.0"))
    first = make_run(
        tmp_path / "first", "sft", base(tmp_path / "small", "mit"), data=[{"card": str(data_card), "path": None}]
    )
    second = make_run(tmp_path / "second", model=str(first / "final"))
    third = make_run(tmp_path / "third", model=base(tmp_path / "research", "cc-by-nc-4.0"))
    for run, licence in ((first, "CC BY-NC 4.0"), (second, "CC BY-NC 4.0"), (third, "cc-by-nc-4.0")):
        about, text = card(run)
        assert (about["license"], about["license_name"]) == ("other", "made-of-non-commercial-sources")
        assert "> **Not for commercial use:**" in text
        assert f"whose licence is {licence}." in text


def test_an_edited_card_stays_unless_a_new_one_is_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card(run)
    file = run / "final" / "README.md"
    assert not is_edited(file)
    edited = file.read_text().replace("license: unknown", "license: mit")
    file.write_text(edited)
    assert main(["publish", str(run)]) == 0
    assert "was edited, and stays as it is" in capsys.readouterr().out
    assert file.read_text() == edited
    assert main(["publish", str(run), "--new-card"]) == 0
    assert "license: unknown" in file.read_text()


def test_a_card_of_ones_own_without_front_matter_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = run / "final" / "README.md"
    own.write_text("# My model\n")
    assert main(["publish", str(run)]) == 0
    assert "was edited, and stays as it is" in capsys.readouterr().out
    assert own.read_text() == "# My model\n"


def test_it_is_pushed_whole_in_one_commit_to_a_private_repository(run: Path, hub: Hub) -> None:
    assert main(["publish", str(run), "--to", "me/sums"]) == 0
    made = hub.repositories["me/sums"]
    assert (made.private, made.commits) == (True, 1)
    assert made.files == {file.name: file.read_bytes() for file in (run / "final").iterdir()}
    assert 'from_pretrained("me/sums"' in made.files["README.md"].decode()
    assert list(hub.objects.values()) == [WEIGHTS]


def test_no_place_of_this_machine_is_pushed(tmp_path: Path, hub: Hub) -> None:
    data_card = tmp_path / "stories.md"
    kept = (POLICY.parents[2] / "data_cards" / "nano_math.md").read_text()
    data_card.write_text(kept.replace("name: nano_math", "name: stories"))
    run = make_run(tmp_path / "judge", "reward_model", evaluation={"cards": [str(data_card)]})
    notes = {"mean": 1.5, "std": 2.0, "data": [{"card": str(data_card)}, {"path": str(tmp_path / "mine.jsonl")}]}
    base = str(tmp_path / "sft" / "final")
    written = {
        "reward_model.json": json.dumps(notes),
        "adapter/adapter_config.json": json.dumps({"base_model_name_or_path": base, "r": 4, "revision": None}),
        "adapter/README.md": f"---\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n---\n",
    }
    (run / "final" / "adapter").mkdir()
    for name, text in written.items():
        (run / "final" / name).write_text(text)
    assert main(["publish", str(run), "--to", "me/judge"]) == 0
    files = hub.repositories["me/judge"].files
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert json.loads(files["reward_model.json"])["data"] == [{"card": "stories.md"}, {"path": "mine.jsonl"}]
    assert json.loads(files["adapter/adapter_config.json"]) == {
        "base_model_name_or_path": "sft",
        "r": 4,
        "revision": None,
    }
    assert "base_model: sft\n" in files["adapter/README.md"].decode()
    assert b"    name: stories\n" in files["README.md"]
    assert {name: (run / "final" / name).read_text() for name in written} == written


def test_where_the_hubs_client_has_xet_the_weights_go_that_way(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upload(*, additions: list[Any], **_: Any) -> None:
        for addition in additions:
            hub.objects[addition.upload_info.sha256.hex()] = Path(addition.path_or_fileobj).read_bytes()

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("huggingface_hub._commit_api._upload_xet_files", upload)
    assert main(["publish", str(run), "--to", "me/sums"]) == 0
    assert hub.repositories["me/sums"].files["model.safetensors"] == WEIGHTS
    assert not any("objects" in asked for asked in hub.asked)


def test_it_is_public_where_that_is_asked_for(run: Path, hub: Hub) -> None:
    assert main(["publish", str(run), "--to", "me/sums", "--public"]) == 0
    assert not hub.repositories["me/sums"].private


def test_files_that_are_there_are_replaced_only_where_that_is_asked_for(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["me/sums"] = Repository(private=True, files={"README.md": b"theirs", "other.txt": b"theirs"})
    told = refused(capsys, str(run), "--to", "me/sums")
    assert "me/sums has files (README.md, other.txt): --overwrite replaces those of the same names" in told
    assert hub.repositories["me/sums"].files["README.md"] == b"theirs"
    assert main(["publish", str(run), "--to", "me/sums", "--overwrite"]) == 0
    assert hub.repositories["me/sums"].files["other.txt"] == b"theirs"
    assert hub.repositories["me/sums"].files["README.md"] != b"theirs"


@pytest.mark.parametrize(
    ("private", "arguments", "told"),
    [(False, [], "is public: give --public"), (True, ["--public"], "is private, and --public")],
)
def test_a_repository_that_is_there_stays_as_visible_as_it_is(
    private: bool, arguments: list[str], told: str, run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["me/sums"] = Repository(private)
    assert told in refused(capsys, str(run), "--to", "me/sums", *arguments)
    assert hub.repositories["me/sums"].commits == 0


@pytest.mark.parametrize(
    ("token", "told"),
    [
        (None, "no token for the hub: run `hf auth login`"),
        ("hf_wrong", "the hub refused (401): the token is invalid"),
        ("hf_reads", "the hub refused (403): the token may not write to me/sums"),
    ],
)
def test_a_token_that_is_missing_or_no_good_is_told(
    token: str | None,
    told: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    assert told in refused(capsys, str(run), "--to", "me/sums")


def test_a_change_in_the_meantime_is_told_and_nothing_is_committed(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.changes_meanwhile = True
    assert "me/sums was changed while this was uploaded; nothing was committed" in refused(
        capsys, str(run), "--to", "me/sums"
    )
    assert hub.repositories["me/sums"].files == {}


def test_without_a_network_it_is_one_sentence(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "me/sums could not be pushed to http://127.0.0.1:9: " in refused(capsys, str(run), "--to", "me/sums")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--to", "sums"], "--to sums: write it with whose it is, like my-name/sums"),
        (["--to", "me/su ms"], "--to me/su ms: "),
        (["--public"], "--public and --overwrite have no effect without --to"),
    ],
)
def test_what_cannot_be_pushed_to_is_refused_before_a_card_is_written(
    arguments: list[str], told: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(capsys, str(run), *arguments)
    assert not (run / "final" / "README.md").exists()


def test_what_is_not_finished_or_has_no_model_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run / "status.json"
    status.write_text(status.read_text().replace("finished", "failed"))
    assert "is failed, so its recipe and what is in" in refused(capsys, str(run))
    status.write_text(status.read_text().replace("failed", "finished"))
    (run / "final" / "config.json").unlink()
    assert "has made no model" in refused(capsys, str(run))
    (run / "recipe.yaml").write_text("{stage: pipeline, name: all}")
    assert "is a pipeline: publish one of its stages" in refused(capsys, str(run))
