"""What cheap tricks do to rewards: answers scored as they are and changed by each trick, compared within their prompts.

A trick that raises a reward on average is what a policy learns from it, whatever the reward was meant for. What has been probed is kept
in the user's cache by a hash of the reward, its parameters and the model.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from inspect import getmodule
from itertools import chain, groupby, islice
from math import isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from align.errors import UserError, reward_errors
from align.losses import AdvantageScale, group_advantages
from align.recipe import ModelOptions
from align.run.files import write_atomically
from align.statistics import Interval, mean_interval
from reward import Mixture, RewardTerm, Sample, SampleReward, get
from reward.mixture import why_masked
from reward.own.file import file_digest, files_of
from reward.tricks import Trick

MIXTURE = "all of them"
"""What the weighted sum of several rewards is called among them."""
WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True)
class Effect:
    """What a trick does to a reward, over the P prompts of which at least one answer could be scored with it and without.

    `changed` is the share of the answers that the trick applies to, and `before` the mean reward without it. `change` is the mean difference,
    taken over the answers to a prompt and then over prompts, with its 95 % `interval` by the prompts (None where all differences are alike).
    `advantage` is the mean group-relative advantage of changed answers in groups that hold each answer both ways, with its interval likewise.
    """

    reward: str
    trick: str
    prompts: int
    changed: float
    before: float
    change: float
    interval: Interval | None
    advantage: float
    advantage_interval: Interval | None

    @property
    def pays(self) -> bool:
        """Whether the trick raises the reward, by the interval; of a single prompt nobody can say."""
        return self.prompts > 1 and surely_positive(self.change, self.interval)

    @property
    def reinforced(self) -> bool:
        """Whether the trick has a positive advantage, by the interval; of a single prompt nobody can say."""
        return self.prompts > 1 and surely_positive(self.advantage, self.advantage_interval)


def surely_positive(mean: float, interval: Interval | None) -> bool:
    """Whether a mean is above 0 with its interval; where all values are alike, whether they are."""
    return mean > 0 if interval is None else interval[0] > 0


@reward_errors()
def probe(
    mixture: Mixture,
    samples: Sequence[Sample],
    tricks: Iterable[Trick],
    *,
    scale: AdvantageScale = "std",
) -> list[Effect]:
    """The effect of each trick on each reward of the mixture, and on their weighted sum where there are several.

    `scale` is that of `align.losses.group_advantages`. Answers that could not be scored, with or without the trick, are left out. Raises
    UserError where the answers are to fewer than two prompts, a reward cannot be used or a trick fails.
    """
    ordered = sorted(samples, key=prompt_of)
    groups = [list(group) for _, group in groupby(ordered, prompt_of)]
    if len(groups) < 2:
        raise UserError(f"a probe needs answers to two prompts at least, and there are answers to {len(groups)}")
    following = [groups[(number + 1) % len(groups)] for number in range(len(groups))]
    others = [
        other[place % len(other)] for group, other in zip(groups, following, strict=True) for place in range(len(group))
    ]
    group_of = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    mixture.make_ready()
    before = scored(mixture, groups)
    if not any(isfinite(score.value) for reward in before for score in reward.components.values()):
        why = next(iter(why_masked(ordered, before)), "no reward is for them")
        raise UserError(f"none of the {len(ordered)} answers could be scored: {why}")
    found = []
    for trick in tricks:
        after = [trick.apply(*pair) for pair in zip(ordered, others, strict=True)]
        changed = fmean(a.completion != b.completion for a, b in zip(after, ordered, strict=True))
        rest = iter(after)
        parts = [list(islice(rest, len(group))) for group in groups]
        found.append((trick.name, changed, scored(mixture, parts) if changed else before))
    names = list(dict.fromkeys(name for reward in before for name in reward.components))
    several = len(names) > 1 or mixture.terms[0].weight != 1
    return [
        effect_of(name, trick, changed, values(before, name), values(after, name), group_of, scale)
        for name in [*names, *([MIXTURE] if several else [])]
        for trick, changed, after in found
    ]


def scored(mixture: Mixture, groups: Sequence[Sequence[Sample]]) -> list[SampleReward]:
    """The rewards of all samples: where they depend on others, on those of their group."""
    parts = groups if mixture.depends_on_batch else [list(chain.from_iterable(groups))]
    return [reward for part in parts for reward in mixture.score_each(part)]


def prompt_of(sample: Sample) -> tuple[str, str]:
    """By which answers are grouped: domain and prompt; where a file has no prompts, each answer is to one of its own."""
    return sample.domain, sample.prompt or sample.id


def values(rewards: Sequence[SampleReward], name: str) -> torch.Tensor:
    """[N] float64, NaN where the reward of that name has no value."""
    if name == MIXTURE:
        found = [nan if reward.value is None else reward.value for reward in rewards]
    else:
        found = [reward.components[name].value if name in reward.components else nan for reward in rewards]
    return torch.tensor(found, dtype=torch.float64)


def effect_of(
    reward: str,
    trick: str,
    changed: float,
    before: torch.Tensor,
    after: torch.Tensor,
    group_of: torch.Tensor,
    scale: AdvantageScale,
) -> Effect:
    """The effect by the rewards [N] of the same answers without and with the trick, NaN where they have none; `group_of` [N] are their prompts."""
    valid = torch.isfinite(before) & torch.isfinite(after)
    both = torch.cat([group_of, group_of])
    advantages, _ = group_advantages(torch.cat([before, after]), both, torch.cat([valid, valid]), scale=scale)
    of_changed = advantages[len(before) :]
    prompts = [here for number in range(int(group_of.max()) + 1) if (here := valid & (group_of == number)).any()]
    differences = [float((after - before)[here].mean()) for here in prompts]
    means = [float(of_changed[here].mean()) for here in prompts]
    return Effect(
        reward=reward,
        trick=trick,
        prompts=len(prompts),
        changed=changed,
        before=fmean(float(before[here].mean()) for here in prompts) if prompts else nan,
        change=fmean(differences) if prompts else nan,
        interval=mean_interval(differences),
        advantage=fmean(means) if prompts else nan,
        advantage_interval=mean_interval(means),
    )


def record_of(effects: Sequence[Effect], model: str, answers: int) -> dict[str, Any]:
    """A probe, ready for JSON."""
    rows = [asdict(effect) | {"pays": effect.pays, "reinforced": effect.reinforced} for effect in effects]
    plain = [{k: None if isinstance(v, float) and not isfinite(v) else v for k, v in row.items()} for row in rows]
    return {
        "probed": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
        "answers": answers,
        "effects": plain,
    }


def keep(record: Mapping[str, Any], terms: Sequence[RewardTerm], model: ModelOptions) -> None:
    """Keep a probe for each of the rewards that scored some of the answers."""
    for term in terms:
        if own := [row for row in record["effects"] if row["reward"] == term.component and row["prompts"]]:
            file = kept_file(term, model)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps({**record, "effects": own}, indent=1))


def kept(term: RewardTerm, model: ModelOptions) -> dict[str, Any] | None:
    """The last probe of a reward with its parameters and a model; None where there is none."""
    try:
        record: dict[str, Any] = json.loads(kept_file(term, model).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record


def kept_file(term: RewardTerm, model: ModelOptions) -> Path:
    """Where a probe is kept: in $XDG_CACHE_HOME, or else ~/.cache, by what decides the scores and which answers there are."""
    directory = Path(model.path)
    found = [file for pattern in WEIGHTS for file in sorted(directory.glob(pattern))]
    weights = [(file.name, (about := file.stat()).st_size, about.st_mtime_ns) for file in found]
    parts = [term.name, term.params, code_digest(term), str(directory.absolute() if weights else directory), weights]
    name = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "moe-align" / "probes" / f"{name}.json"


def code_digest(term: RewardTerm) -> str:
    """A hash of what computes the reward: its own file and those beside it, or the package that it comes from."""
    if term.file is not None:
        return "".join(map(file_digest, files_of(term.file)))
    module = getmodule(get(term.name).function)
    file = getattr(module, "__file__", None)
    return package_digest(Path(file), module.__name__.count(".")) if module and file else ""


@cache
def package_digest(file: Path, depth: int) -> str:
    """A hash of the Python files of the package in whose `depth`-th level the file lies."""
    files = sorted(file.parents[depth - 1].rglob("*.py")) if depth else [file]
    return hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()


def notes_on(terms: Sequence[RewardTerm], model: ModelOptions, recipe: Path) -> list[str]:
    """Which of a recipe's rewards have never been probed, and which tricks the others were found to pay for."""
    found = {term.component: kept(term, model) for term in terms if term.weight}
    never = [name for name, record in found.items() if record is None]
    notes = [
        f"rewards: {', '.join(never)}: never probed with this model; `align rewards probe {recipe}` says which cheap tricks they pay for"
    ]
    for name, record in found.items():
        paid = [row["trick"] for row in record["effects"] if row["pays"]] if record else []
        notes += (
            [f"rewards: {name} pays for tricks, as probed on {record['probed'][:10]}: {', '.join(paid)}"]
            if record and paid
            else []
        )
    return notes if never else notes[1:]
