"""The commands of docs/own_data.md, read out of it as they stand, with small files and a small model of one's own."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.cli import EXIT_USER_ERROR, main
from align.model.policy import load_tokenizer, save_policy
from align.plan.memory import GIB
from align.recipe import load_recipe

ROOT = Path(__file__).parents[1]
Row = Callable[[int], dict[str, Any]]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [turn("user", "Say something.")]
GOOD, BAD = "It is a number.", "No."
PAIRS: dict[str, Row] = {
    "explicit, text": lambda n: {"prompt": f"Say {n}.", "chosen": GOOD, "rejected": BAD},
    "implicit, text": lambda n: {"chosen": f"Say {n}. {GOOD}", "rejected": f"Say {n}. {BAD}"},
    "explicit, messages": lambda n: {
        "prompt": [turn("user", f"Say {n}.")],
        "chosen": [turn("assistant", GOOD)],
        "rejected": [turn("assistant", BAD)],
    },
    "implicit, messages": lambda n: {
        "chosen": [turn("user", f"Say {n}."), turn("assistant", GOOD)],
        "rejected": [turn("user", f"Say {n}."), turn("assistant", BAD)],
    },
}
"""TRL's forms of preferences."""
FILES: dict[str, Row] = {
    "chat.jsonl": lambda n: {
        "messages": [turn("system", "Be brief."), turn("user", f"Say {n}."), turn("assistant", str(n))]
    },
    "problems.jsonl": lambda n: {"question": f"How long are {n} sticks?", "answer": f"{n} cm", "unit": "cm"},
    "held_out.jsonl": lambda n: {"question": f"How long are {n} poles?", "answer": f"{n} cm", "unit": "cm"},
    "pairs.jsonl": PAIRS["explicit, text"],
}


def blocks(language: str) -> list[str]:
    """The blocks of code at the top of docs/own_data.md, above its first section."""
    top = (ROOT / "docs/own_data.md").read_text().split("\n## ")[0]
    found = re.findall(r"^```(\w*)\n(.*?)^```$", top, flags=re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


def commands(*first: str) -> Iterator[list[str]]:
    """The commands that begin so, in the order of the text."""
    for line in "".join(blocks("")).splitlines():
        words = shlex.split(line, comments=True)
        if words[: len(first)] == list(first):
            yield words


def write(file: Path, row: Row) -> None:
    file.write_text("".join(json.dumps(row(n)) + "\n" for n in range(24)))


@pytest.fixture
def _desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with what the text calls MODEL, its files, and the reward that it shows, on a machine with memory to spare."""
    monkeypatch.setattr("align.tools.recipe_choices.memory_bytes", lambda: (32 * GIB, 16 * GIB))
    tokenizer = load_tokenizer(ROOT / "recipes/nano/policy")
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **shape, **ends))
    save_policy(model, tokenizer, tmp_path / "MODEL")
    for name, row in FILES.items():
        write(tmp_path / name, row)
    [reward] = blocks("python")
    (tmp_path / "my_rewards.py").write_text(reward)
    monkeypatch.chdir(tmp_path)


def run(words: list[str]) -> str:
    """The output of a command in a process of its own."""
    started = [sys.executable, *(["-m", "align.cli"] if words[0] == "align" else []), *words[1:]]
    done = subprocess.run(started, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stderr[-4000:])
    return done.stdout


@pytest.mark.usefixtures("_desk")
def test_the_recipes_that_the_docs_have_written_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    written = [words[1:] for words in commands("align", "init")]
    assert [words[1] for words in written] == ["sft", "grpo", "reward-model", "dpo"]
    for words in written:
        [run_it] = commands("align", words[1])
        assert main(words) == 0
        assert f"Next:\n  {' '.join(run_it)}\n" in capsys.readouterr().out
        assert main(["check", "--whole", run_it[2]]) == 0
    assert load_recipe(Path("my_sft.yaml")).learner.lora is not None  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_desk")
@pytest.mark.parametrize("form", PAIRS)
def test_pairs_in_each_of_trl_s_forms_give_a_recipe(form: str) -> None:
    write(Path("pairs.jsonl"), PAIRS[form])
    assert main(next(commands("align", "init", "reward-model"))[1:]) == 0


@pytest.mark.usefixtures("_desk")
def test_a_reward_that_wants_another_column_is_refused_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("my_rewards.py").write_text("def says_unit(completions, colour): return [1.0]\n")
    assert main(next(commands("align", "init", "grpo"))[1:]) == EXIT_USER_ERROR
    assert "reads the column 'colour', which the data of the domain 'user' lack" in capsys.readouterr().err
    assert not Path("my_grpo.yaml").exists()


def test_the_readme_names_every_module() -> None:
    named = (ROOT / "README.md").read_text().split("## Where things are")[1].split("\n## ")[0]
    words = set(re.findall(r"\w+", named))
    # The parts of the sandbox, of the readers of answers and of the GPU check are named in their packages.
    within = {"isolation", "math", "code", "learned", "own", "reasoning_gym", "gpu_check"}
    kept_for_old_imports = {"older_names", "transport"}
    for package in ("align", "rollout", "reward", "benchmarks"):
        for file in (ROOT / package).rglob("*.py"):
            module = file.parent.name if file.stem.startswith("__") else file.stem
            if within.isdisjoint(file.parts) and module not in kept_for_old_imports:
                assert module in words, file


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("_desk")
def test_the_commands_of_the_docs_do_what_the_docs_say() -> None:
    for words in [*commands("align"), *commands("python")]:
        run(words)
    assert Path("runs/my-sft/final/adapter").is_dir()
    assert list(Path("runs/my-grpo/scores").glob("eval-held_out-*.jsonl"))
    for form, row in list(PAIRS.items())[1:]:
        write(Path("pairs.jsonl"), row)
        run(["align", "init", "reward-model", "pairs.jsonl", "MODEL", "--overwrite"])
        run(["align", "reward-model", "my_reward_model.yaml", f"run.dir=runs/{form.replace(', ', '-')}"])
    assert len(list(Path("runs").glob("*/final/reward_model.json"))) == 4
