"""What every learner rank is: a DeepSpeed engine in a Ray actor, whatever model it trains and by whatever loss."""

import atexit
import gc
import math
import os
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from align.errors import UserError
from align.learner.engine import clips_itself, deepspeed_config, device_of_rank, mark_moe_leaves, new_optimizer
from align.learner.experts import (
    GradientCensus,
    check_spreadable,
    route_in_float32,
    size,
    size_in_bytes,
    whole_parameters,
)
from align.learner.loading import fill_from_rank_0, scatter_experts
from align.learner.offload import HostMemory
from align.learner.state import load_state, save_state
from align.model import lora
from align.model.names import checkpoint_name, frozen_names, layout_of, to_checkpoint
from align.model.policy import (
    attention_kernel,
    attention_sizes,
    load_tokenizer,
    persistent_buffers,
    save_policy,
    tied_names,
)
from align.model.rounding import round_parameter, rounded
from align.recipe import BFLOAT16_SUMS, MERGED_ADAPTERS, LearnerOptions, ModelOptions
from align.run.checkpoints import Entry
from rollout import Precision
from rollout.processes import ProcessId, introduce_this_process
from rollout.sync.base import WriteBuckets, buckets


@dataclass(frozen=True, slots=True)
class Trained:
    """What a learner trains, in words, the modules that change with it as checkpoints name them (None is all of them), and how large their weights are."""

    description: str
    modules: list[str] | None
    sent_bytes: int = 0


