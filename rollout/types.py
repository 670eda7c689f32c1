"""The records of this package: what is asked of the sampler, and what comes back.

Token ids go in and token ids come out. Text never crosses this boundary, so nothing is ever tokenised twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from typing_extensions import deprecated

Experts = npt.NDArray[np.uint8 | np.uint16]
"""Ids of experts that routers chose, [tokens, MoE layers, k]."""


def expert_dtype(experts: int) -> type[np.uint8 | np.uint16]:
    """What holds the id of each of so many experts, and the mark of `not_routed`."""
    return np.uint8 if experts <= np.iinfo(np.uint8).max else np.uint16


def not_routed(dtype: npt.DTypeLike) -> int:
    """The id that marks a token of which no expert is known, in place of ids of this type: its largest number."""
    return int(np.iinfo(dtype).max)


class RolloutError(Exception):
    """The sampler could not do what was asked; the message says what and what to do.

    `stacks` is what the workers' threads did when one of them took too long, as text.
    """

    stacks = ""


class WeightUpdateError(RolloutError):
    """An update did not write every parameter of the sampler: its weights cannot be trusted any more."""


class NotReceivedError(RolloutError):
    """A worker did not receive all of an update that was broadcast. It can load the same weights again."""


class PublishError(Exception):
    """A learner could not publish its weights."""


class PublisherDiedError(PublishError):
    """The learner is gone, and its weights with it."""


class FinishReason(StrEnum):
    """Why a turn ended."""

    STOP = "stop"  # the policy said so, with an end-of-sequence token
    LENGTH = "length"  # cut off at the limit of new tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to continue: `token_ids` are the whole prompt, with the tokens of the chat template."""

    id: str
    token_ids: Sequence[int]


class Versions(NamedTuple):
    """From token `start` of a trajectory on, tokens were drawn with the weights of `version`."""

    start: int
    version: int


class Turn(NamedTuple):
    """Tokens `start` to `end` of a trajectory, which the policy drew in one go, and why it stopped."""

    start: int
    end: int
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """What the policy, and an environment between its turns, wrote after a prompt: P tokens of prompt, then T tokens.

    Everything downstream (scoring, losses, samples files) reads this record; its tokens are never tokenised again.
    """

    prompt_id: str
    index: int  # the place in its group
    seed: int  # what seeded its sampling
    prompt_token_ids: Sequence[int]  # [P], as sampled from, with the tokens of the chat template
    token_ids: Sequence[int]  # [T], with the end-of-sequence token where the policy ended by itself
    sampled: npt.NDArray[np.bool_]  # [T], true where the policy drew the token, false where an environment wrote it
    log_probs: npt.NDArray[np.float32]  # [T], natural, after temperature, under the weights that drew; 0 if not sampled
    weight_versions: Sequence[Versions]  # in order of their starts, the first at 0
    turns: Sequence[Turn]
    finish_reason: FinishReason  # of the last turn
    experts: Experts | None = None  # [P+T-1, MoE layers, k], what the routers chose; see `not_routed`

    @classmethod
    def of_one_turn(
        cls,
        prompt: Prompt,
        index: int,
        token_ids: Sequence[int],
        log_probs: Sequence[float],
        finish_reason: FinishReason,
        *,
        seed: int = 0,
        weight_version: int = 0,
        experts: Experts | None = None,
    ) -> Self:
        """The trajectory of a prompt that the policy answered once, with weights of one version."""
        return cls(
            prompt_id=prompt.id,
            index=index,
            seed=seed,
            prompt_token_ids=prompt.token_ids,
            token_ids=token_ids,
            sampled=np.ones(len(token_ids), dtype=bool),
            log_probs=np.array(log_probs, dtype=np.float32),
            weight_versions=[Versions(0, weight_version)],
            turns=[Turn(0, len(token_ids), finish_reason)],
            finish_reason=finish_reason,
            experts=experts,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trajectory) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in self.__slots__
        )

    @property
    def is_finite(self) -> bool:
        """Whether all its log-probabilities are finite; where not, the weights or the engine are broken."""
        return bool(np.isfinite(self.log_probs).all())


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its trajectories, by index."""

    prompt: Prompt
    trajectories: Sequence[Trajectory]

    @property
    @deprecated("Group.completions is Group.trajectories now")
    def completions(self) -> Sequence[Trajectory]:
        """The trajectories, by their old name."""
        return self.trajectories


LEAST_TEMPERATURE = 0.01
"""The lowest above 0 that vLLM samples at."""


class SamplingOptions(BaseModel):
    """How completions are drawn. A temperature of 0 is greedy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(
        1.0, ge=0, le=2, description="what logits are divided by, up to vLLM's 2; 0 takes the likeliest token"
    )
    max_new_tokens: int = Field(64, ge=1, description="longest completion, in tokens")

    @model_validator(mode="after")
    def _is_sampled_as_given(self) -> Self:
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature: vLLM samples at {LEAST_TEMPERATURE} where less is given: take that, or 0 for the likeliest token"
            )
        return self


