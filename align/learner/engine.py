"""What a rank's DeepSpeed engine is made with: its configuration, the optimizer, and the blocks that ZeRO-3 fetches as one."""

from typing import Any

import torch

from align.learner.experts import autoep_section, moe_groups, shape
from align.recipe import LearnerOptions


def deepspeed_config(options: LearnerOptions, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration for a model in `dtype`."""
    spread = options.expert_parallel
    return {
        **({"expert_parallel": autoep_section(spread)} if spread > 1 else {}),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if clips_itself(options, dtype) else options.optimizer.clip_norm,
        "zero_optimization": {"stage": options.zero_stage},
        **(bfloat16_sections(options.zero_stage) if dtype == "bfloat16" else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def clips_itself(options: LearnerOptions, dtype: str) -> bool:
    """Whether the rank clips the gradient: without ZeRO and in float32, DeepSpeed does not tell its norm."""
    return options.zero_stage == 0 and dtype == "float32"


def bfloat16_sections(zero_stage: int) -> dict[str, Any]:
    """Weights and gradients in bfloat16, and the gradients of micro-batches added up in float32, but for ZeRO-0."""
    sections: dict[str, Any] = {"bf16": {"enabled": True, "immediate_grad_update": True}}
    if zero_stage:
        sections["data_types"] = {"grad_accum_dtype": "fp32"}
    if zero_stage == 1:
        # The sums themselves are reduced, once an update. Under ZeRO-2 and -3 it is each micro-batch's gradient.
        sections["communication_data_type"] = "fp32"
    return sections


def new_optimizer(module: torch.nn.Module, learner: LearnerOptions) -> torch.optim.Optimizer:
    """AdamW over what is trained of the module; vectors, such as norms and biases, do not decay."""
    options = learner.optimizer
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if len(shape(p)) > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if len(shape(p)) <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(
        moe_groups(groups) if learner.expert_parallel > 1 else groups,
        lr=0.0,  # until `apply` sets it: DeepSpeed's empty step must not decay
        betas=options.betas,
        eps=options.eps,
    )


def mark_moe_leaves(module: torch.nn.Module) -> None:
    """Make ZeRO-3 fetch a mixture-of-experts block as one: ranks use different experts, collectives must not differ.

    So too a layer whose weight PEFT replaces by its sum with the adapter's, for which it needs all three at once.
    """
    from deepspeed.utils import set_z3_leaf_modules
    from peft.tuners.lora.layer import ParamWrapper

    blocks = {
        type(m)
        for m in module.modules()
        if (hasattr(m, "experts") and hasattr(m, "gate")) or isinstance(m, ParamWrapper)
    }
    if not blocks:
        return
    wanted = [m for m in module.modules() if type(m) in blocks]
    marked = set_z3_leaf_modules(module, list(blocks))
    if {id(m) for m in marked} != {id(m) for m in wanted}:
        raise RuntimeError(f"ZeRO-3 marked {len(marked)} leaf modules where the model has {len(wanted)} expert blocks")
