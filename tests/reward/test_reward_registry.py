"""Rewards by name: registering, discovering, and refusing what is misspelt."""

import subprocess
import sys
from pathlib import Path

import pytest

from reward import (
    ParameterError,
    RewardError,
    Sample,
    Score,
    UnknownReward,
    Verdict,
    available,
    check_params,
    get,
    register,
)

pytestmark = pytest.mark.usefixtures("own_rewards")

PLUGIN = '''
from reward import Score, Verdict, register

@register("plugged")
def plugged(sample):
    """From a package that somebody installed."""
    return Score(1.0, Verdict.PASS)
'''


def announce(folder: Path, value: str) -> None:
    info = folder / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[moe_align.rewards]\nplugged = {value}\n")


def test_available_tells_names_descriptions_and_defaults() -> None:
    records = {reward.name: reward for reward in available()}
    assert {"exact_answer", "code_tests", "instructions", "reasoning_gym", "rule"} <= records.keys()
    assert list(records) == sorted(records)
    exact = records["exact_answer"]
    assert [(p.name, p.default, p.required) for p in exact.parameters] == [
        ("right", 1.0, False),
        ("wrong", 0.0, False),
    ]
    assert all(reward.description for reward in records.values())


def test_an_unknown_name_gets_the_nearest_and_the_known_ones() -> None:
    with pytest.raises(UnknownReward, match=r"Did you mean 'exact_answer'\?.*answer_format, .*exact_answer"):
        get("exact_anser")


def test_unknown_and_missing_parameters_are_refused() -> None:
    @register("needy")
    def needy(sample: Sample, *, must: float) -> Score:
        return Score(must, Verdict.PASS)

    with pytest.raises(ParameterError, match=r"unknown parameter 'rigth'. Did you mean 'right'\?"):
        check_params("exact_answer", {"rigth": 2.0})
    with pytest.raises(ParameterError, match=r"missing parameter 'must'\. Its parameters"):
        check_params("needy", {})
    check_params("needy", {"must": 1.0})


def test_a_name_belongs_to_one_function() -> None:
    def first(sample: Sample) -> Score:
        return Score(1.0, Verdict.PASS)

    def second(sample: Sample) -> Score:
        return Score(0.0, Verdict.WRONG)

    assert register("mine")(first) is first
    register("mine")(first)
    with pytest.raises(RewardError, match=r"already registered by .*first"):
        register("mine")(second)
    assert get("mine").function is first


def test_a_reward_names_its_parameters() -> None:
    def swallows_anything(sample: Sample, **params: float) -> Score:
        return Score(1.0, Verdict.PASS)

    with pytest.raises(RewardError, match="must name its parameters"):
        register("mine")(swallows_anything)


@pytest.mark.parametrize("value", ["plugin_rewards_module", "plugin_rewards_module:plugged"])
def test_an_installed_package_is_imported_when_first_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    (tmp_path / "plugin_rewards_module.py").write_text(PLUGIN)
    announce(tmp_path, value)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plugin_rewards_module", raising=False)

    with pytest.raises(UnknownReward, match="Did you mean 'plugged'"):
        get("pluged")
    assert "plugin_rewards_module" not in sys.modules
    assert get("plugged").description == "From a package that somebody installed."
    assert "plugged" in [reward.name for reward in available()]
    del sys.modules["plugin_rewards_module"]


def test_a_broken_announcement_names_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, "no_such_module_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match="plugged = no_such_module_anywhere"):
        get("plugged")
    (tmp_path / "plugin-1.0.dist-info" / "entry_points.txt").write_text("[moe_align.rewards]\nplugged = json\n")
    with pytest.raises(RewardError, match="did not register 'plugged'"):
        get("plugged")


def test_reward_is_a_light_library_of_its_own() -> None:
    program = (
        "import sys, reward\n"
        "heavy = {'torch', 'align', 'rollout', 'trl', 'ray', 'numpy', 'sympy', 'reasoning_gym'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