class EngineOptions(BaseModel):
    """How the vLLM engine of a worker is set up."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_length: int = Field(512, ge=16, description="longest prompt and completion together, in tokens")
    batch_sequences: int = Field(
        128,
        ge=1,
        description="sequences sampled as one engine batch: the unit of work that is handed to a worker, and sampled again when it is lost",
    )
    concurrent_sequences: int | None = Field(
        None,
        ge=1,
        description="sequences of an engine batch that are computed at the same time, while the others wait for one of them to end; "
        "all of them when not given",
    )
    kv_cache_gb: float = Field(
        1.0, gt=0, description="memory for the KV cache of a worker on a CPU, or on a GPU that is not its own, in GiB"
    )
    gpu_memory_share: float = Field(
        0.85,
        gt=0,
        le=1,
        description="share of a GPU's memory for a worker on a GPU; where the GPU is not its own, what must be free when it starts",
    )
    gpus: float = Field(
        1.0,
        gt=0,
        le=1,
        description="GPUs of a worker's process; below 1 (0.4, say) a learner rank may have the rest of it",
    )
    tensor_parallel: int = Field(
        1, ge=1, description="processes that hold one copy of the policy together, each on a GPU where there are any"
    )
    adapter_rank: int = Field(
        0,
        ge=0,
        description="largest rank of an adapter that vLLM adds to the policy; `weights.transport: adapter` sets it",
    )
    record_experts: bool = Field(
        False,
        description="note with every token the experts that the sampler's routers chose, and write them with the samples; "
        "`grpo.routing_replay: sampler` notes them too",
    )
    sleeps: bool = Field(
        False, description="the engine can put what it holds on its GPU into the CPU's memory; `colocate` sets it"
    )
    cuda_graphs: bool = Field(
        False,
        description="a decoding step is one CUDA graph, captured at the start, in place of kernels that are launched one by one: faster "
        "where a model is small for its GPU. For GPUs",
    )
    batch_invariant: bool = Field(
        False,
        description="kernels whose results do not depend on the rest of the batch, so that what is sampled is the same to the last bit whichever "
        "worker draws it; slower. For GPUs, without cuda_graphs",
    )
    native_rotary: bool = Field(
        True,
        description="rotary embedding in PyTorch. vLLM's own CPU kernel rotates the wrong rows for DeepSeek-V2 without YaRN; "
        "false is there to show that the agreement gate notices",
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if (self.concurrent_sequences or 0) > self.batch_sequences:
            raise ValueError(
                f"concurrent_sequences is {self.concurrent_sequences}, and an engine batch has batch_sequences = {self.batch_sequences}: "
                "raise batch_sequences, or leave concurrent_sequences out"
            )
        if self.batch_invariant and self.cuda_graphs:
            raise ValueError(
                "batch_invariant: a graph would keep kernels that depend on the batch; leave cuda_graphs out"
            )
        if self.gpus < 1 and self.tensor_parallel > 1:
            raise ValueError(
                "gpus below 1, as with colocate, is for workers of one process: leave it or tensor_parallel out"
            )
        return self


def of_nodes(resources: dict[str, float]) -> dict[str, float]:
    """Raise ValueError for what Ray counts itself, or of which nothing can be taken."""
    for name, amount in resources.items():
        if name in ("CPU", "GPU", "memory", "object_store_memory") or amount <= 0:
            raise ValueError(
                f"{name}: {amount:g} is none of the resources that nodes are given by `ray start --resources`, more than 0 of it"
            )
    return resources


Resources = Annotated[dict[str, float], AfterValidator(of_nodes)]
"""How much a process takes of each custom resource of Ray's."""


class FleetOptions(EngineOptions):
    """How many workers there are and what each may use."""

    workers: int = Field(2, ge=1, description="rollout workers: processes with an engine each")
    threads: int = Field(1, ge=1, description="CPU threads of a worker")
    resources: Resources = Field(
        {}, description="custom Ray resources that a worker takes, to say on which nodes of a cluster workers may be"
    )
    start_timeout_s: float | None = Field(
        None,
        gt=0,
        description="longest time a worker may take to load, in seconds; when not given, 300 and the time to read its files at 100 MB/s",
    )
    batch_timeout_s: float | None = Field(
        None,
        gt=0,
        description="longest time one engine batch may take, in seconds; when not given, as long as its engine makes steps. New weights "
        "and offloading may take as long too, or 600 s",
    )
    probe_interval_s: float = Field(5, gt=0, description="seconds between two probes of a worker")
    probe_timeout_s: float = Field(
        10, gt=0, description="time to answer a probe; a worker that leaves three unanswered is killed and restarted"
    )
    stall_timeout_s: float = Field(
        120, gt=0, description="longest time without an engine step in a batch; the worker is then killed and restarted"
    )
    max_restarts: int = Field(3, ge=0, description="restarts of a worker in a row, with nothing drawn in between")
