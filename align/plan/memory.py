"""The memory of each process, part by part, in bytes: what DeepSpeed and vLLM hold, by the recipe's own settings.

Parameters, gradients and optimizer states are counted exactly, as ZeRO (arXiv:1910.02054) shares them out; activations are an
estimate for a micro-batch of `learner.micro_batch_tokens`; what a process takes with nothing in it was measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.learner.head import TILE
from align.model.lora import ROUTERS, Part, block_of, parts_meant, without_layers
from align.model.rounding import is_rounded
from align.model.sizes import GIB, ModelSizes, Shape
from align.recipe import LearnerOptions, Roles
from rollout import FleetOptions

# DeepSpeed 0.19's defaults, which this project leaves alone: elements reduced as one; and under ZeRO-3 those that stay gathered because they are soon
# needed again, and those updated as one.
REDUCE_BUCKET, GATHERED, SUB_GROUP = 5 * 10**8, 10**9, 10**9
# Resident memory of a process that has imported and started everything and holds no model. Measured on x86-64 Linux, Python 3.11 and
# the versions that this project pins; `benchmarks/plan_memory.py` measures it against a run.
LEARNER_PROCESS, WORKER_PROCESS, SCORING_PROCESS = 0.75 * GIB, 1.0 * GIB, 0.13 * GIB
# The same on a GPU: CUDA's context, the kernels' workspaces and NCCL's buffers. Not measured here: what others report for an H100.
GPU_PROCESS = 2.0 * GIB

# Of the weights, what is resident at most while transformers reads them: 1.0 to 1.24 was measured.
READING = 1.25

Parts = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Training:
    """What a learner rank trains: `trained` of the parameters, in `element` bytes a number.

    A step gives it `step_tokens` in sequences of `longest` tokens at most. `reference_copy`, which `margins` cannot do without, and the `teacher`
    of a distillation, are beside it. `together` sequences are in one micro-batch whatever their length: the two of a pair.
    """

    sizes: ModelSizes
    options: LearnerOptions
    trained: int
    step_tokens: int
    longest: int
    element: int
    reference_copy: bool
    margins: bool = False
    teacher: ModelSizes | None = None
    logits: bool = True
    together: int = 1

    @property
    def longest_together(self) -> int:
        """The least tokens that a micro-batch has room for."""
        return self.together * self.longest

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch; a sequence or pair that is longer than the budget is one of its own."""
        return min(max(self.options.micro_batch_tokens, self.longest_together), self.step_tokens)


@dataclass(frozen=True, slots=True)
class Work:
    """What the processes of a recipe do with a model of `sizes`, in `element` bytes a number.

    `training` is that of a learner rank, None where nothing is trained. `sent` elements go to the workers after an update; of an
    adapter that the workers hold beside the weights there are `beside`.
    """

    roles: Roles
    sizes: ModelSizes
    element: int
    training: Training | None
    sent: int
    beside: int

    @property
    def weight_bytes(self) -> int:
        return self.sizes.total * self.element

    @property
    def read_bytes(self) -> int:
        """Bytes of the largest model that learner rank 0 reads, one after the other."""
        teacher = self.training.teacher if self.training else None
        return max(self.sizes.total, teacher.total if teacher else 0) * self.element

    @property
    def stored_bytes(self) -> int:
        """Bytes of new weights in Ray's object store: those of before stay until the new ones are there."""
        weights = self.roles.weights
        return 2 * self.sent * self.element if weights and weights.transport == "object_store" else 0

    @property
    def route_bytes(self) -> int:
        """Bytes of the experts that a step's tokens went through, on their way from the workers to the ranks."""
        tokens = self.roles.sampling_rounds * self.roles.sampled_sequences * self.roles.longest
        return tokens * self.sizes.routes_a_token if self.roles.routes else 0

    @property
    def unrounded_bytes(self) -> float:
        """Bytes of a rank's own weights that wait in the CPU's memory while it computes with what `weights.precision` makes of them, after a weight sync.

        Under ZeRO-3 those of the whole model, all on rank 0.
        """
        if self.training is None or self.roles.weights is None:
            return 0.0
        sizes, precision = self.sizes, self.roles.weights.precision
        rounded = {n: math.prod(s) for n, s in sizes.parameters.items() if is_rounded(n, len(s), precision)}
        routed = sum(size for name, size in rounded.items() if ".experts." in name)
        elsewhere = routed * (1 - 1 / self.training.options.expert_parallel)
        return (sum(rounded.values()) - elsewhere) * self.element

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache that a token takes."""
        return self.sizes.kv_a_token * self.element


def learner_memory(job: Training, *, on_gpu: bool) -> dict[str, float]:
    """The memory of one learner rank at the peak of a step. What is allocated and never used counts on a GPU alone."""
    zero, ranks = job.options.zero_stage, job.options.ranks
    share = ranks if zero else 1
    elsewhere = job.sizes.routed * (1 - 1 / job.options.expert_parallel)
    weights = (job.sizes.total - elsewhere) / (ranks if zero == 3 else 1)
    gradients = job.trained / ranks if zero >= 2 else job.trained - elsewhere
    # Those of micro-batches add up in float32 where ZeRO takes part, whatever the policy's dtype.
    parts = {"weights": weights * job.element, "gradients": gradients * (4 if zero else job.element)}
    if zero == 3:
        # And the gradient of a block; the reference's weights are let go before the policy's are gathered.
        block = job.sizes.largest_block
        held = min(job.sizes.total, GATHERED + block) + (block if job.options.lora is None else 0)
        parts["gathered"] = held * job.element
    # Adam's two moments, and a float32 copy of the weights wherever DeepSpeed wraps the optimizer.
    wrapped = zero > 0 or job.element < 4
    parts["optimiser"] = job.trained / share * (12 if wrapped else 8)
    stepping = min(SUB_GROUP, job.trained / share) if zero == 3 else job.trained / share
    # ZeRO-1 reduces the sums of an update, the others what a micro-batch adds to them.
    bucket = (REDUCE_BUCKET if on_gpu else min(REDUCE_BUCKET, job.trained)) * (4 if zero == 1 else job.element)
    parts["update"] = stepping * 4 if wrapped else 0.0
    parts["reduction"] = float(bucket if zero else 0)
    if job.reference_copy:
        parts["reference"] = job.sizes.total / (ranks if zero == 3 else 1) * job.element
    if job.teacher is not None:
        parts["teacher"] = job.teacher.total / (ranks if zero == 3 else 1) * job.element
    return parts | activation_memory(job)


def at_rest(job: Training) -> float:
    """Bytes that a learner rank moves to the CPU's memory while the workers have the GPU, its gradients among them."""
    parts = learner_memory(job, on_gpu=True)
    return sum(parts.get(name, 0.0) for name in ("weights", "gradients", "optimiser", "reference", "teacher"))


