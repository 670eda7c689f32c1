"""How far a policy has moved from the model that it began with: its loss on that model's own answers to ordinary requests."""

from collections.abc import Sequence
from itertools import islice, product
from typing import Annotated, Any

import torch
from pydantic import Field

from align.data.chat import decode_completion, encode_prompt
from align.data.types import Message
from align.errors import naming
from align.evaluate.hooks import Metrics, PolicyCheckpoint, register
from align.losses import token_log_probs
from align.model.policy import load_policy, no_progress_bars, stop_token_ids
from rollout import Fleet

BATCH = 16
TASKS = [
    *("Write a short story about {}", "Describe {} to a child", "Write a letter to a friend about {}"),
    *("Write a speech about {}", "Explain why people care about {}", "Give advice to somebody who is new to {}"),
    *("Write an advertisement for a book about {}", "Tell what could go wrong with {}"),
]
TOPICS = [
    *("a lighthouse", "baking bread", "chess", "city bicycles", "deep snow", "gardens on roofs", "home cooking"),
    *("keeping bees", "learning to swim", "long train journeys", "maps", "mountain villages", "old clocks"),
    *("public libraries", "rain", "sailing", "the moon", "wooden toys", "young owls"),
]


@register("drift")
def drift(
    checkpoint: PolicyCheckpoint,
    fleet: Fleet,
    *,
    start: str | None = None,
    count: Annotated[int, Field(ge=1, le=len(TASKS) * len(TOPICS))] = 48,
    max_new_tokens: Annotated[int, Field(ge=1)] = 96,
    seed: int = 0,
) -> Metrics:
    """Loss on what the model `start` says to `count` ordinary requests, under it and under the policy, in nats a token.

    `start` is what the run began with, when not given. It answers at temperature 1, so that the difference of the two losses estimates
    KL(start || policy). Both are computed by transformers on this machine's CPU. Raises UserError where it cannot load one of them.
    """
    path = start or checkpoint.start
    if path is None:
        return Metrics({}, not_run={"loss": "the run began with random weights; say with start which model is meant"})
    prompts = [encode_prompt(checkpoint.tokenizer, [message]) for message in ordinary_requests(count)]
    beginning = load(path, checkpoint)
    stops = stop_token_ids(checkpoint.model.model_copy(update={"path": path}), checkpoint.tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
        answers = [a for batch in batches for a in sample_answers(beginning, batch, max_new_tokens, stops)]
    before = losses(beginning, prompts, answers)
    del beginning
    after = losses(load(checkpoint.model.path, checkpoint), prompts, answers)
    tokens = sum(map(len, answers))
    values = {"start": sum(before) / tokens, "policy": sum(after) / tokens}
    rows = [
        {"answer": decode_completion(checkpoint.tokenizer, answer), "tokens": len(answer), "start": old, "policy": new}
        for answer, old, new in zip(answers, before, after, strict=True)
    ]
    return Metrics(values | {"difference": values["policy"] - values["start"]}, rows=rows)


def ordinary_requests(count: int) -> list[Message]:
    """Messages that ask for a text about a topic, in no particular form."""
    pairs = islice(product(TOPICS, TASKS), 0, None, max(1, len(TASKS) * len(TOPICS) // count))
    return [{"role": "user", "content": f"{task.format(topic)}."} for topic, task in islice(pairs, count)]


def load(path: str, checkpoint: PolicyCheckpoint) -> Any:
    """The model at `path` on the CPU, in the checkpoint's dtype. Raises UserError where transformers cannot load it."""
    with naming("evaluation hook 'drift'"), no_progress_bars():
        return load_policy(checkpoint.model.model_copy(update={"path": path})).eval()


def sample_answers(model: Any, prompts: Sequence[Sequence[int]], limit: int, stops: Sequence[int]) -> list[list[int]]:
    """An answer to each prompt, with the token that ends it."""
    widest = max(map(len, prompts))
    padded = torch.tensor([[stops[0]] * (widest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    sampled = model.generate(
        padded,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=limit,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
    )[:, widest:]
    ends = [[place + 1 for place, token in enumerate(row) if token in stops] for row in sampled.tolist()]
    return [row[: places[0] if places else None] for row, places in zip(sampled.tolist(), ends, strict=True)]


def losses(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
    """The negative log-probability of each answer after its prompt, summed over its tokens, in nats."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1].float()
        log_probs = token_log_probs(logits, ids[:, len(prompt) :])
        found.append(-float(log_probs.sum()))
    return found
