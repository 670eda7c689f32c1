"""What can be done with a model outside a run: examine it, and have it answer a user's own file."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from align.data.cards import load_card
from align.data.entries import encoded
from align.data.loader import load_split
from align.data.own import TAKE_OUT, read_user_file, refusal
from align.data.types import Example, SplitName
from align.errors import UserError, reward_errors
from align.evaluate.accuracy import evaluate, mean_of, short_problems
from align.evaluate.agreement import AgreementGate
from align.evaluate.attribution import attribute
from align.evaluate.doctor import FAILED, Check, check_served, examine, verdict, with_room
from align.evaluate.doctor_engines import examine_engines, parts, sampler_share
from align.experience import encode_problems
from align.learner.group import LearnerGroup
from align.learner.policy import FrugalRank
from align.model.policy import DTYPES, load_tokenizer, stop_token_ids
from align.model.sizes import has_attention, model_sizes, read_config, sent_bytes, skeleton_of
from align.recipe import AgreementOptions, LearnerOptions, ModelOptions, OptimizerOptions
from align.recipe.options import is_on_hub
from align.run import RunDirectory, write_jsonl
from align.run.files import refuse_existing
from align.run.machine import gpu_bytes, memory_bytes, object_store_bytes, shared_memory_bytes
from align.session.checks import check_columns, check_split
from align.session.ray import local_ray
from align.session.run import SHARE_TO_TELL
from align.session.session import check_sampler
from align.tools.score_file import mixture_of
from reward import RewardTerm, ScoringPool
from reward.rows import TRUTHS
from rollout import Fleet, FleetOptions, Prompt

SCORING_S = 600.0
"""How long scoring may take until one more answer is judged."""
OF_A_RUN = ("max_length", "kv_cache_gb", "batch_sequences", "start_timeout_s", "stall_timeout_s", "threads")
"""Options of `rollout` that `align eval` takes from a model's run; those that take a GPU's room or several GPUs may not be for this machine."""
PROBES = ["What is 17 + 25?", "Write a sentence about the sea.", "1, 2, 3,", "naïve Größe, 你好"]


@contextmanager
def running_fleet(model: ModelOptions, rollout: FleetOptions, tokenizer: Any, sent: int = 0) -> Iterator[Fleet]:
    """Rollout workers with a model, under a Ray of their own, through which so many bytes of weights are `sent`; both end with the block."""
    with local_ray(sent):
        check_sampler()
        stops = stop_token_ids(model, tokenizer)
        fleet = Fleet(model.path, model.dtype, rollout, stops, trust_remote_code=model.trust_remote_code)
        with closing(fleet):
            yield fleet


def evaluate_file(
    model: ModelOptions,
    data: str,
    out: Path,
    rollout: FleetOptions,
    max_new_tokens: int,
    term: RewardTerm,
    *,
    split: SplitName | None = None,
    samples: int = 0,
    temperature: float = 1.0,
) -> str:
    """Answer every problem of `data` greedily, and `samples` times at a temperature, and score the answers by a reward.

    `data` is a file, or a data card with the `split` to take. Writes the answers with reward and verdict to `out`, as `align score`
    reads them; returns a summary.
    """
    refuse_existing(out)
    mixture = mixture_of(term)
    examples = problems_of(data, split)
    if term.name == "exact_answer" and all(example.answer is None for example in examples):
        raise UserError(
            f"{data}: no row has a ground truth to compare answers with; columns that may have one are {', '.join(TRUTHS)}. "
            "To judge by something else, give --reward"
        )
    check_columns([term], examples)
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    longest = rollout.max_length - max_new_tokens
    if longest < 1:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in --max-length {rollout.max_length}: lower the one, or raise the other"
        )
    problems, refused = encoded(examples, lambda example: encode_problems(tokenizer, [example]))
    if refused and not problems:  # the model's fault, such as that it has no template
        raise UserError(refused[0])
    if refused:
        raise UserError("\n".join(refusal(data, refused, len(refused), len(examples), TAKE_OUT)))
    short_problems(problems, longest, "--max-length")
    rollout = served(model, rollout)
    with (
        running_fleet(model, rollout, tokenizer) as fleet,
        closing(ScoringPool(mixture, workers=1, timeout_s=max(SCORING_S, 10 * (term.timeout_s or 0)))) as judges,
    ):
        with reward_errors():
            judges.wait_until_ready()
        fleet.wait_until_ready()
        result = evaluate(
            *(fleet, tokenizer, problems, judges),
            samples=samples,
            max_new_tokens=max_new_tokens,
            longest=longest,
            seed=0,
            temperature=temperature,
        )
    write_jsonl(out, result.rows)
    value = mean_of([row["reward"] for row in result.rows if row["greedy"] and row["reward"] is not None])
    sampled = "".join(f", pass@{k} {share:.1%}" for k, share in result.pass_at.items())
    verdicts = ", ".join(f"{count} {name}" for name, count in sorted(result.verdicts.items()))
    if result.truncated >= SHARE_TO_TELL:
        sampled += f"; {result.truncated:.0%} of the answers were cut off at {max_new_tokens} tokens"
    too_long = f"; {result.too_long} have prompts that are too long, and count as not right" if result.too_long else ""
    return (
        f"{result.accuracy:.1%} of {result.judged} right by {term.component}, mean value {value:.3f}{sampled} ({verdicts}{too_long}); "
        f"answers are in {out}"
    )


def served(model: ModelOptions, rollout: FleetOptions) -> FleetOptions:
    """The options with a KV cache that holds a sequence. Raises UserError where vLLM does not take the model so.

    Of what transformers cannot build here, and of models without attention, vLLM is the judge.
    """
    try:
        skeleton = skeleton_of(model)
    except UserError:
        return rollout
    if not has_attention(skeleton.config):
        return rollout
    rollout = with_room(skeleton.config, model.dtype, rollout)
    status, detail = check_served(skeleton, model.dtype, rollout)
    if status is FAILED:
        raise UserError(f"{model.path}: {detail.replace('rollout.max_length', '--max-length')}")
    return rollout


def asked_in(run: Path | None) -> dict[str, Any]:
    """The `max_new_tokens`, `dtype` and `rollout` options of a run's own evaluations; the defaults where there is no run, or one without evaluations."""
    try:
        recipe = yaml.safe_load(RunDirectory(run).recipe_file.read_text(encoding="utf-8")) if run else {}
        rollout = {name: recipe["rollout"][name] for name in OF_A_RUN if name in recipe["rollout"]}
        found = {"max_new_tokens": recipe["evaluation"]["max_new_tokens"], "dtype": recipe["model"]["dtype"]}
    except (KeyError, TypeError, OSError, yaml.YAMLError):
        found, rollout = {"max_new_tokens": 64, "dtype": "float32"}, {"max_length": 512}
    return found | {"rollout": rollout}


