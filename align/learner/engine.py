"""What a rank is made with: the environment of its process, its device, and DeepSpeed's configuration, optimizer, and blocks that ZeRO-3 fetches as one."""

import os
import socket
from typing import Any

import torch

from align.errors import UserError
from align.learner.experts import autoep_section, moe_groups, shape
from align.recipe import LearnerOptions
from rollout.processes import HIDDEN, openmp


def environment(rank: int, ranks: int, threads: int, *, on_gpu: bool | None = None) -> dict[str, str]:
    """What must be in the environment of rank `rank` before its process starts, on a GPU where this process has one when not given."""
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "TOKENIZERS_PARALLELISM": "false",
        **openmp(threads),
    }
    if not (torch.cuda.is_available() if on_gpu is None else on_gpu):
        variables |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(ranks)}
    else:
        # Segments that grow, so that memory that was freed is not left in pieces too small to be used.
        allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        variables |= {"LOCAL_RANK": "0", "PYTORCH_CUDA_ALLOC_CONF": allocator}
    return variables


def device_of_rank() -> torch.device:
    """The GPU that Ray has given this process, or the CPU where it has given none. Raises UserError for a GPU that torch cannot use."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in (None, *HIDDEN):
        return torch.device("cpu")
    raise UserError(
        f"learner: torch, built for CUDA {torch.version.cuda}, cannot use the GPU of {socket.gethostname()} that a rank was given: the driver "
        "there is too old for it, or does not work (nvidia-smi tells up to which CUDA it goes). Update it, or install "
        "engines for CPUs (`export ACCELERATOR=cpu`, then `make clean setup`)"
    )


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
        fused=True,  # in one pass over each tensor, where else each operation would be one
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
