"""A vLLM engine in this process: token ids in, token ids and log-probabilities out.

The environment that vLLM reads at import is set by whoever starts the process (`rollout.worker.environment`), and where it depends on the
model and the device by `rollout.arguments.prepare`.
"""

import gc
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.arguments import prepare
from rollout.parts import NotedTrajectory, start_noting, take_parts
from rollout.routing import forget_routing, start_recording, take_routing
from rollout.sync.base import Bucket, WeightSource
from rollout.types import (
    EngineOptions,
    Experts,
    FinishReason,
    Prompt,
    RolloutError,
    SamplingOptions,
    Trajectory,
    WeightUpdateError,
)
from rollout.weights import (
    begin_update,
    check_low_rank_updates,
    finish_update,
    has_low_rank_updates,
    run_step,
    take_bucket,
)


@dataclass(frozen=True, slots=True)
class Request:
    """One trajectory to be drawn: place `index` of the group of `prompt`, from `seed`."""

    prompt: Prompt
    index: int
    seed: int


class Engine:
    """One copy of the policy, ready to sample."""

    def __init__(
        self,
        model: str | Path,
        dtype: str,
        options: EngineOptions,
        stop_token_ids: Sequence[int],
        *,
        trust_remote_code: bool = False,
    ):
        """Load `model` (a Hugging Face directory or hub name) in `dtype` ("float32" or "bfloat16").

        `stop_token_ids` are the tokens that end a completion; `trust_remote_code` lets the model bring code of its own.
        Raises RolloutError where vLLM cannot compute the model on this device as the options want it.
        """
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(model), trust_remote_code=trust_remote_code)
        arguments = prepare(config, dtype, options)
        from vllm import LLM

        self.weight_version = 0
        self.steps = 0
        self._options = options
        self._adapter: Any = None
        self._adapters = 0
        self._stop_token_ids = list(stop_token_ids)
        trusted = {"trust_remote_code": trust_remote_code}
        # vLLM runs several full garbage collections while it loads; they skip what is frozen, such as its modules.
        gc.freeze()
        self._llm = LLM(model=str(model), dtype=dtype, **trusted, **arguments)
        if options.batch_invariant:
            self._llm.collective_rpc(use_one_router_kernel)
        self._count_steps()
        if options.record_experts:
            self._llm.collective_rpc(start_recording)

    def sample(self, requests: Sequence[Request], sampling: SamplingOptions) -> list[Trajectory]:
        """Draw one trajectory for each request, in their order, as one engine batch."""
        too_long = next((r for r in requests if len(r.prompt.token_ids) >= self._options.max_length), None)
        if too_long is not None:
            raise RolloutError(
                f"prompt {too_long.prompt.id!r} has {len(too_long.prompt.token_ids)} tokens, "
                f"but the sampler's context is {self._options.max_length}"
            )
        # What is cached of an earlier batch would let a trajectory depend, in its last bits, on who sampled that.
        self._clear_prefix_cache()
        parameters = [self._parameters(request, sampling) for request in requests]
        self._forget_experts()
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(request.prompt.token_ids)} for request in requests],
            parameters,
            use_tqdm=False,
            lora_request=self._adapter,
        )
        experts = self._llm.collective_rpc(take_routing)[0] if self._options.record_experts else {}
        return [
            self._trajectory(request, output.outputs[0], experts.get(output.request_id))
            for request, output in zip(requests, outputs, strict=True)
        ]

    def sample_parts(self, requests: Sequence[Request], sampling: SamplingOptions) -> list[NotedTrajectory]:
        """Draw one trajectory for each request, one after the other, noting what the parts of the model compute for its tokens.

        What a CUDA graph computes cannot be noted: with graphs one token is drawn.
        """
        if self._options.cuda_graphs:
            sampling = sampling.model_copy(update={"max_new_tokens": 1})
        found = []
        for request in requests:
            self._llm.collective_rpc(start_noting)
            try:
                (trajectory,) = self.sample([request], sampling)
            finally:
                parts = self._llm.collective_rpc(take_parts)[0]
            found.append(NotedTrajectory(trajectory, parts))
        return found

    def stream(self, request: Request, sampling: SamplingOptions) -> Generator[Sequence[int]]:
        """Draw one completion, token by token: yields the ids that are new. An abandoned iterator ends the request."""
        engine = self._llm.llm_engine
        self._forget_experts()
        # vLLM gives ids of its own to requests.
        id_ = engine.add_request(
            request.prompt.id,
            {"prompt_token_ids": list(request.prompt.token_ids)},
            self._parameters(request, sampling),
            lora_request=self._adapter,
        )
        told = 0
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    token_ids = list(output.outputs[0].token_ids)
                    yield token_ids[told:]
                    told = len(token_ids)
        finally:
            if engine.has_unfinished_requests():
                engine.abort_request([id_], internal=True)

    def load(self, source: WeightSource, version: int, modules: Sequence[str] | None = None) -> None:
        """Replace the weights, or those of some modules, by what `source` has; trajectories then carry `version`.

        Raises WeightUpdateError when they are not those of the model, NotReceivedError when a broadcast broke off.
        """
        source.load_into(self, modules)
        self._clear_prefix_cache()
        self.weight_version = version

    @contextmanager
    def weight_update(self, modules: Sequence[str] | None) -> Iterator[None]:
        """An update of the whole model, or of some modules: within the context all their tensors have to be taken. Raises WeightUpdateError."""
        self.everywhere(begin_update, modules)
        try:
            yield
        except BaseException:
            self._llm.collective_rpc(run_step, args=(finish_update,))
            raise
        self.everywhere(finish_update)
        if any(self._llm.collective_rpc(has_low_rank_updates)):
            self.probe()
            self.everywhere(check_low_rank_updates)

    def take(self, bucket: Bucket) -> None:
        """Write tensors, under checkpoint names, as part of a weight update. Raises WeightUpdateError."""
        self.everywhere(take_bucket, bucket)

    def everywhere(self, step: Callable[..., None], *arguments: Any) -> None:
        """Run a step of a weight update in each process of the engine. Raises the WeightUpdateError of one of them."""
        for wrong in self._llm.collective_rpc(run_step, args=(step, *arguments)):
            if wrong is not None:
                raise WeightUpdateError(wrong)

    def add_adapter(self, directory: Path) -> None:
        """Let vLLM add the LoRA adapter in `directory` to the weights, in place of the one before.

        Raises WeightUpdateError where vLLM cannot: what it does not know how to serve, it may also leave out.
        """
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        adapter = LoRARequest(f"adapter {self._adapters}", self._adapters, str(directory))
        try:
            self._llm.llm_engine.add_lora(adapter)
        except (ValueError, RuntimeError) as error:
            raise WeightUpdateError(
                f"vLLM refused the adapter ({error}); leave weights.transport out to send merged weights"
            ) from error
        self._adapter = adapter

    def offload(self) -> None:
        """Move the weights to the CPU's memory and free the KV cache, until `onload`. Does nothing on a CPU."""
        self._llm.sleep(level=1)

    def onload(self) -> None:
        """Move the weights back to the GPU and allocate the KV cache again."""
        self._llm.wake_up()

    def probe(self) -> None:
        """Draw a token, as a sign that the engine works."""
        self.sample([Request(Prompt("probe", [0]), 0, 0)], SamplingOptions(temperature=0, max_new_tokens=1))

    def _clear_prefix_cache(self) -> None:
        """Drop the cached keys and values of all prompts. Raises WeightUpdateError where vLLM keeps them: they may be of old weights."""
        if not self._llm.reset_prefix_cache():
            raise WeightUpdateError(
                "vLLM did not clear its prefix cache, because requests are still running: their keys and values would be used "
                "with other weights than those that computed them"
            )

    def _forget_experts(self) -> None:
        if self._options.record_experts:
            self._llm.collective_rpc(forget_routing)

    def _count_steps(self) -> None:
        engine = self._llm.llm_engine
        step = engine.step

        def counted() -> Any:
            self.steps += 1
            return step()

        engine.step = counted

    def _parameters(self, request: Request, sampling: SamplingOptions) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            max_tokens=min(sampling.max_new_tokens, self._options.max_length - len(request.prompt.token_ids)),
            seed=request.seed if sampling.temperature > 0 else None,
            stop_token_ids=self._stop_token_ids,
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            skip_special_tokens=False,
        )

    def _trajectory(self, request: Request, output: Any, experts: Experts | None) -> Trajectory:
        token_ids, log_probs = list(output.token_ids), list(output.logprobs.logprobs)
        if token_ids != output.logprobs.token_ids:
            raise RolloutError(f"vLLM's log-probabilities for prompt {request.prompt.id!r} are not those of its tokens")
        return Trajectory.of_one_turn(
            request.prompt,
            request.index,
            token_ids,
            log_probs,
            FinishReason(output.finish_reason),
            seed=request.seed,
            weight_version=self.weight_version,
            experts=experts,
        )


def use_one_router_kernel(worker: Any) -> None:
    """Let routers compute in one way for any number of tokens. For 16 at most vLLM has another, `VLLM_BATCH_INVARIANT` or not."""
    for module in worker.model_runner.get_model().modules():
        if hasattr(module, "allow_ll_bf16_gemm"):
            module.allow_ll_bf16_gemm = False
