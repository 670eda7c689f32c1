"""The former place of `rollout.sync`."""

from typing import Any

import rollout
from rollout.sync.base import MIB, Bucket, buckets

__all__ = ["MIB", "Bucket", "buckets"]


def __getattr__(name: str) -> Any:
    return getattr(rollout, name)
