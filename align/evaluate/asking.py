"""Conversations put to the policy through the rollout workers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.data.chat import decode_completion
from align.data.types import Example, Message
from align.evaluate.hooks import Checkpoint
from align.evaluate.problems import encode_prompts
from rollout import FinishReason, Fleet, SamplingOptions


@dataclass(frozen=True, slots=True)
class Response:
    """What the policy said: its text, its length in tokens, and whether it hit the limit of new tokens."""

    text: str
    tokens: int
    truncated: bool


def ask(
    checkpoint: Checkpoint,
    fleet: Fleet,
    conversations: Mapping[str, Sequence[Message]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Response]:
    """The policy's response to each conversation by its id, in their order; greedy unless there is a temperature.

    Raises UserError, before anything is sampled, for a conversation that leaves no room for `max_new_tokens`.
    """
    examples = [Example(id_, tuple(messages), None, None, "evaluation") for id_, messages in conversations.items()]
    prompts = encode_prompts(checkpoint.tokenizer, examples, checkpoint.max_length - max_new_tokens)
    sampling = SamplingOptions(temperature=temperature, max_new_tokens=max_new_tokens)
    responses = {}
    for group in fleet.generate(prompts, 1, sampling, seed=seed, step=0):
        (completion,) = group.completions
        responses[group.prompt.id] = Response(
            decode_completion(checkpoint.tokenizer, completion.token_ids),
            len(completion.token_ids),
            completion.finish_reason is FinishReason.LENGTH,
        )
    return {id_: responses[id_] for id_ in conversations}
