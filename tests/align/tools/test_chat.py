"""`align chat`: a conversation through the real engine, and what a user can get wrong."""

import subprocess
import sys
from io import StringIO
from typing import Any

import pytest

from align.cli import EXIT_USER_ERROR, main
from align.model.policy import load_tokenizer
from align.recipe import ModelOptions
from align.tools.chat import Conversation, say, talk
from rollout import SamplingOptions


def chat(policy: ModelOptions, lines: str, *flags: str) -> list[str]:
    """What the command answers to these lines, in a process of its own as vLLM wants it."""
    command = [sys.executable, "-m", "align.cli", "chat", "--model", policy.path, "--max-new-tokens", "12", *flags]
    run = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.split("> ")[1:]


def test_a_conversation_is_remembered_until_it_is_reset_and_one_too_long_says_so_and_goes_on(
    policy: ModelOptions,
) -> None:
    long = "17 + " * 20
    lines = f"17 + 25?\n17 + 25?\n/reset\n17 + 25?\n/frob\n\n{long}?\n{long}?\n/reset\n17?\n/quit\nnot read\n"
    answers = chat(policy, lines, "--temperature", "0", "--max-length", "128")
    first, second, reset, again, unknown, empty, *_, too_long, _, after, _ = answers
    assert first.strip()
    assert first != second, "the second answer has the first question and answer before it"
    assert reset.strip() == "(forgotten)"
    assert again == first
    assert unknown.startswith("unknown command /frob: /reset forgets")
    assert empty == ""
    assert "--max-length leaves room for 128 with an answer: /reset, or begin again" in too_long
    assert after.strip()
    assert "error" not in after


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "'--temperature': Input should be greater than or equal to 0"),
        (["--max-new-tokens", "0"], "'--max-new-tokens': Input should be greater than or equal to 1"),
        (["--max-length", "8"], "'--max-length': Input should be greater than or equal to 16"),
        (["--max-length", "999999"], "has a context of"),
        (["--model", "/nowhere/at/all"], "has no tokenizer that transformers can load"),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(
    policy: ModelOptions, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["chat", "--model", policy.path, *flags]) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err


class Typist:
    """Streams tokens that were fixed beforehand; then, where there is an `end`, raises it."""

    def __init__(self, token_ids: list[int], end: type[BaseException] | None = None) -> None:
        self.token_ids, self.end = token_ids, end

    def stream(self, request: Any, sampling: SamplingOptions) -> Any:
        for token_id in self.token_ids:
            yield [token_id]
        if self.end:
            raise self.end


def conversation(policy: ModelOptions, text: str, end: type[BaseException] | None = None) -> Conversation:
    tokenizer = load_tokenizer(policy.path)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Conversation(Typist(ids, end), tokenizer, max_length=64, sampling=SamplingOptions(), system=None, seed=0)


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(policy: ModelOptions) -> None:
    talking, out = conversation(policy, "42 is", KeyboardInterrupt), StringIO()
    say(talking, "17 + 25?", out)
    assert out.getvalue() == "42 is (stopped)\n"
    assert talking.messages[-1] == {"role": "assistant", "content": "42 is"}


def test_an_empty_thought_that_the_template_writes_is_not_told(policy: ModelOptions) -> None:
    talking, out = conversation(policy, "<think>\n\n</think>\n\n42 is it"), StringIO()
    talking._tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} A: {% else %}"
        "<think>\n\n</think>\n\n{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    say(talking, "17 + 25?", out)
    assert out.getvalue() == "42 is it\n"
    assert talking.messages[-1] == {"role": "assistant", "content": "42 is it"}


def test_the_end_of_the_input_ends_the_conversation(policy: ModelOptions) -> None:
    out = StringIO()
    talk(conversation(policy, "4"), StringIO("2 + 2?\n"), out)
    assert out.getvalue() == "> 4\n> "
