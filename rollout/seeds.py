"""Where a sample's randomness comes from."""

import hashlib


def sample_seed(run_seed: int, step: int, prompt_id: str, index: int) -> int:
    """The seed [0, 2**63) of one completion: a function of what it is, not of who draws it or when.

    Two completions of one run share a seed only by accident of hashing, and a completion keeps its seed whatever the
    number of workers, the order of the requests or a restart.
    """
    key = f"{run_seed}\x1f{step}\x1f{prompt_id}\x1f{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1
