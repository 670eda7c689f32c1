"""In bfloat16 an adapter is small beside the weights for long: what samples has it nevertheless, and what is merged says what it lost.

Both are measured on what the adapter adds to the outputs of its layers, |sampled - exact| / |exact|, in float32. The layers of vLLM give
bfloat16, where the rounding of a single output is larger than a small adapter: there we ask which part of what the adapter adds is in the
outputs of all layers together, for the inputs that they had while the engine sampled.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import silu

from align.evaluate.agreement import probe
from align.learner.batch import TrainingSequence
from align.learner.group import LearnerGroup
from align.learner.objective import Objective
from align.model.names import to_checkpoint
from align.model.policy import load_policy, write_random_policy
from align.recipe import LearnerOptions, LoraOptions, ModelOptions, OptimizerOptions
from rollout import Fleet, FleetOptions, Prompt, stored

NANO = Path(__file__).parents[3] / "recipes" / "nano" / "policy"
PROMPTS = [Prompt(f"p{i}", [1, *range(40 + i, 100 + i)]) for i in range(16)]
STEPS, RATE = 6, 1e-5
LIMIT = 0.05
TOGETHER = {"gate_up_proj": ["gate_proj", "up_proj"], "qkv_proj": ["q_proj", "k_proj", "v_proj"]}
"""Layers of vLLM that compute several of a checkpoint's."""


class Trained(NamedTuple):
    model: ModelOptions
    learner: LearnerGroup
    fleet: Fleet
    delta: dict[str, torch.Tensor]
    """s B A of each parameter, float32."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    directory = tmp_path_factory.mktemp("bfloat16")
    write_random_policy(ModelOptions(path=str(NANO), init="random", dtype="bfloat16"), directory, seed=0)
    return ModelOptions(path=str(directory), dtype="bfloat16")


@pytest.fixture(scope="module")
def fleet(model: ModelOptions, ray_session: None) -> Iterator[Fleet]:
    options = FleetOptions(workers=1, max_length=64, kv_cache_gb=0.25, batch_sequences=16)
    fleet = Fleet(model.path, "bfloat16", options, stop_token_ids=[2])
    yield fleet
    fleet.close()


@pytest.fixture(
    scope="module",
    params=["attention+shared", "experts"],
)
def trained(
    request: pytest.FixtureRequest,
    sequences: Callable[[int], list[TrainingSequence]],
    model: ModelOptions,
    fleet: Fleet,
) -> Iterator[Trained]:
    """Adapters after a few steps at a small rate, and a sampler with their base."""
    options = LearnerOptions(
        ranks=1,
        zero_stage=0,
        optimizer=OptimizerOptions(learning_rate=RATE),
        lora=LoraOptions(rank=4, targets=[request.param]),
    )
    with closing(LearnerGroup(model, options, seed=0)) as learner:
        fleet.load(stored(load_file(Path(model.path) / "model.safetensors")), 0)
        learner.wait_until_ready()
        for step in range(STEPS):
            learner.accumulate(sequences(step), Objective())
            learner.apply(RATE)
        yield Trained(model, learner, fleet, in_learner(learner, deltas))


def test_the_layers_of_the_sampler_have_all_that_the_adapter_adds(trained: Trained) -> None:
    before = in_sampler(trained.fleet, inputs_and_outputs, PROMPTS)
    trained.learner.sync_weights(trained.fleet, 1)
    after = in_sampler(trained.fleet, outputs, {name: inputs for name, (inputs, _) in before.items()})
    base = dict(load_policy(trained.model).named_parameters())
    along = total = 0.0
    for name, (inputs, output) in before.items():
        if (exact := added(name, inputs, trained.delta, base)) is not None:
            along += float(((after[name].float() - output.float()) * exact).sum())
            total += float(exact.square().sum())
    print(f"{along / total:.3f} of the effect is in the outputs")
    assert abs(along / total - 1) < 2 * LIMIT


def test_what_is_sent_is_within_five_per_cent_of_what_is_trained(trained: Trained) -> None:
    """And the learner says how far it is."""
    learner = trained.learner
    base = {name: tensor.detach() for name, tensor in load_policy(trained.model).named_parameters()}
    sent = learner.weights()
    found, said = effect_lost(sent, base, trained.delta), learner.adapter_lost()
    print(f"{found:.4f}, and the learner says {said:.4f}")
    assert said == pytest.approx(found, abs=0.15)
    assert found < LIMIT
    assert (
        sum(t.numel() * t.element_size() for n, t in sent.items() if not n.endswith("_scale"))
        == learner.trained.sent_bytes
    )


def test_the_checkpoint_is_as_before_and_tells_what_it_has_lost(trained: Trained, tmp_path: Path) -> None:
    lost = trained.learner.save(tmp_path / "final")
    report = json.loads((tmp_path / "final" / "adapter" / "merge.json").read_text())
    assert report["lost"] == lost > 0.5
    assert report["dtype"] == "bfloat16"
    base = {name: tensor.detach() for name, tensor in load_policy(trained.model).named_parameters()}
    assert lost == pytest.approx(
        effect_lost(load_file(tmp_path / "final" / "model.safetensors"), base, trained.delta), abs=0.15
    )
    whole = load_policy(trained.model.model_copy(update={"path": str(tmp_path / "final")}))
    for name, parameter in whole.named_parameters():
        expected = base[name].float() + trained.delta.get(name, 0.0)
        assert torch.equal(parameter, expected.to(torch.bfloat16))


def test_a_large_adapter_agrees_and_weights_without_one_end_it(
    trained: Trained, perturb: Callable[[LearnerGroup, int], None], tmp_path: Path
) -> None:
    learner, fleet = trained.learner, trained.fleet
    perturb(learner, 1)
    learner.save(tmp_path / "merged")
    merged = stored(load_file(tmp_path / "merged" / "model.safetensors"))
    syncs = (partial(learner.sync_weights, fleet), partial(fleet.load, merged), partial(learner.sync_weights, fleet))
    for sync, has_adapter in zip(syncs, (True, False, True), strict=True):
        sync(version=2)
        assert probe(fleet, learner, PROMPTS).mean < 0.02
        assert bool(in_sampler(fleet, updated, None)) is has_adapter
    perturb(learner, 2)
    assert probe(fleet, learner, PROMPTS).mean > 0.1


def in_learner(learner: LearnerGroup, do: Callable[[Any], Any]) -> Any:
    import ray

    return ray.get(learner._ranks[0].__ray_call__.remote(do))


def in_sampler(fleet: Fleet, do: Callable[[Any, Any, Any], Any], argument: Any) -> Any:
    """What a function gives in the worker: of its engine, vLLM's model and an argument."""
    import ray

    def inside(engine: Any) -> Any:
        return engine._llm.collective_rpc(lambda process: do(engine, process, argument))[0]

    return ray.get(fleet.workers[0].actor.handle.__ray_call__.remote(inside))


