"""The nano policy and the names of its parameters."""

import filecmp
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.model.names import from_checkpoint, to_checkpoint

POLICY = Path(__file__).parents[2] / "recipes" / "nano" / "policy"


def test_the_committed_policy_is_what_its_script_writes(
    load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    load_script("nano/make_policy.py").write_nano_policy(tmp_path)
    names = [file.name for file in POLICY.iterdir()]
    assert filecmp.cmpfiles(POLICY, tmp_path, names, shallow=False) == (names, [], [])


def test_it_is_a_deepseek_v2_of_two_million_parameters_with_yarns_scale() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(POLICY))
    assert 1.9e6 < sum(p.numel() for p in model.parameters()) < 2.2e6
    assert model.model.layers[0].self_attn.scaling > 96**-0.5


def test_names_map_to_the_checkpoint_and_back() -> None:
    state = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(POLICY)).state_dict()
    split = dict(to_checkpoint(state.items()))
    assert split["model.layers.1.mlp.experts.3.gate_proj.weight"].shape == (64, 128)
    back = from_checkpoint(split)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
