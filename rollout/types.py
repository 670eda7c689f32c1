"""The records of this package: what is asked of the sampler, and what comes back.

Token ids go in and token ids come out. Text never crosses this boundary, so nothing is ever tokenised twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RolloutError(Exception):
    """The sampler could not do what was asked; the message says what and what to do.

    `stacks` is what the workers' threads did when one of them took too long, as text.
    """

    stacks = ""


class WeightUpdateError(RolloutError):
    """An update did not write every parameter of the sampler: its weights cannot be trusted any more."""


class NotReceivedError(RolloutError):
    """A worker did not receive all of an update that was sent to several at once. It can take the same again."""


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # the policy said so, with an end-of-sequence token
    LENGTH = "length"  # cut off at the limit of new tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to continue: `token_ids` are the whole prompt, with the tokens of the chat template."""

    id: str
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation of a prompt.

    `token_ids` [T] include the end-of-sequence token when the policy ended by itself; `log_probs` [T] are the natural
    logarithms of the probabilities that the tokens were drawn with, after temperature. `weight_version` is the version
    of the weights that drew them, `seed` what seeded them, `index` the place in its group.
    """

    prompt_id: str
    index: int
    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    log_probs: Sequence[float]
    finish_reason: FinishReason
    seed: int
    weight_version: int

    @property
    def is_finite(self) -> bool:
        """Whether all its log-probabilities are numbers; where not, the weights or the engine are broken."""
        return all(map(isfinite, self.log_probs))


class SamplingOptions(BaseModel):
    """How completions are drawn. A temperature of 0 is greedy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(1.0, ge=0, le=10)
    max_new_tokens: int = Field(64, ge=1)


class EngineOptions(BaseModel):
    """How the vLLM engine of a worker is set up."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_length: int = Field(512, ge=16, description="longest prompt and completion together, in tokens")
    batch_sequences: int = Field(
        128,
        ge=1,
        description="sequences sampled together as one engine batch: the unit of work that is handed to a worker",
    )
    kv_cache_gb: float = Field(
        1.0, gt=0, description="memory for the KV cache of a worker on a CPU, or on a GPU that is not its own, in GiB"
    )
    gpu_memory_share: float = Field(0.85, gt=0, le=1, description="share of a GPU's memory for a worker on a GPU")
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
    sleeps: bool = Field(
        False, description="the engine can put what it holds on its GPU into the CPU's memory; `colocate` sets it"
    )
    native_rotary: bool = Field(
        True,
        description="rotary embedding in PyTorch. vLLM's own CPU kernel rotates the wrong rows for DeepSeek-V2 without YaRN; "
        "false is there to show that the agreement gate notices",
    )

    @model_validator(mode="after")
    def _shared_by_one(self) -> Self:
        if self.gpus < 1 and self.tensor_parallel > 1:
            raise ValueError(
                "gpus below 1, as with colocate, is for workers of one process: leave it or tensor_parallel out"
            )
        return self


class FleetOptions(EngineOptions):
    """How many workers there are and what each may use."""

    workers: int = Field(2, ge=1, description="rollout workers: processes with an engine each")
    threads: int = Field(1, ge=1, description="CPU threads of a worker")
    resources: dict[str, float] = Field(
        {}, description="custom Ray resources that a worker takes, to say on which nodes of a cluster workers may be"
    )
    start_timeout_s: float = Field(300, gt=0, description="longest time a worker may take to load, in seconds")
    batch_timeout_s: float = Field(600, gt=0, description="longest time one engine batch may take, in seconds")
    probe_interval_s: float = Field(5, gt=0, description="seconds between two probes of a worker")
    probe_timeout_s: float = Field(
        10, gt=0, description="time to answer a probe; a worker that leaves three unanswered is killed and restarted"
    )
    stall_timeout_s: float = Field(
        120, gt=0, description="longest time without an engine step in a batch; the worker is then killed and restarted"
    )
    max_restarts: int = Field(3, ge=0, description="restarts of a worker in a row, with nothing drawn in between")
