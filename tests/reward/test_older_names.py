"""Modules and names of `reward` from before it had rooms: a user's own reward may import them."""

import importlib
import subprocess
import sys
from dataclasses import replace

import pytest

import reward
from reward.isolation import check
from reward.older_names import MODULES

NAMES = {
    "answer_format": "answer_format",
    "chat_rules": "CLOSINGS CURT_CLOSINGS CURT_OPENINGS DECLINES OPENINGS Stance chat_quality nano_chat refusal sentences stance",
    "code_blocks": "program",
    "code_cases": "AssertTests EXACT FunctionTests Outcome SHAPES StdioTests Tests UnusableTests parse_tests same same_text",
    "code_tests": "NAMESPACES code_tests",
    "conversation": "encode_conversation messages_of shortened",
    "endpoint": "reward_endpoint",
    "final_answer": "Box LONGEST_NUMBER LONGEST_UNWRAPPED boxed_answers boxes equal exact_answer extract_final_answer is_spray"
    " last_answers normalise sole_answer verdict_detail without_thought",
    "killable": "End Killable Limits Outcome WorkersUnavailable",
    "killable.types": "End Limits Outcome WorkersUnavailable",
    "learned": "NOTES Scale read_scale reward_model",
    "math_answer": "MOST_ANSWERS math_answer workers",
    "math_form": "Form equal read split",
    "math_text": "compare is_evident stated_answers takes_back tidy unreadable without_echo",
    "math_value": "Quantity choice clock in_base is_choice is_in_base is_nothing is_percent is_reals named number quantity"
    " same_number same_quantity split_unit words",
    "reasoning_gym_answer": "EXACT_TASKS LONGEST_ANSWER REFUSED_TASKS reasoning_gym_answer workers",
    "rules": "Rule SCRIPTS distinct_share language_consistency language_share overlong_penalty repetition rule soft_overlong words",
    "sandbox": "Call Calls Capability CaseReport Dialogue Execution Executor Job Limits LocalExecutor Program SandboxFailure"
    " SandboxUnavailable check namespace_executor unsafe_executor",
    "sandbox.check": "Capability check missing probe",
    "sandbox.client": "Refused python_command",
    "sandbox.inside": "",
    "sandbox.inside.plain": "Malformed NotPlain decode dumps encode loads text",
    "sandbox.local": "LocalExecutor namespace_executor unsafe_executor",
    "sandbox.packages": "installed",
    "sandbox.types": "Call Calls CaseReport Dialogue Ended Execution Executor Job Limits Program SandboxFailure SandboxUnavailable",
}
"""What each module had."""


def test_the_table_has_every_module_that_moved() -> None:
    assert MODULES.keys() | {"learned"} == NAMES.keys()


@pytest.mark.parametrize("old", NAMES)
def test_an_old_module_has_its_names_and_says_where_they_are(old: str) -> None:
    if old in MODULES:
        sys.modules.pop(f"reward.{old}", None)
        with pytest.warns(DeprecationWarning, match=rf"reward\.{old} is reward\.{MODULES[old]} now"):
            importlib.import_module(f"reward.{old}")
    module = importlib.import_module(f"reward.{old}")
    assert [name for name in NAMES[old].split() if not hasattr(module, name)] == []
    folder = old.partition(".")[0]
    assert getattr(reward, folder) is sys.modules[f"reward.{folder}"]


def test_a_submodule_does_not_hide_the_function_of_its_name() -> None:
    importlib.import_module("reward.sandbox.check")
    assert importlib.import_module("reward.sandbox").check is check


def test_names_that_changed_where_they_are_are_found_too() -> None:
    with pytest.warns(DeprecationWarning, match="instructions.judge is check now"):
        assert reward.instructions.judge is reward.instructions.check
    with pytest.warns(DeprecationWarning, match="judge is Mixture.score_each now"):
        reward.Mixture([reward.RewardTerm(name="repetition")]).judge([])
    with pytest.raises(AttributeError, match=r"'reward\.instructions' has no attribute 'jugde'"):
        reward.instructions.jugde  # noqa: B018


def test_the_ground_truth_of_a_sample_is_still_its_answer() -> None:
    with pytest.warns(DeprecationWarning, match=r"Sample\(answer=...\) is Sample\(ground_truth=...\) now"):
        sample = reward.Sample(id="1", prompt="?", completion="", answer="4")
    with pytest.warns(DeprecationWarning, match=r"Sample.answer is Sample.ground_truth now"):
        assert sample.answer == sample.ground_truth == "4"
    with pytest.warns(DeprecationWarning, match="ground_truth"):
        assert replace(sample, answer="5").ground_truth == "5"


def test_an_unknown_name_is_none() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'sandbag'"):
        reward.sandbag  # noqa: B018


def test_this_project_uses_none_of_them() -> None:
    program = "import reward, reward.isolation.executors; assert len(reward.available()) == 15"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:reward", "-c", program], check=True)