class LearnerRank(ABC):
    """A data-parallel rank. Every method but `process`, `address`, `free_port` and `reads` is called on all ranks together."""

    def __init__(self, model: ModelOptions, options: LearnerOptions):
        self._model = model
        self._options = options
        # Interpreters full of native extensions can hang in their teardown: leave without it.
        atexit.register(os._exit, 0)
        torch.set_num_threads(options.threads)
        self._process = introduce_this_process()

    @property
    @abstractmethod
    def _network(self) -> Any:
        """The transformers model inside the module that DeepSpeed wraps."""

    @property
    def _base(self) -> Any:
        """The same without PEFT's wrapper around it."""
        return self._network if self._options.lora is None else self._network.get_base_model()

    def process(self) -> ProcessId:
        """Who this process is, for whoever has to look at it or end it from outside."""
        return self._process

    def address(self) -> str:
        """The address of this rank's node."""
        import ray

        return str(ray.util.get_node_ip_address())

    def free_port(self) -> int:
        """A port that is free on this rank's node at this moment."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def reads(self, file: Path, text: str) -> bool:
        """Whether this rank's node has the file, with this text."""
        try:
            return file.read_text() == text
        except OSError:
            return False

    def apply(self, learning_rate: float) -> float:
        """One optimizer update with the gradients accumulated so far. Returns the gradient's norm before clipping.

        When that is nan or infinite there was no update: DeepSpeed drops such gradients, and so does `_clip`.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = (
            self._norm if clips_itself(self._options, self._model.dtype) else float(self._engine.get_global_grad_norm())
        )
        # A norm below zero is DeepSpeed's word for one that is not finite.
        return norm if norm >= 0 else float("nan")

    def missing_gradients(self) -> list[str]:
        """Parameters and experts of this rank that have had no gradient yet."""
        return self._census.missing()

    def publish(
        self, write: WriteBuckets, bucket_bytes: float, on_device: bool = False, precision: Precision = "model"
    ) -> Iterator[Any]:
        """Have `write` take the weights of what is trained, under checkpoint names, in buckets of so many bytes; on rank 0 only.

        They are on the rank's own device with `on_device`, else on the CPU. A LoRA adapter goes beside the weights where the sampler can add
        it, else in them.
        """
        device = self._device if on_device else "cpu"
        weights = self._whole_weights(self._below, device, apart=True)
        try:
            if self._engine.global_rank == 0:
                layout = layout_of(self._network.config.model_type)
                parameters = rounded(to_checkpoint(weights, layout), precision)
                buffers = to_checkpoint(self._buffers(self._below, device), layout)
                yield from write(buckets(chain(parameters, buffers), bucket_bytes))
        finally:
            # Also where writing fails, or the other ranks would wait for this one at the next parameter.
            deque(weights, maxlen=0)

    def adapter_lost(self) -> float | None:
        """Which part of the adapter's effect is not in what was last published or saved, None where there is no effect.

        It is |sent - exact| / |exact| of what the adapter adds to the outputs of all layers, for the inputs of the last forward pass; on
        rank 0.
        """
        return math.sqrt(self._lost / self._exact) if self._exact else None

    def save(self, directory: Path) -> float | None:
        """Write the model as a Hugging Face checkpoint, and an adapter's own file in `adapter` beside it.

        Rank 0 writes, all ranks take part in gathering. Returns `adapter_lost`, which is beside the adapter too.
        """
        state = dict(self._whole_weights())
        if self._engine.global_rank == 0:
            save_policy(self._base, self._tokenizer, directory, state | dict(self._buffers()))
        if self._options.lora is None:
            return None
        self.save_adapter(directory / lora.ADAPTER_DIRECTORY)
        if self._engine.global_rank == 0:
            lora.write_merge_report(directory / lora.ADAPTER_DIRECTORY, self.adapter_lost(), self._model.dtype)
        return self.adapter_lost()

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter alone, as PEFT does. Rank 0 writes, all ranks take part in gathering."""
        trained = {}
        for name, parameter in self._network.named_parameters():
            if parameter.requires_grad:
                with self._whole([parameter]):
                    if self._engine.global_rank == 0:
                        trained[name] = parameter.detach().cpu().clone()
        if self._engine.global_rank == 0:
            lora.save_adapter(self._network, directory, trained)

    def save_state(self, directory: Path) -> dict[str, Entry]:
        """Write this rank's files of a training checkpoint; returns their entries."""
        return save_state(self._engine, directory, self._census.state())

    def load_state(self, directory: Path) -> None:
        """Go on from a training checkpoint that has been proved whole. Raises UserError where it is of another learner."""
        try:
            self._census.restore(load_state(self._engine, directory))
        except ValueError as error:
            raise UserError(f"checkpoint {directory}: {error}") from None

    def offload(self) -> None:
        """Move all that the rank holds on its GPU to the CPU's memory: parameters, gradients, optimizer state, frozen policies."""
        self._engine.empty_partition_cache()  # of ZeRO-3: parameters that are still gathered
        # What gradients pass through on their way to other ranks, 5e8 elements. DeepSpeed keeps it, empty, under ZeRO-1 and -3.
        buckets = getattr(self._engine.optimizer, "ipg_buckets", {}).values()
        passed = [bucket.buffer for bucket in buckets if not bucket.elements]
        self._host_memory.offload(*self._held(), scratch=passed)

    def onload(self) -> None:
        """Move all that `offload` moved back to the GPU."""
        self._host_memory.onload()

    def _held(self) -> list[Any]:
        """What leads to all that is on the rank's device."""
        return [self._engine, self._inputs]

    def _join(self, master: str, port: int, seed: int) -> None:
        """Meet the other ranks, and load the tokenizer."""
        import deepspeed

        os.environ |= {"MASTER_ADDR": master, "MASTER_PORT": str(port)}
        torch.manual_seed(seed)
        self._device = device_of_rank()
        if self._device.type == "cpu":
            # gloo alone: the shared-memory operator would need a compiler on the user's machine.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._host_memory = HostMemory(self._device)
        deepspeed.init_distributed(
            dist_backend="gloo" if self._device.type == "cpu" else "nccl",
            verbose=False,
            # Whoever started the ranks ends those that hang; its limits may be longer than PyTorch's, such as while rank 0 reads a checkpoint.
            timeout=timedelta(days=7),
            auto_mpi_discovery=False,
        )
        self._tokenizer = load_tokenizer(self._model.path, trust_remote_code=self._model.trust_remote_code)

    def _with_adapter(self, model: Any, task: lora.Task) -> Any:
        """The model with the recipe's adapter, where there is one."""
        options = self._options.lora
        if options is None:
            return model
        self._left_out = lora.left_out(lora.parts_of(model), options.targets)
        return lora.add_adapter(model, options, task, self._model.path, apart=self._options.zero_stage < 3)

    def _start_engine(self, module: torch.nn.Module, network: Any) -> Trained:
        """Wrap `module`, which computes something with `network`. Returns what is trained."""
        import deepspeed

        frozen = frozen_names((name for name, _ in network.named_parameters()), self._options.freeze)
        for name, parameter in network.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
        if self._options.gradient_checkpointing:
            network.gradient_checkpointing_enable()
        if self._options.expert_parallel > 1:
            check_spreadable(network.config, self._options.expert_parallel)
            module.config = network.config  # where AutoEP looks for the experts' sizes
            scatter_experts(network, self._options.expert_parallel, self._device)
        config = deepspeed_config(self._options, self._model.dtype)
        if self._options.zero_stage == 3:
            self._shard(module, config)
        # The optimizer is made when DeepSpeed asks for it: only then are the experts where they stay.
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=module, optimizer=lambda _: new_optimizer(module, self._options), config=config
        )
        # Without ZeRO in bfloat16 DeepSpeed has taken an empty step, by which Adam would correct its moments wrongly.
        self._engine.basic_optimizer.state.clear()
        route_in_float32(module)
        self._norm = 0.0
        if clips_itself(self._options, self._model.dtype):
            self._optimizer.register_step_pre_hook(self._clip)
        self._census = GradientCensus(self._network)
        self._lost = self._exact = 0.0
        self._inputs = {} if self._options.lora is None else lora.remember_inputs(network)
        return self._what_is_trained()

    def _shard(self, module: torch.nn.Module, config: dict[str, Any]) -> None:
        """Leave to each rank its share of each of the module's parameters, on its device."""
        import deepspeed

        mark_moe_leaves(module)
        # One parameter after the other: DeepSpeed itself would first move the whole model to every rank's device.
        deepspeed.zero.Init(module=module, config_dict_or_path=config)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self._device)

    def _frozen(self, module: torch.nn.Module) -> Any:
        """A module that is computed and not trained: whole on the rank's device, or under ZeRO-3 shared out over the ranks.

        Each layer is then gathered when it is reached, so that all ranks must call the module, and equally often.
        """
        import deepspeed

        module.eval().requires_grad_(False)
        if self._options.zero_stage < 3:
            fill_from_rank_0(module.to(self._device))
            return module
        config = deepspeed_config(self._options, self._model.dtype)
        self._shard(module, config)
        engine, *_ = deepspeed.initialize(model=module, config=config)
        engine.eval()
        return engine

    def _what_is_trained(self) -> Trained:
        network, options = self._network, self._options.lora
        trained = sum(size(p) for p in network.parameters() if p.requires_grad)
        if options is None:
            self._below: tuple[str, ...] = ("",)
            sent = sum(map(size_in_bytes, network.parameters()))
            return Trained(f"{trained:,} trainable parameters{self._caveat}{self._attention}", None, sent)
        parameters, layout = lora.plain_parameters(network), layout_of(network.config.model_type)
        self._below = tuple(f"{module}." for module in lora.adapted_modules(network))
        sent = sum(size_in_bytes(p) for name, p in parameters.items() if name.startswith(self._below))
        for name, layer in lora.adapter_layers(network).items():
            sent += sum(map(size_in_bytes, lora.factors(layer))) if lora.is_sent_apart(name, layer) else 0
        total = sum(map(size, parameters.values()))
        text = lora.describe(network, total, trained, options) + (f"; {self._left_out}" if self._left_out else "")
        modules = [checkpoint_name(prefix, layout).removesuffix(".") for prefix in self._below]
        return Trained(text + self._caveat + self._attention, modules, sent)

    @property
    def _attention(self) -> str:
        if self._device.type == "cpu":
            return ""
        _, keys, values = attention_sizes(self._network.config)
        return f"; attention, with heads of {keys}/{values}, by {attention_kernel(self._network, self._device)}"

    @property
    def _caveat(self) -> str:
        if self._model.dtype != "bfloat16":
            return ""
        if self._options.lora is not None and self._options.zero_stage == 3:
            return f" ({MERGED_ADAPTERS})"
        return "" if self._options.zero_stage else f" ({BFLOAT16_SUMS})"

    def _backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a part of the loss, whose weights hold the whole batch's denominator.

        A part that is no finite number makes the whole gradient such, so that no update is made of the rest of it.
        """
        # DeepSpeed averages the gradients of the ranks.
        self._engine.backward(loss * (self._options.ranks if torch.isfinite(loss) else math.nan))

    def _settle(self) -> None:
        """Call when all is loaded. It stays: a full collection would walk through all of it, in the middle of a step."""
        gc.collect()
        gc.freeze()

    def _whole_weights(
        self, below: tuple[str, ...] = ("",), device: str | torch.device = "cpu", *, apart: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Copies of the parameters whose names begin with one of `below`, with the adapter in them; none but on rank 0.

        With `apart`, where the sampler can add it, the adapter comes before the parameter and is not in it.
        All ranks must go through it, since each parameter is gathered when it is reached, and is whole no longer after it.
        """
        network, adapted = self._network, self._options.lora is not None
        tied = tied_names(network)
        parameters = lora.plain_parameters(network).items() if adapted else whole_parameters(network)
        layers = lora.adapter_layers(network) if adapted else {}
        self._lost = self._exact = 0.0
        for name, parameter in parameters:
            if name in tied or not name.startswith(below):
                continue
            layer = layers.get(name)
            copies = {}
            with self._whole([parameter] if layer is None else [parameter, *lora.factors(layer)]):
                if self._engine.global_rank == 0:
                    whole = parameter
                    if layer is not None:
                        if apart and lora.is_sent_apart(name, layer):
                            copies = lora.update_of(layer).named(name)
                        else:
                            whole = lora.merged(parameter, layer)
                        lost, exact = lora.effects(parameter, whole, layer, self._inputs.get(layer.get_base_layer()))
                        self._lost, self._exact = self._lost + lost, self._exact + exact
                    copies = {
                        n: tensor.detach().to(device, copy=True) for n, tensor in (copies | {name: whole}).items()
                    }
            yield from copies.items()

    def _buffers(
        self, below: tuple[str, ...] = ("",), device: str | torch.device = "cpu"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Copies of the buffers that a checkpoint has whose names begin with one of `below`: to the sampler these are parameters."""
        for name, buffer in persistent_buffers(self._base):
            if lora.plain(name).startswith(below):
                yield lora.plain(name), buffer.to(device, copy=True)

    @contextmanager
    def _as_sent(self, precision: Precision) -> Iterator[None]:
        """Within the context the network has the weights that `publish` sends at `precision`, and after it its own, to the bit.

        All ranks must go through it. The original weights wait in the CPU's memory, under ZeRO-3 in that of rank 0.
        """
        parameters = {} if precision == "model" else dict(self._network.named_parameters())
        changes = self._options.zero_stage < 3 or self._engine.global_rank == 0
        own: dict[str, torch.Tensor | None] = {}
        for name, parameter in parameters.items():
            with self._whole([parameter], changed=True):
                own[name] = round_parameter(name, parameter.data, precision) if changes else None
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                with self._whole([parameter], changed=True):
                    if (before := own[name]) is not None:
                        parameter.data.copy_(before)

    def _whole(self, parameters: Sequence[torch.Tensor], *, changed: bool = False) -> AbstractContextManager[Any]:
        """Within the context ZeRO-3's parameters are whole; what rank 0 changes of them is kept where they are `changed`."""
        if self._options.zero_stage < 3:
            return nullcontext()
        import deepspeed

        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            list(parameters), modifier_rank=0 if changed else None
        )
        return context

    def _clip(self, *_: Any) -> None:
        limit = self._options.optimizer.clip_norm or float("inf")
        self._norm = float(torch.nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit))
        if not math.isfinite(self._norm):
            # What has no gradient is left as it is, its moments too.
            self._optimizer.zero_grad(set_to_none=True)
