"""A conversation with a policy in the terminal: its answers as they are drawn, by the engine that training samples with."""

import os
import re
import sys
from collections.abc import Generator
from contextlib import closing
from typing import Any, TextIO

from align.data.chat import answer_text, encode_prompt
from align.data.types import Message
from align.errors import UserError
from align.evaluate.doctor import positions_of, with_room
from align.model.policy import first_line, load_tokenizer, stop_token_ids
from align.recipe import ModelOptions
from align.run.machine import threads_available
from rollout import EngineOptions, Prompt, RolloutError, SamplingOptions, sample_seed
from rollout.worker import environment

HELP = "/reset forgets the conversation, /quit ends it; Ctrl-C stops an answer"
UNFINISHED = "\ufffd"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Conversation:
    """What was said so far, and the engine that answers."""

    def __init__(
        self, engine: Any, tokenizer: Any, *, max_length: int, sampling: SamplingOptions, system: str | None, seed: int
    ):
        self._engine, self._tokenizer = engine, tokenizer
        self._max_length, self._sampling, self._seed = max_length, sampling, seed
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[Message] = []
        self._turns = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._system)

    def answer(self, text: str) -> Generator[str]:
        """The answer to `text`, piece by piece. What was said is kept, also of an answer that is broken off.

        Raises UserError, and leaves the conversation as it was, where it has no room for another answer.
        """
        from rollout.engine import Request

        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = encode_prompt(self._tokenizer, asked)
        if len(ids) >= self._max_length:
            raise UserError(
                f"the conversation has {len(ids)} tokens, and --max-length leaves room for {self._max_length} with an answer: "
                "/reset, or begin again with a greater one"
            )
        self._turns += 1
        seed = sample_seed(self._seed, self._turns, "chat", 0)
        drawn: list[int] = []
        told = ""
        try:
            with closing(
                self._engine.stream(Request(Prompt(f"turn {self._turns}", ids), 0, seed), self._sampling)
            ) as new:
                for token_ids in new:
                    drawn += token_ids
                    said = answer_text(self._tokenizer, asked, drawn)
                    # The bytes of a character can be spread over several tokens.
                    if said.endswith(UNFINISHED):
                        continue
                    yield said[len(told) :]
                    told = said
            yield answer_text(self._tokenizer, asked, drawn)[len(told) :].rstrip(UNFINISHED)
        finally:
            said = answer_text(self._tokenizer, asked, drawn)
            self.messages = [*asked, {"role": "assistant", "content": said}]


def chat_in_terminal(
    model: ModelOptions, options: EngineOptions, sampling: SamplingOptions, *, system: str | None, seed: int
) -> None:
    """Load the model and talk until /quit or the end of the input. Raises UserError for a model that cannot be loaded."""
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    encode_prompt(tokenizer, [{"role": "user", "content": "?"}])
    stops = stop_token_ids(model, tokenizer)
    options = with_room(config_within(model, options.max_length), model.dtype, options)
    os.environ |= environment(threads_available()) | {"VLLM_LOGGING_LEVEL": "ERROR"}
    from rollout.engine import Engine

    print(f"loading {model.path} ...", file=sys.stderr)
    try:
        engine = Engine(model.path, model.dtype, options, stops, trust_remote_code=model.trust_remote_code)
    except (RolloutError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{model.path} cannot be loaded for --max-length {options.max_length}, of which a lower one takes less memory: {first_line(error)}"
        ) from None
    conversation = Conversation(
        engine, tokenizer, max_length=options.max_length, sampling=sampling, system=system, seed=seed
    )
    print(HELP, file=sys.stderr)
    talk(conversation, sys.stdin, sys.stdout)


def config_within(model: ModelOptions, max_length: int) -> Any:
    """The model's configuration. Raises UserError where its context is shorter than what was asked for."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model: transformers cannot load the configuration of {model.path}: {first_line(error)}"
        ) from None
    if max_length > (longest := positions_of(config.get_text_config())):
        raise UserError(
            f"--max-length {max_length}: {model.path} has a context of {longest:.0f} tokens; give that or less"
        )
    return config


def talk(conversation: Conversation, asked: TextIO, answers: TextIO) -> None:
    """Answer line by line."""
    while True:
        print("> ", end="", file=answers, flush=True)
        line = asked.readline()
        command = line.strip()
        if not line or command == "/quit":
            return
        if command == "/reset":
            conversation.reset()
            print("(forgotten)", file=answers)
        elif command.startswith("/"):
            print(f"unknown command {command.split()[0]}: {HELP}", file=answers)
        elif command:
            say(conversation, command, answers)


def say(conversation: Conversation, text: str, answers: TextIO) -> None:
    """Print the answer as it comes. A model's text moves no cursor and colours nothing."""
    try:
        with closing(conversation.answer(text)) as pieces:
            for piece in pieces:
                print(CONTROL.sub("", piece), end="", file=answers, flush=True)
        print(file=answers)
    except KeyboardInterrupt:
        print(" (stopped)", file=answers)
    except UserError as error:
        print(f"error: {error}", file=answers)
