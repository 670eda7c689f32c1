"""`align chat`: a conversation through the real engine, and what a user can get wrong."""

import os
from io import StringIO
from typing import Any

import pytest
import ray

from align.cli import EXIT_USER_ERROR, main
from align.model.policy import load_tokenizer, stop_token_ids
from align.recipe import ModelOptions
from align.tools.chat import Conversation, say, talk
from rollout import Fleet, FleetOptions, SamplingOptions
from rollout.worker import environment

LONG = "17 + " * 20
LINES = f"17 + 25?\n17 + 25?\n/reset\n17 + 25?\n/frob\n\n{LONG}?\n{LONG}?\n/reset\n17?\n/quit\nnot read\n"


def test_a_conversation_is_remembered_until_it_is_reset_and_one_too_long_says_so_and_goes_on(
    policy: ModelOptions, ray_session: None
) -> None:
    """With the engine of a rollout worker, in its process."""
    tokenizer, sampling = load_tokenizer(policy.path), SamplingOptions(temperature=0, max_new_tokens=12)

    def chat(engine: Any) -> str:
        out = StringIO()
        talk(
            Conversation(engine, tokenizer, max_length=128, sampling=sampling, system=None, seed=0),
            StringIO(LINES),
            out,
        )
        return out.getvalue()

    options = FleetOptions(workers=1, max_length=128, kv_cache_gb=0.25)
    fleet = Fleet(policy.path, policy.dtype, options, stop_token_ids(policy, tokenizer))
    try:
        fleet.wait_until_ready()
        actor = fleet.workers[0].actor
        assert actor is not None
        answers = ray.get(actor.handle.__ray_call__.remote(chat)).split("> ")[1:]
    finally:
        fleet.close()
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


@pytest.mark.parametrize("trusted", [False, True])
def test_the_command_loads_the_model_and_samples_as_its_flags_say(
    policy: ModelOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trusted: bool
) -> None:
    made: list[Any] = []

    class Engine:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            made.append((arguments, named))

        def stream(self, request: Any, sampling: SamplingOptions) -> Any:
            made.append(sampling)
            yield load_tokenizer(policy.path)("42", add_special_tokens=False)["input_ids"]

    for name, value in environment(1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("align.run.machine.cores_available", lambda: 2.5)
    monkeypatch.setattr("rollout.engine.Engine", Engine)
    monkeypatch.setattr("sys.stdin", StringIO("17 + 25?\n"))
    flags = ["--temperature", "0", "--max-new-tokens", "12", "--max-length", "128", *["--trust-remote-code"] * trusted]
    assert main(["chat", "--model", policy.path, *flags]) == 0
    assert capsys.readouterr().out == "> 42\n> "
    assert os.environ["OMP_NUM_THREADS"] == "2", "of what a container leaves"
    ((path, dtype, options, stops), named), sampling = made
    assert (path, dtype, options.max_length, stops) == (policy.path, "float32", 128, [1])
    assert named == {"trust_remote_code": trusted}
    assert (sampling.temperature, sampling.max_new_tokens) == (0, 12)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "'--temperature': Input should be greater than or equal to 0"),
        (["--temperature", "2.5"], "'--temperature': Input should be less than or equal to 2"),
        (["--temperature", "0.005"], "--temperature 0.005: the least above 0 is 0.01"),
        (["--max-new-tokens", "0"], "'--max-new-tokens': Input should be greater than or equal to 1"),
        (["--max-length", "8"], "'--max-length': Input should be greater than or equal to 16"),
        (["--max-length", "999999"], "has a context of"),
        (["--model", "/nowhere/at/all"], "model.path: /nowhere/at/all does not exist"),
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
