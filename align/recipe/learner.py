"""The options of a recipe's learner: ranks and ZeRO, optimizer, adapters, balance losses, what is frozen."""

import re
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from align.options import Options, refuse_without_effect
from rollout.types import Resources

BFLOAT16_SUMS = (
    "gradients of micro-batches add up in bfloat16 under learner.zero_stage 0, off by some percent where there are many; "
    "under 1, 2 and 3 in float32"
)
MERGED_ADAPTERS = (
    "in bfloat16 under learner.zero_stage 3, workers have adapters merged into the weights, which rounds small ones away (adapter/lost); so has the "
    "learner those of experts, and those of linear layers it adds to rounded outputs; under 0, 1 and 2 both have them beside the weights, in one product"
)


class OptimizerOptions(Options):
    """AdamW and its schedule."""

    learning_rate: float = Field(gt=0, description="highest learning rate")
    betas: tuple[float, float] = Field(
        (0.9, 0.95), description="decay of the averages of the gradient and of its square"
    )
    eps: float = Field(1e-8, gt=0, description="added to the denominator of an update")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay, relative to the learning rate")
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises from 0")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="course of the learning rate after the warm-up"
    )
    final_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate as a share of the highest")
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0 does not clip")

    @model_validator(mode="after")
    def _leave_out_what_has_no_effect(self) -> Self:
        if self.schedule == "constant":
            refuse_without_effect(self, "final_ratio", "schedule: constant keeps the rate", at="learner.optimizer.")
        return self


class LoraOptions(Options):
    """Low-rank adapters (LoRA, arXiv 2106.09685): W + alpha / rank * B A, of which only A and B are trained."""

    rank: int = Field(16, ge=1, description="rank of A and B")
    alpha: int = Field(32, ge=1, description="the adapter's product is scaled by alpha / rank")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="on what goes into the adapters of linear layers; 0 where there are others, such as of experts",
    )
    targets: list[str] = Field(
        ["attention"],
        min_length=1,
        description="presets (attention; all-linear: every linear layer but head, routers and what vLLM cannot serve, also called "
        "attention+shared; experts: the routed ones, which are no linear layers) "
        "and names such as q_proj or shared_experts.down_proj, one or a list; the router is frozen unless named (mlp.gate)",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_several(cls, targets: Any) -> Any:
        return [targets] if isinstance(targets, str) else targets


class BalanceOptions(Options):
    """Factors of the losses that keep routers from sending most tokens to few experts (DeepSeek-V2 report, eq. 23-31), on top of a stage's own."""

    expert: float | Literal["config"] = Field(
        0.0,
        description="of the load of experts (alpha_1); config: the checkpoint's aux_loss_alpha or router_aux_loss_coef",
    )
    device: float = Field(0.0, ge=0, description="of the load of the model's groups of experts, n_group (alpha_2)")
    communication: float = Field(0.0, ge=0, description="of the tokens that are sent to each of these groups (alpha_3)")

    @field_validator("expert", mode="before")
    @classmethod
    def _number_or_config(cls, expert: Any) -> Any:
        if expert == "config":
            return expert
        with suppress(TypeError, ValueError):
            if (number := float(expert)) >= 0:  # YAML reads 1e-3 as text
                return number
        raise ValueError("should be a number of at least 0, or config")


FREEZABLE = ("router", "experts", "shared_experts", "attention", "mlp", "norms", "embeddings", "head")
FIRST_LAYERS = re.compile(r"first_([1-9]\d*)_layers")


def _freezable(part: str) -> str:
    if part not in FREEZABLE and not FIRST_LAYERS.fullmatch(part):
        raise ValueError(
            f"should be one of {', '.join(FREEZABLE)}, or first_N_layers such as first_15_layers, not {part!r}"
        )
    return part


class LearnerOptions(Options):
    """The DeepSpeed learners."""

    ranks: int = Field(2, ge=1, description="learner processes, data parallel")
    threads: int = Field(1, ge=1, description="CPU threads of a rank")
    gpus: float = Field(
        1.0,
        gt=0.5,
        le=1,
        description="GPUs of a rank, where there are any; below 1 (0.6, say) a rollout worker may have the rest of it, in memory too: "
        "rollout.gpus, rollout.gpu_memory_share",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="what ranks share out (ZeRO); 0, nothing, adds up a bfloat16 model's gradients in bfloat16"
    )
    expert_parallel: int = Field(
        1,
        ge=1,
        description="ranks that share the routed experts of a layer among them (DeepSpeed's AutoEP); 1: each has all",
    )
    micro_batch_tokens: int = Field(4096, ge=1, description="tokens of a micro-batch, padding included")
    gradient_checkpointing: bool = Field(
        False,
        description="compute activations again in the backward pass in place of keeping them: less memory, more time",
    )
    share_prompts: bool = Field(
        False,
        description="GRPO, DPO: compute a prompt once for all completions of a group or pair that are in a micro-batch: the same gradient for "
        "fewer tokens in one more pass, which pays where prompts are long",
    )
    port: int | None = Field(None, ge=1024, le=65535, description="where the ranks meet; a free port when not given")
    optimizer: OptimizerOptions
    lora: LoraOptions | None = Field(None, description="train adapters alone; all parameters when not given")
    freeze: list[Annotated[str, AfterValidator(_freezable)]] = Field(
        [],
        description="parts that stay as they are: router, experts (the routed ones), shared_experts, attention, mlp (of layers without experts), "
        "norms, embeddings, head, and whole layers from the first one on, such as first_15_layers",
    )
    balance: BalanceOptions = BalanceOptions()
    resources: Resources = Field(
        {}, description="custom Ray resources that a rank takes, to say on which nodes of a cluster ranks may be"
    )
    start_timeout_s: float | None = Field(
        None,
        gt=0,
        description="longest time a rank may take to load, in seconds; when not given, 600 and the time to read the files at 100 MB/s",
    )
    step_timeout_s: float = Field(1800, gt=0, description="longest time the ranks may take for a step, in seconds")
    stop_after_bad_steps: int = Field(
        4,
        ge=1,
        description="the run ends at so many updates in a row with a gradient that is not finite, or steps with such samples",
    )

    @model_validator(mode="after")
    def _adapters_freeze_the_rest(self) -> Self:
        if self.lora is not None:
            why = "lora trains adapters alone, where lora.targets says, and freezes all else"
            refuse_without_effect(self, "freeze", why, at="learner.")
        return self

    @model_validator(mode="after")
    def _prompts_can_be_shared(self) -> Self:
        if self.share_prompts and self.gradient_checkpointing:
            raise ValueError(
                "share_prompts: gradient_checkpointing drops the keys and values of prompts; leave one of them out"
            )
        if self.share_prompts and self.zero_stage == 3:
            raise ValueError(
                "share_prompts: ZeRO-3 cannot use a parameter twice in a step; take zero_stage 2, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _experts_can_be_spread(self) -> Self:
        if self.expert_parallel > 1:
            if self.ranks % self.expert_parallel:
                raise ValueError(f"ranks ({self.ranks}) must be a multiple of expert_parallel ({self.expert_parallel})")
            if self.zero_stage not in (1, 2):
                raise ValueError(f"expert_parallel needs zero_stage 1 or 2, not {self.zero_stage}")
            if self.lora is not None:
                raise ValueError("expert_parallel trains whole experts: leave out lora, or expert_parallel")
            if any(part == "experts" or FIRST_LAYERS.fullmatch(part) for part in self.freeze):
                raise ValueError(
                    "expert_parallel is for experts that are trained: leave it out, or experts and first layers out of freeze"
                )
        return self