def problems_of(data: str, split: SplitName | None) -> list[Example]:
    """The problems of a file, or of a split of a data card (that of the test where none is given). Raises UserError."""
    file = Path(data)
    if file.suffix == ".md" or not (file.suffix or file.exists() or is_on_hub(data)):
        card = load_card(data)
        check_split(card, split or "test", "eval", "--split")
        return list(load_split(card, split or "test").examples)
    if split is not None:
        raise UserError(f"--split {split}: {data} is a file, which has no splits; leave it out, or give a data card")
    return read_user_file(file)


def doctor(model: ModelOptions, rollout: FleetOptions, *, by_part: bool = False) -> str:
    """Every check of a model, printed line by line; returns the verdict. Raises DoctorError when one failed, before engines start if it can be.

    With `by_part` both engines are also compared part by part, and what was found is printed layer by layer.

    The learner holds the weights alone. On a machine with one GPU it shares that with the worker; raises UserError where both do not fit.
    """
    if not model.trust_remote_code:
        read_config(model.path)
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    rollout = with_room(skeleton_of(model).config, model.dtype, rollout)
    checks = examine(model, tokenizer, rollout=rollout)
    show(checks)
    verdict(checks, model.path)
    options = LearnerOptions(ranks=1, threads=2, zero_stage=0, optimizer=OptimizerOptions(learning_rate=1e-3))
    if torch.cuda.is_available():
        rollout, options = on_gpus(model, rollout, options)
    with (
        running_fleet(model, rollout, tokenizer, sendable_bytes(model)) as fleet,
        closing(LearnerGroup(model, options, seed=0, kind=FrugalRank)) as learner,
    ):
        fleet.wait_until_ready()
        learner.wait_until_ready()
        prompts = [Prompt(str(i), tokenizer(text)["input_ids"]) for i, text in enumerate(PROBES)]
        compared = attribute(fleet, learner, prompts, model.dtype) if by_part else None
        found = examine_engines(fleet, learner, prompts, AgreementGate(AgreementOptions(), model.dtype, print))
    if compared is not None:
        print(compared.table)
        found = [Check("parts of the model", *parts(compared)), *found]
    show(found)
    return verdict([*checks, *found], model.path)


def sendable_bytes(model: ModelOptions) -> int:
    """The bytes of a model's weights; 0 where the object store has no room for them, so that they go over the disk."""
    sent = sent_bytes(model, None)
    try:
        object_store_bytes(sent, shared_memory_bytes(), memory_bytes()[1])
    except UserError:
        return 0
    return sent


def on_gpus(model: ModelOptions, rollout: FleetOptions, learner: LearnerOptions) -> tuple[FleetOptions, LearnerOptions]:
    """The options with which the doctor's engines fit this machine's GPUs. Raises UserError where they do not."""
    cards = gpu_bytes()
    if len(cards) > rollout.workers or not cards:
        return rollout, learner
    if rollout.workers > 1:
        raise UserError(f"--workers {rollout.workers}: each wants a GPU, and the learner one too; lower it")
    weights = model_sizes(skeleton_of(model)).total * DTYPES[model.dtype].itemsize
    share = sampler_share(weights, min(cards))
    return (
        rollout.model_copy(update={"gpus": 0.4, "gpu_memory_share": min(share, rollout.gpu_memory_share)}),
        learner.model_copy(update={"gpus": 0.6}),
    )


def show(checks: Sequence[Check]) -> None:
    """Print a line for each check."""
    for check in checks:
        print(f"{check.status:8} {check.name}: {check.detail}", flush=True)