def activation_memory(job: Training) -> dict[str, float]:
    """What backward needs of a micro-batch: with checkpointing one layer's, and the input of each layer; and a tile of logits.

    Where the logits of attention have a cap, the matrices of all heads: 8 bytes an element were seen in bfloat16.
    Models that change their logits after the head, such as Gemma 2 and Granite, have the whole of them instead, which is not counted.
    """
    one_layer, all_layers = job.sizes.activations
    elements = one_layer + job.sizes.layers * job.sizes.hidden if job.options.gradient_checkpointing else all_layers
    parts: dict[str, float] = {"activations": job.tokens * elements * job.element}
    if job.sizes.caps_attention:
        layers = 1 if job.options.gradient_checkpointing else job.sizes.layers
        parts["attention"] = layers * job.sizes.heads * job.tokens * job.longest * 4.0 * job.element
    if beside := experts_beside_factors(job):
        parts["experts beside adapters"] = beside / (job.sizes.layers if job.options.gradient_checkpointing else 1)
    if job.logits:
        # In float32 four times; the head's gradient in float32, and what a tile adds to it.
        head = job.sizes.vocabulary * job.sizes.hidden * (4 + job.element if job.options.lora is None else 0)
        parts["head"] = max(TILE, job.sizes.vocabulary) * 16 + head
    return parts


def experts_beside_factors(job: Training) -> float:
    """Bytes of the adapted experts of all layers, which the learner computes with beside their factors where it does not merge these: backward
    needs the copies that are made for that."""
    lora, options = job.options.lora, job.options
    if lora is None or options.zero_stage == 3 or job.element == 4:
        return 0.0
    adapted = adapted_parameters(job.sizes, lora.targets)
    return float(sum(math.prod(shape) for shape in adapted.values() if len(shape) == 3) * job.element)


def worker_memory(
    sizes: ModelSizes, options: FleetOptions, element: int, gpu_memory: float, adapter: float
) -> dict[str, float]:
    """The memory of one GPU of a rollout worker, or of its process on a CPU (`gpu_memory` 0), `adapter` bytes beside the weights.

    On a GPU of its own vLLM gives the KV cache what is left of `rollout.gpu_memory_share`; every GPU of a worker holds the
    whole latent of a token, which has no heads to divide.
    """
    weights = sizes.total * element / (options.tensor_parallel if gpu_memory else 1)
    tokens = max(options.max_length, 4096 if not gpu_memory else 8192)
    widest = max(sizes.activations[0], sizes.hidden)
    passing = (
        tokens * widest * element + (options.concurrent_sequences or options.batch_sequences) * sizes.vocabulary * 12
    )
    parts = {"weights": weights, "forward pass": passing} | ({"adapter": adapter} if adapter else {})
    if not gpu_memory or options.gpus < 1:
        return parts | {"KV cache": options.kv_cache_gb * GIB}
    left = gpu_memory * options.gpu_memory_share - sum(parts.values()) - GPU_PROCESS
    return parts | {"KV cache": max(left, 0.0)}


def adapted_parameters(sizes: ModelSizes, targets: Sequence[str]) -> dict[str, Shape]:
    """The parameters that presets and names mean, with their shapes. Raises UserError where a target means none."""
    candidates = parts_of_layers(sizes)
    chosen: dict[str, Shape] = {}
    for target in targets:
        chosen |= {p.parameter: sizes.parameters[p.parameter] for p in parts_meant(candidates, target)}
    return chosen


def parts_of_layers(sizes: ModelSizes) -> list[Part]:
    """The linear layers, routers and stacked experts of a model's layers."""
    return [part_of(n, s) for n, s in sizes.parameters.items() if ".layers." in n and len(s) > 1]


def part_of(name: str, shape: Shape) -> Part:
    """What the learner knows the parameter as: a linear layer, a router, or a stack of experts."""
    module = name.removesuffix(".weight")
    is_linear = len(shape) == 2 and name.endswith(".weight") and not module.endswith(ROUTERS)
    return Part(name, without_layers(module), is_linear)


def adapter_size(parameters: dict[str, Shape], rank: int) -> int:
    """Elements of the factors A [rank, in] and B [out, rank] of each parameter; of stacked experts, a pair each."""
    return sum(rank * math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in parameters.values())


def changed_size(sizes: ModelSizes, parameters: dict[str, Shape]) -> int:
    """Elements of the modules (an attention, an MLP, a bank of experts) that are sent after an update."""
    blocks = tuple({f"{block_of(name)}." for name in parameters})
    return sum(math.prod(shape) for name, shape in sizes.parameters.items() if name.startswith(blocks))
