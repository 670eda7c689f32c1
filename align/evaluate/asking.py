"""Conversations put to the policy through the rollout workers."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.data.chat import answer_text
from align.data.types import Example, Message
from align.evaluate.hooks import PolicyCheckpoint
from align.experience import encode_problems
from rollout import FinishReason, Fleet, SamplingOptions

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Response:
    """What the policy said: its text, its length in tokens (0 where it was not asked), and whether it was cut off at a limit."""

    text: str
    tokens: int
    truncated: bool


def ask(
    checkpoint: PolicyCheckpoint,
    fleet: Fleet,
    conversations: Mapping[str, Sequence[Message]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Response]:
    """The policy's response to each conversation by its id, in their order; greedy unless there is a temperature.

    A conversation that leaves no room for `max_new_tokens` is not put to it: the response is empty, and a warning counts
    such conversations.
    """
    examples = [Example(id_, tuple(messages), None, None, "evaluation") for id_, messages in conversations.items()]
    longest = checkpoint.max_length - max_new_tokens
    encoded = [problem.prompt for problem in encode_problems(checkpoint.tokenizer, examples)]
    prompts = [prompt for prompt in encoded if len(prompt.token_ids) <= longest]
    if len(prompts) < len(examples):
        _log.warning(
            "%d of %d conversations have more than the %d tokens that are left beside %d new ones: they count as not answered",
            *(len(examples) - len(prompts), len(examples), longest, max_new_tokens),
        )
    sampling = SamplingOptions(temperature=temperature, max_new_tokens=max_new_tokens)
    responses = {id_: Response("", 0, truncated=True) for id_ in conversations}
    for group in fleet.sample(prompts, 1, sampling, seed=seed, step=0) if prompts else ():
        (trajectory,) = group.trajectories
        responses[group.prompt.id] = Response(
            answer_text(checkpoint.tokenizer, conversations[group.prompt.id], trajectory.token_ids),
            len(trajectory.token_ids),
            trajectory.finish_reason is FinishReason.LENGTH,
        )
    return responses
