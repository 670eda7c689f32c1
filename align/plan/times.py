"""How long the phases of a step take, in seconds: upper ends, from what the engines have to compute and to move.

Every completion is taken to reach its limit and every sequence to fill the context, so that a real step is shorter. The rates are
assumptions: on GPUs an H100 SXM's data sheet (989 TFLOP/s dense in bfloat16, 3.35 TB/s, NVLink 450 GB/s one way) and a
400 Gbit/s network, with the shares below; on CPUs what the nano policy reaches on a thread.
"""

from dataclasses import dataclass

from align.plan.memory import Parts, Work, at_rest

TRAINING_SHARE, DECODING_SHARE = 0.25, 0.5
# Launching a layer's kernels one by one, as vLLM does without CUDA graphs (`enforce_eager`).
EAGER_LAYER_S = 0.25e-3


@dataclass(frozen=True, slots=True)
class Rates:
    """Of a learner rank: floating-point operations a second; of a GPU in decoding: bytes a second; of links: bytes a second."""

    flops: float
    decode_bytes: float
    decode_flops: float
    layer_s: float
    link: float
    host: float


GPU_IN_A_NODE = Rates(989e12 * TRAINING_SHARE, 3.35e12 * DECODING_SHARE, 989e12 * 0.25, EAGER_LAYER_S, 450e9 * 0.5, 5e9)
GPU_OVER_NODES = Rates(989e12 * TRAINING_SHARE, 3.35e12 * DECODING_SHARE, 989e12 * 0.25, EAGER_LAYER_S, 50e9 * 0.7, 5e9)
CPU_THREAD = Rates(38e9, 10e9, 7.5e9, 0.0, 1e9, 1e9)


def step_seconds(work: Work, worker: Parts | None, gpus_per_node: int) -> dict[str, float]:
    """Seconds of the phases of a step, on nodes with so many GPUs each, or on CPUs. `worker` is the memory of a rollout worker.

    What scoring takes depends on the rewards, and goes on beside sampling.
    """
    job, roles, sizes = work.training, work.roles, work.sizes
    rates = CPU_THREAD
    if gpus_per_node:
        rates = GPU_OVER_NODES if job and job.options.ranks > gpus_per_node else GPU_IN_A_NODE
    seconds = {}
    if roles.sampling and roles.rollout and worker:
        options, new_tokens = roles.rollout, roles.sampling.max_new_tokens
        batches = -(-roles.sampled_sequences // options.batch_sequences)
        each = -(-roles.sampled_sequences // batches)
        in_cache = int(worker["KV cache"] // (work.kv_bytes * options.max_length))
        together = min(each, max(1, min(options.concurrent_sequences or each, in_cache)))
        # A step of decoding reads the weights and the cache once, or computes all sequences, whichever takes longer.
        read = (worker["weights"] + together * work.kv_bytes * new_tokens / 2) / rates.decode_bytes
        threads = 1 if gpus_per_node else options.threads
        compute = 2 * sizes.active * together / (rates.decode_flops * threads)
        launching = 0.0 if options.cuda_graphs else sizes.layers * rates.layer_s
        rounds = roles.sampling_rounds * -(-batches // options.workers) * -(-each // together)
        seconds["sampling"] = rounds * new_tokens * (max(read, compute) + launching)
    if job is None:
        return seconds
    checkpointing, threads = job.options.gradient_checkpointing, 1 if gpus_per_node else job.options.threads
    tokens = roles.trained_sequences * roles.longest / job.options.ranks
    # Operations a parameter and token: two forward and four backward, of which frozen weights save two.
    passes = (6 if job.trained == sizes.total else 4) + 2 * (checkpointing + roles.reference)
    # Under ZeRO-3 every pass of a micro-batch fetches the weights.
    gathers = (3 if checkpointing else 2) + job.reference_copy if job.options.zero_stage == 3 else 0
    micro_batches = max(1, round(tokens / job.options.micro_batch_tokens))
    operations = sizes.active * passes + (2 * job.teacher.active if job.teacher else 0)
    seconds["training"] = tokens * operations / (rates.flops * threads)
    fetched = gathers * work.weight_bytes
    if job.teacher and job.options.zero_stage == 3:
        fetched += job.teacher.total * work.element
    seconds["training"] += micro_batches * fetched / rates.link
    if roles.sampling and roles.weights:
        sent = work.sent * work.element
        # Over a link; or to the CPU, into Ray's store, and out of it into the engines.
        by_link = roles.weights.transport == "broadcast"
        seconds["weights to the workers"] = sent / rates.link if by_link else 3 * sent / rates.host
        if roles.colocated and gpus_per_node:
            seconds["taking turns"] = 2 * (at_rest(job) + work.weight_bytes) / rates.host
    return seconds
