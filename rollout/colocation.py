"""Learner ranks and rollout workers on the same GPUs: one side works, and what the other holds is in the CPU's memory."""

from typing import Any, Protocol


class Side(Protocol):
    """The learner, or the rollout workers together. Both methods do nothing where they have been called already."""

    def offload(self) -> None:
        """Move what it holds on its GPUs to the CPU's memory."""

    def onload(self) -> None:
        """Move it back to the GPUs."""


class Colocation:
    """Which side has the shared GPUs. Bundle n of `placement_group` has one, for rank n and worker n."""

    def __init__(self, placement_group: Any):
        self.placement_group = placement_group
        self._holder: Side | None = None

    def claim(self, side: Side) -> None:
        """Give the GPUs to `side`, which is about to use them; the other side is offloaded first."""
        if self._holder is not side:
            if self._holder is not None:
                self._holder.offload()
            side.onload()
            self._holder = side

    def release(self, side: Side) -> None:
        """Note that the processes of `side` have ended."""
        if self._holder is side:
            self._holder = None
