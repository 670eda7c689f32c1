"""What can be done with a model outside a run: examine it, and have it answer a user's own file."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from align.data.own import read_user_file
from align.data.types import Message
from align.errors import UserError
from align.evaluate.accuracy import evaluate, short_problems
from align.evaluate.agreement import AgreementGate
from align.evaluate.doctor import examine, examine_engines, verdict
from align.evaluate.hooks import PolicyCheckpoint
from align.experience import encode_problems
from align.learner.group import LearnerGroup
from align.model.policy import load_tokenizer, stop_token_ids
from align.recipe import AgreementOptions, LearnerOptions, ModelOptions, OptimizerOptions
from align.run import write_jsonl
from align.session.ray import local_ray
from reward import Mixture, RewardTerm, ScoringPool
from reward.rows import TRUTHS
from rollout import Fleet, FleetOptions, Prompt

PROBES = ["What is 17 + 25?", "Write a sentence about the sea.", "1, 2, 3,", "naïve Größe, 你好"]


@contextmanager
def running_fleet(model: ModelOptions, rollout: FleetOptions, tokenizer: Any) -> Iterator[Fleet]:
    """Rollout workers with a model, under a Ray of their own; both end with the block."""
    with local_ray():
        stops = stop_token_ids(model, tokenizer)
        fleet = Fleet(model.path, model.dtype, rollout, stops, trust_remote_code=model.trust_remote_code)
        with closing(fleet):
            yield fleet


def evaluate_file(model: ModelOptions, data: Path, out: Path, rollout: FleetOptions, max_new_tokens: int) -> str:
    """Answer every row of `data` (see `read_user_file`) greedily and write the answers with reward and verdict to `out`; returns a summary."""
    if out.exists():
        raise UserError(f"--out {out} exists already; give another file, or take it away")
    examples = read_user_file(data)
    if all(example.answer is None for example in examples):
        raise UserError(
            f"{data}: no row has a ground truth to compare answers with; columns that may have one are {', '.join(TRUTHS)}"
        )
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    longest = rollout.max_length - max_new_tokens
    problems = encode_problems(tokenizer, examples)
    short_problems(problems, longest)
    mixture = Mixture([RewardTerm(name="exact_answer")])
    with (
        running_fleet(model, rollout, tokenizer) as fleet,
        closing(ScoringPool(mixture, workers=1, timeout_s=rollout.batch_timeout_s)) as judges,
    ):
        fleet.wait_until_ready()
        result = evaluate(
            *(fleet, tokenizer, problems, judges), samples=0, max_new_tokens=max_new_tokens, longest=longest, seed=0
        )
    write_jsonl(out, result.rows)
    verdicts = ", ".join(f"{count} {name}" for name, count in sorted(result.verdicts.items()))
    too_long = f"; {result.too_long} have prompts that are too long, and count as not right" if result.too_long else ""
    return f"{result.accuracy:.1%} of {result.problems} right ({verdicts}{too_long}); answers are in {out}"


def answers_of(
    model: ModelOptions, requests: Sequence[str], rollout: FleetOptions, *, max_new_tokens: int, temperature: float
) -> dict[str, str]:
    """What the model says to each request. Raises UserError for one that is too long."""
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    conversations: dict[str, list[Message]] = {r: [{"role": "user", "content": r}] for r in requests}
    checkpoint = PolicyCheckpoint(model, tokenizer, rollout.max_length)
    with running_fleet(model, rollout, tokenizer) as fleet:
        fleet.wait_until_ready()
        responses = checkpoint.ask(fleet, conversations, max_new_tokens=max_new_tokens, temperature=temperature)
    for request, response in responses.items():
        if not response.tokens:
            raise UserError(f"a request leaves no room for {max_new_tokens} new tokens: {request[:80]!r}")
    return {request: response.text for request, response in responses.items()}


def doctor(model: ModelOptions, rollout: FleetOptions) -> str:
    """Every check of a model, printed line by line; returns the verdict. Raises DoctorError when one failed."""
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    checks = examine(model, tokenizer)
    options = LearnerOptions(ranks=1, threads=2, zero_stage=0, optimizer=OptimizerOptions(learning_rate=1e-3))
    with (
        running_fleet(model, rollout, tokenizer) as fleet,
        closing(LearnerGroup(model, options, seed=0)) as learner,
    ):
        fleet.wait_until_ready()
        learner.wait_until_ready()
        prompts = [Prompt(str(i), tokenizer(text)["input_ids"]) for i, text in enumerate(PROBES)]
        checks += examine_engines(fleet, learner, prompts, AgreementGate(AgreementOptions(), model.dtype, print))
    for check in checks:
        print(f"{check.status:8} {check.name}: {check.detail}")
    return verdict(checks, model.path)
