"""The experts that the routers of a vLLM engine choose, token by token.

On a GPU vLLM returns them with a request's output (`enable_return_routed_experts`). That needs Triton, which its build for CPUs does not have.
What it rests on does not: every router passes the chosen experts to a function of ours. A step of the engine computes tokens of many
requests; which token of which request a row is, vLLM's batch says.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rollout.types import Experts, RolloutError, expert_dtype, not_routed


def start_recording(worker: Any) -> None:
    """Record from now on in a vLLM worker process. Raises RolloutError where the model has no routers that tell what they choose."""
    worker.routing = RoutingRecorder(worker.model_runner)


def forget_routing(worker: Any) -> None:
    """Drop what was recorded: what follows is another batch."""
    worker.routing.forget()


def take_routing(worker: Any) -> Mapping[str, Experts]:
    """The experts [tokens, layers, k] of each request since `forget_routing`, by its id, from its first token on."""
    taken: Mapping[str, Experts] = worker.routing.take()
    return taken


def routed_layers(worker: Any) -> tuple[list[int], int]:
    """The indices of the layers with routed experts in the model of a vLLM worker process, and how many experts each has."""
    layers = moe_layers(worker.model_runner)
    return [layer.layer_id for layer in layers], layers[0].router.global_num_experts


def moe_layers(runner: Any) -> list[Any]:
    """vLLM's modules with routed experts, in the order of the layers. Raises RolloutError where there are none that tell what they choose."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    layers = [module for module in runner.get_model().modules() if isinstance(module, MoERunner)]
    if not layers or not all(hasattr(layer.router, "top_k") for layer in layers):
        raise RolloutError(
            "rollout.record_experts: the model has no routed experts, or vLLM does not tell what its routers choose"
        )
    return layers


def returned_experts(returned: Any, layers: Sequence[int], experts: int, tokens: int) -> Experts:
    """What vLLM returned with a request [tokens, all layers, k], of the `layers` with routed experts alone.

    Raises RolloutError unless there is a row for each of `tokens`.
    """
    rows = len(returned) if returned is not None else 0
    if rows != tokens:
        raise RolloutError(f"rollout.record_experts: vLLM returned the experts of {rows} tokens, not of {tokens}")
    found: Experts = np.ascontiguousarray(returned[:, list(layers)]).astype(expert_dtype(experts))
    return found


class RoutingRecorder:
    """Keeps a note of every step of the engine: the requests in it, where their tokens begin, and the experts of all tokens.

    A preempted request is computed twice, and counts as it was the first time, when its tokens were drawn. Tokens whose keys and values
    vLLM has cached are not computed: their experts are kept by the cache's slots.
    """

    def __init__(self, runner: Any):
        layers = moe_layers(runner)
        self._runner, self._execute = runner, runner.execute_model
        sizes = len(layers), layers[0].router.top_k
        self._dtype: Any = expert_dtype(layers[0].router.global_num_experts)
        self._step = torch.zeros(runner.max_num_tokens, *sizes, dtype=torch.int32)
        for place, layer in enumerate(layers):
            layer.router.set_capture_fn(partial(self._capture, place))
        cached = runner.vllm_config.cache_config.enable_prefix_caching
        self._by_slot: Experts | None = None if not cached else np.zeros((0, *sizes), self._dtype)
        self.forget()
        runner.execute_model = self._execute_and_note

    def forget(self) -> None:
        """Drop all notes."""
        self._notes: list[tuple[str, int, Experts]] = []
        self._seen: set[str] = set()

    def take(self) -> dict[str, Experts]:
        """The experts of each request that was computed since `forget`, by the id that its caller knows."""
        ends: dict[str, int] = {}
        for request, start, experts in self._notes:
            ends[request] = max(ends.get(request, 0), start + len(experts))
        shape = self._step.shape[1:]
        found = {request: np.full((end, *shape), not_routed(self._dtype), self._dtype) for request, end in ends.items()}
        for request, start, experts in reversed(self._notes):
            found[request][start : start + len(experts)] = experts
        self.forget()
        # vLLM appends a number of its own to an id.
        return {request.rpartition("-")[0]: experts for request, experts in found.items()}

    def _capture(self, place: int, chosen: torch.Tensor) -> None:
        self._step[: len(chosen), place] = chosen

    def _execute_and_note(self, scheduled: Any, *arguments: Any, **named: Any) -> Any:
        result = self._execute(scheduled, *arguments, **named)
        batch = self._runner.input_batch
        counts = [scheduled.num_scheduled_tokens[request] for request in batch.req_ids]
        starts = batch.num_computed_tokens_cpu[: len(counts)].tolist()
        rows = self._step[: sum(counts)].numpy().astype(self._dtype)
        if self._by_slot is not None:
            self._note_what_is_cached(batch, batch.req_ids, starts, rows)
        at = 0
        for request, start, count in zip(batch.req_ids, starts, counts, strict=True):
            self._notes.append((request, start, rows[at : at + count]))
            at += count
        return result

    def _note_what_is_cached(self, batch: Any, requests: Sequence[str], starts: Sequence[int], rows: Experts) -> None:
        """Keep the rows by their slots, then note those of requests whose first tokens others have computed, in this step or before."""
        table = batch.block_table[0]
        slots: npt.NDArray[np.int64] = table.slot_mapping.gpu[: len(rows)].cpu().numpy()
        assert self._by_slot is not None
        if len(rows) and (missing := int(slots.max()) + 1 - len(self._by_slot)) > 0:
            more = np.zeros((missing, *self._by_slot.shape[1:]), self._dtype)
            self._by_slot = np.concatenate([self._by_slot, more])
        self._by_slot[slots] = rows
        for place, (request, start) in enumerate(zip(requests, starts, strict=True)):
            if request not in self._seen and start:
                positions = np.arange(start)
                blocks = table.block_table.np[place, positions // table.block_size]
                self._notes.append(
                    (request, 0, self._by_slot[blocks * table.block_size + positions % table.block_size])
                )
            self._seen.add(request)