def deltas(worker: Any) -> dict[str, torch.Tensor]:
    from align.model.lora import adapter_layers, merged, plain_parameters

    own = plain_parameters(worker._network)
    layers = adapter_layers(worker._network)
    return {name: merged(torch.zeros(own[name].shape), layer) for name, layer in layers.items()}


def updated(engine: Any, process: Any, _: None) -> list[str]:
    return list(process.low_rank._places)


def inputs_and_outputs(engine: Any, process: Any, prompts: list[Prompt]) -> dict[str, tuple[Any, torch.Tensor]]:
    """What the linear layers and the banks of experts were given while the engine drew a token from each prompt, and what they give."""
    from vllm.model_executor.layers.linear import LinearBase

    from rollout.engine import Request
    from rollout.types import SamplingOptions

    model, seen, undo = process.model_runner.get_model(), {}, []
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            hook = module.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, given[0].clone()))
            undo.append(hook.remove)
        elif hasattr(module, "w13_weight"):
            method, apply = module.quant_method, module.quant_method.apply

            def remember(name: str = name, apply: Any = apply, **given: Any) -> Any:
                seen.setdefault(name, tuple(given[k].clone() for k in ("x", "topk_ids", "topk_weights")))
                return apply(**given)

            method.apply = remember
            undo.append(lambda method=method, apply=apply: setattr(method, "apply", apply))
    sampling = SamplingOptions(temperature=1, max_new_tokens=1)
    engine.sample([Request(prompt, 0, 0) for prompt in prompts], sampling)
    for step in undo:
        step()
    found = outputs(engine, process, seen)
    return {name: (seen[name], found[name]) for name in seen}


def outputs(engine: Any, process: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model, found = process.model_runner.get_model(), {}
    for name, given in inputs.items():
        module = model.get_submodule(name)
        if isinstance(given, tuple):
            x, ids, shares = given
            found[name] = module.quant_method.apply(
                layer=module,
                x=x.clone(),
                topk_weights=shares,
                topk_ids=ids,
                shared_experts=None,
                shared_experts_input=None,
            )
        else:
            output = module(given)
            found[name] = output[0] if isinstance(output, tuple) else output
    return {name: output.clone() for name, output in found.items()}


def added(name: str, given: Any, delta: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """What the adapter adds to the output of a layer of vLLM, in float32 from s B A; None for a layer without one."""
    if isinstance(given, tuple):
        block = name[: name.index(".experts") + len(".experts")]
        names = f"{block}.gate_up_proj", f"{block}.down_proj"
        if names[0] not in delta:
            return None
        weights = [base[n].detach().float() for n in names]
        return experts(given, *(w + delta[n] for w, n in zip(weights, names, strict=True))) - experts(given, *weights)
    block, _, leaf = name.rpartition(".")
    parts = [f"{block}.{part}" for part in TOGETHER.get(leaf, [leaf])]
    found = [delta[f"{part}.weight"] for part in parts if f"{part}.weight" in delta]
    return given.float() @ torch.cat(found).T if found else None


def experts(given: Any, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    x, ids, shares = given
    total = torch.zeros(x.shape)
    for expert in range(len(gate_up)):
        gate, up = (x.float() @ gate_up[expert].T).chunk(2, dim=1)
        share = (shares * (ids == expert)).sum(1, keepdim=True)
        total += share * ((silu(gate) * up) @ down[expert].T)
    return total


def effect_lost(
    weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor], delta: dict[str, torch.Tensor]
) -> float:
    """|given - exact| / |exact| of the weights, and what is beside them, of all parameters with an adapter."""
    lost = exact = 0.0
    for name, change in delta.items():
        parts = dict(to_checkpoint([(name, base[name])]))
        beside = 0.0
        if f"{name}.lora_A" in weights:
            a, b, scale = (weights[f"{name}.lora_{part}"].float() for part in ("A", "B", "scale"))
            beside = scale * (b @ a)
        exact += float(change.square().sum())
        given = dict(to_checkpoint([(name, change - beside)]))
        lost += sum(float((weights[n].float() - part.float() - given[n]).square().sum()) for n, part in parts.items())
    return float((lost / exact) ** 0.5)
