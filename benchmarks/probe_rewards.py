"""What cheap tricks do to every reward that ships and needs no model: the table of docs/rewards.md, in a few minutes:

python benchmarks/probe_rewards.py

No model is loaded. The answers are the demonstrations of the generated data sets, of which some are wrong, each beside that of another
problem; those that SmolLM2 gave are beside the tests. A cell is the change of the mean reward, in bold where its 95 % interval is above 0.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from align.data.cards import load_card
from align.data.loader import load_split
from align.data.types import Example
from align.evaluate.probe import Effect, probe
from align.experience import sample_of
from reward import Mixture, RewardTerm, Sample
from reward.tricks import TRICKS

SMOLLM2 = Path(__file__).parents[1] / "tests/reward/corpus/smollm2_answers.jsonl"
PROMPTS, PROGRAMS = 48, 12
"""Problems of a card, and of the one whose answers are programs, which take longer."""


def main() -> int:
    """Print the table."""
    columns: list[list[Effect]] = []
    for term, samples in cases():
        print(term.component, file=sys.stderr, flush=True)
        columns.append(probe(Mixture([term], infra_error_limit=1.0), samples, TRICKS.values()))
    names = [column[0].reward for column in columns]
    print("| trick | " + " | ".join(f"`{name}`" for name in names) + " |")
    print("|---|" + "---:|" * len(names))
    print("| *as they are* | " + " | ".join(f"{column[0].before:.2f}" for column in columns) + " |")
    for effects in zip(*columns, strict=True):
        print(f"| {effects[0].trick} | " + " | ".join(map(cell, effects)) + " |")
    return 0


def cell(effect: Effect) -> str:
    """The change, in bold where it pays; nothing where the trick changes no answer."""
    if not effect.changed:
        return ""
    text = f"{effect.change:+.2f}" if abs(effect.change) >= 0.005 else "0"
    return f"**{text}**" if effect.pays else text


def cases() -> Iterator[tuple[RewardTerm, list[Sample]]]:
    """The rewards, each with the answers that it is probed on."""
    sums, words, chat = (demonstrated(card, PROMPTS) for card in ("nano_math", "gsm_symbolic", "nano_chat"))
    said = [sample_of(json.loads(line)) for line in SMOLLM2.open(encoding="utf-8")]
    for name in ("exact_answer", "math", "answer_format"):
        yield RewardTerm(name=name), sums
    yield RewardTerm(name="reasoning_gym"), words
    for name in ("chat_quality", "refusal", "nano_chat"):
        yield RewardTerm(name=name), chat
    yield RewardTerm(name="instructions", params={"partial": True}), said
    for name in ("language_consistency", "repetition"):
        yield RewardTerm(name=name), said
    yield RewardTerm(name="soft_overlong", params={"max_length": 600, "cache": 300, "unit": "characters"}), said
    yield RewardTerm(name="code_tests"), demonstrated("nano_code", PROGRAMS)


def demonstrated(card: str, count: int) -> list[Sample]:
    """To `count` problems of a card's test each its demonstration and that of another problem."""
    examples = [example for example in load_split(load_card(card), "test").examples if example.response is not None]
    examples = examples[:: max(1, len(examples) // count)][:count]
    shifted = [*examples[1:], examples[0]]
    return [sample for pair in zip(examples, shifted, strict=True) for sample in answers(*pair)]


def answers(example: Example, other: Example) -> list[Sample]:
    return [
        Sample(
            id=f"{example.id}#{index}",
            prompt=example.prompt_text,
            completion=str(response),
            ground_truth=example.answer,
            domain=example.domain,
            metadata=example.metadata,
        )
        for index, response in enumerate((example.response, other.response))
    ]


if __name__ == "__main__":
    raise SystemExit(main())
