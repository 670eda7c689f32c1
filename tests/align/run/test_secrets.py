"""Secrets that were planted wherever a run could find them are in nothing that it writes or says."""

from pathlib import Path

import pytest

from align.cli import main
from align.run import MetricsLog, Progress, RunDirectory
from align.run.files import redacted, without_secrets

PLANTED = {
    "HF_TOKEN": "hf_plantedplantedplanted",
    "OPENAI_API_KEY": "sk-plantedplanted",
    "REWARD_KEY": "planted/with+signs=",
    "DATABASE_PASSWORD": "correct horse planted",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


def test_arguments_are_kept_but_for_secrets() -> None:
    kept = ["nano.yaml", "sampling.max_tokens=512", "model.tokenizer=./t", "--dry-run"]
    assert without_secrets(kept) == kept
    assert without_secrets(["hub.token=abc", "--api-key", "abc", "key", "url=https://me:pw@host/x"]) == [
        "hub.token=***",
        "--api-key",
        "***",
        "key",
        "url=https://***host/x",
    ]
    assert without_secrets(["x=hf_abcdefghijkl"]) == ["x=***"]


def test_values_of_variables_that_are_named_like_secrets_are_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_TOKEN", "is")
    text = "the server is at http://me:pw@host/v1 and refuses " + " ".join(PLANTED.values())
    assert redacted(text) == "the server is at http://***host/v1 and refuses *** *** *** ***"


def test_no_planted_secret_is_in_a_run_nor_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = " and ".join(PLANTED.values())
    directory = RunDirectory.create(tmp_path / "run")
    metrics = MetricsLog(directory)
    with Progress(log=directory.log_file) as progress:
        progress.stage(everything, 1)
        progress.phase(everything)
        progress.note(everything)
        progress.warn(everything)
        progress.table(everything, ["said"], [[everything]])
    metrics.event("error", everything)
    metrics.close()
    directory.save_stacks(everything)
    directory.fail(RuntimeError(everything))
    written = [file.read_bytes() for file in directory.path.rglob("*") if file.is_file()]
    assert len(written) >= 5
    said = capsys.readouterr()
    for planted in PLANTED.values():
        assert not any(planted.encode() in content for content in written)
        assert planted not in said.out + said.err


def test_an_error_that_quotes_a_secret_is_shown_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{PLANTED['HF_TOKEN']}.yaml"]) == 2
    assert "***" in capsys.readouterr().err
