"""How long the phases of a step take, in seconds: upper ends, from what the engines have to compute and to move.

Every completion is taken to reach its limit and every sequence to fill the context, so that a real step is shorter. The rates are
assumptions: on GPUs an H100 SXM's data sheet (989 TFLOP/s dense in bfloat16, 3.35 TB/s, NVLink 450 GB/s one way) and a
400 Gbit/s network, with the shares below; on CPUs what the nano policy reaches on a thread.
"""

from dataclasses import dataclass

from align.model.sizes import ModelSizes

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


def sampling_seconds(
    sizes: ModelSizes,
    rates: Rates,
    *,
    each: int,
    together: int,
    new_tokens: int,
    weight_bytes: float,
    kv_bytes: float,
    threads: int,
) -> float:
    """Decoding `each` sequences of `new_tokens` on a worker, `together` at a time, whose GPUs hold `weight_bytes` each.

    A step of decoding reads the weights and the cache once (bandwidth), or computes all sequences, whichever takes longer.
    """
    together = min(each, together)
    read = (weight_bytes + together * kv_bytes * new_tokens / 2) / rates.decode_bytes
    compute = 2 * sizes.active * together / (rates.decode_flops * threads)
    return -(-each // together) * new_tokens * (max(read, compute) + sizes.layers * rates.layer_s)


def training_seconds(
    sizes: ModelSizes,
    rates: Rates,
    *,
    tokens: float,
    passes: int,
    threads: int,
    micro_batch_tokens: int,
    gathered_bytes: float,
) -> float:
    """Forward and backward of a rank's `tokens`, `passes` operations a parameter and token (6 without adapters and checkpointing).

    Under ZeRO-3 it also fetches `gathered_bytes` of weights in each micro-batch.
    """
    micro_batches = max(1, round(tokens / micro_batch_tokens))
    return tokens * sizes.active * passes / (rates.flops * threads) + micro_batches * gathered_bytes / rates.link


def transfer_seconds(sent_bytes: float, rates: Rates, *, broadcast: bool) -> float:
    """New weights from rank 0 to every worker: over a link; or to the CPU, into Ray's store, and out of it into the engines."""
    return sent_bytes / rates.link if broadcast else 3 * sent_bytes / rates.host
