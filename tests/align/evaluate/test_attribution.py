"""Where two engines part: of a model that is wrong in one part, that part is named, whichever engine has it."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from align.evaluate.agreement import AgreementError
from align.evaluate.attribution import Attribution, attribute, attributed
from align.experience import training_sequence
from align.learner.batch import TrainingSequence, collate, sampled_values
from align.learner.group import LearnerGroup
from align.learner.objective import LogProbs
from align.model.names import layout_of, to_checkpoint
from align.model.policy import load_policy, load_tokenizer
from align.recipe import LearnerOptions, ModelOptions, OptimizerOptions
from rollout import FinishReason, Fleet, FleetOptions, Prompt, RolloutError, Trajectory, stored
from rollout.parts import Distance, NotedTrajectory, PartNotes, compared

PROMPTS = [Prompt(f"p{i}", [17, *((71 * i + 37 * j) % 500 for j in range(31))]) for i in range(2)]
NANO = Path(__file__).parents[3] / "recipes" / "nano" / "policy"
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "DeepSeek-V2": DeepseekV2Config(
        **SIZES,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
    ),
    "Mixtral": MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2),
    "Qwen3-MoE": Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=32),
    "Llama": LlamaConfig(**SIZES),
}


def other_embedding(model: Any) -> None:
    model.get_input_embeddings().weight[17] += 0.5


def scaled_attention(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj.weight.mul_(1.05)


def norm_before_attention(model: Any) -> None:
    model.model.layers[1].input_layernorm.weight.mul_(1.05)


def norm_after_attention(model: Any) -> None:
    model.model.layers[1].post_attention_layernorm.weight.mul_(1.05)


def router_row(model: Any) -> None:
    model.model.layers[1].mlp.gate.weight[1].mul_(1.5)


def swapped_experts(model: Any) -> None:
    experts = model.model.layers[1].mlp.experts
    for parameter in (experts.gate_up_proj, experts.down_proj):
        parameter[:2] = parameter[:2].flip(0).clone()


def feed_forward(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.mul_(1.05)


def last_norm(model: Any) -> None:
    model.model.norm.weight.mul_(1.05)


def other_head(model: Any) -> None:
    model.lm_head.weight.mul_(1.05)


DENSE: dict[str, Callable[[Any], None]] = {
    "embedding": other_embedding,
    "layer 1, norm": norm_before_attention,
    "layer 1, attention": scaled_attention,
    "layer 1, norm after attention": norm_after_attention,
    "layer 1, feed-forward": feed_forward,
    "last norm": last_norm,
    "head": other_head,
}
ROUTED = {name: fault for name, fault in DENSE.items() if name != "layer 1, feed-forward"}
ROUTED |= {"layer 1, router": router_row, "layer 1, experts": swapped_experts}
"""By the part that is wrong."""


def halved_head(model: Any) -> None:
    model.lm_head.weight.mul_(0.5)


def experts_in_reverse(model: Any) -> None:
    for parameter in model.model.layers[1].mlp.experts.parameters():
        parameter.copy_(parameter.flip(0).clone())


COARSE = {"head": halved_head, "layer 1, experts": experts_in_reverse}
"""What bfloat16 shows of these: not a head off by a twentieth, of which the gate would not warn, and not two experts of many."""


def planted(model: Any, fault: Callable[[Any], None]) -> Any:
    """The model with a fault, which stays in it."""
    with torch.no_grad():
        fault(model)
    return model


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights, and routers that choose."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model


def faults_of(name: str) -> dict[str, Any]:
    return DENSE if name == "Llama" else ROUTED


class PlainLearner:
    """A model of transformers in this process, where a LearnerGroup would start ranks."""

    has_moved = False

    def __init__(self, model: Any):
        self._module = LogProbs(model)

    def part_distances(self, sequence: TrainingSequence, noted: Any) -> tuple[dict[str, Distance], Any]:
        batch = collate([sequence], pad_id=0)
        with torch.no_grad(), compared(self._module.policy, noted) as found:
            (values,) = sampled_values(self._module(**batch.inputs, temperature=1.0)[0], batch)
        return found, values


class PlainFleet:
    """A model of transformers that "samples" what it is told, where a Fleet would start workers."""

    def __init__(self, model: Any):
        self._learner, self._model = PlainLearner(model), model

    def sample_parts(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[NotedTrajectory]:
        for prompt in prompts:
            ids = [(7 * id_ + max_new_tokens) % 500 for id_ in prompt.token_ids[:max_new_tokens]]
            drawn = Trajectory.of_one_turn(prompt, 0, ids, [0.0] * len(ids), FinishReason.LENGTH)
            notes = PartNotes(self._model)
            _, log_probs = self._learner.part_distances(training_sequence(drawn), {})
            parts = {name: rows[:-1] for name, rows in notes.close().items()}
            drawn = Trajectory.of_one_turn(prompt, 0, ids, log_probs, FinishReason.LENGTH)
            yield NotedTrajectory(drawn, parts)


def found(sampler: Any, learner: Any, dtype: str = "float32") -> Attribution:
    return attribute(PlainFleet(sampler), PlainLearner(learner), PROMPTS, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONFIGS)
def test_of_one_wrong_part_on_either_side_that_part_is_named(name: str) -> None:
    right = model_of(name)
    assert found(right, deepcopy(right)).part is None
    for part, fault in faults_of(name).items():
        wrong = planted(deepcopy(right), fault)
        assert found(wrong, right).part == part
        assert found(right, wrong).part == part


def test_a_fault_shows_where_it_is_and_in_no_layer_after_it() -> None:
    right = model_of("DeepSeek-V2")
    distances = found(planted(deepcopy(right), ROUTED["layer 1, attention"]), right).distances
    assert distances["layer 1, experts"] > 1e-2
    assert [distance for name, distance in distances.items() if name.startswith(("layer 2", "last", "head"))] == [0] * 7


@pytest.mark.parametrize("name", CONFIGS)
def test_in_bfloat16_rounding_is_no_fault_and_a_fault_is(name: str) -> None:
    right, rounded = model_of(name), model_of(name, torch.bfloat16)
    same = found(right, rounded, "bfloat16")
    assert same.part is None
    assert max(same.distances.values()) > 1e-3
    for part, fault in faults_of(name).items():
        wrong = planted(deepcopy(rounded), COARSE.get(part, fault))
        assert found(right, wrong, "bfloat16").part == part


def test_a_part_that_is_not_a_number_differs() -> None:
    wrong = model_of("Llama")
    with torch.no_grad():
        wrong.model.layers[1].mlp.down_proj.weight[0] = float("nan")
    assert found(wrong, model_of("Llama")).part == "layer 1, feed-forward"


def test_the_sentence_names_the_part_and_the_table_has_a_line_for_each_layer() -> None:
    wrong = found(planted(model_of("Mixtral"), ROUTED["layer 1, router"]), model_of("Mixtral"))
    assert "they part in layer 1, router, whose outputs differ by " in str(wrong)
    lines = wrong.table.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [
        *("embedding", "layer 0", "layer 1", "layer 2", "last norm", "head")
    ]
    assert [part.split()[0] for part in lines[1].split(": ")[1].split(", ")] == [
        *("norm", "attention", "norm", "router", "experts")
    ]
    assert "no part of the model differs" in str(found(model_of("Mixtral"), model_of("Mixtral")))


def test_the_gates_error_says_where_unless_the_weights_have_moved_since_or_nobody_can_say() -> None:
    wrong = PlainFleet(planted(model_of("Llama"), DENSE["head"]))
    learner = PlainLearner(model_of("Llama"))

    def told(fleet: Any) -> str:
        with pytest.raises(AgreementError) as error, attributed(fleet, learner, PROMPTS, "float32"):  # type: ignore[arg-type]
            raise AgreementError("they differ")
        return str(error.value)

    assert told(wrong).startswith("they differ\nWhere: they part in head, ")

    class Lost:
        def sample_parts(self, *_: Any) -> Any:
            raise RolloutError("no worker is left")

    assert (
        told(Lost()) == "they differ\nWhere: which part of the model it is could not be found out (no worker is left)"
    )
    learner.has_moved = True
    assert told(wrong) == "they differ"


@pytest.fixture(scope="module")
def learner(policy: ModelOptions, ray_session: None) -> Iterator[LearnerGroup]:
    group = LearnerGroup(policy, LearnerOptions(ranks=1, optimizer=OptimizerOptions(learning_rate=1e-3)), seed=0)
    group.wait_until_ready()
    yield group
    group.close()


def test_between_the_samplers_engine_and_a_learner_rank(
    learner: LearnerGroup, nano_fleet: Fleet, policy: ModelOptions
) -> None:
    """The nano policy, DeepSeek-V2 in small: the sampler gets weights that are wrong in one part."""
    model = load_policy(policy)

    def attribution(*faults: Any) -> Attribution:
        wrong = deepcopy(model)
        for fault in faults:
            planted(wrong, fault)
        tensors = dict(to_checkpoint(wrong.named_parameters(), layout_of(wrong.config.model_type)))
        nano_fleet.load(stored({name: t.detach() for name, t in tensors.items()}), nano_fleet.weight_version + 1)
        return attribute(nano_fleet, learner, PROMPTS, "float32")

    same = attribution()
    assert same.part is None
    assert max(same.distances.values()) < 1e-5
    assert len(same.table.splitlines()) == model.config.num_hidden_layers + 3
    for part, fault in ROUTED.items():
        assert attribution(fault).part == part


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "DeepSeek-V2"])
def test_between_vllms_models_and_transformers(name: str, tmp_path: Path, ray_session: None) -> None:
    """The learner is wrong in one part."""
    right = model_of(name)
    right.save_pretrained(tmp_path)
    load_tokenizer(str(NANO)).save_pretrained(tmp_path)
    fleet = Fleet(str(tmp_path), "float32", FleetOptions(workers=1, max_length=64, kv_cache_gb=0.25), [1])
    try:
        same = attribute(fleet, PlainLearner(right), PROMPTS, "float32")  # type: ignore[arg-type]
        assert same.part is None
        assert len(same.table.splitlines()) == right.config.num_hidden_layers + 3
        for part, fault in faults_of(name).items():
            wrong = planted(deepcopy(right), fault)
            assert attribute(fleet, PlainLearner(wrong), PROMPTS, "float32").part == part  # type: ignore[arg-type]
    finally:
        fleet.close()
