"""A function in a file is a reward: how it is called, and that what it does wrong costs one sample its score, and nothing else."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from reward import (
    InfrastructureError,
    Mixture,
    ParameterError,
    RewardError,
    RewardTerm,
    Sample,
    SampleReward,
    UnknownReward,
    Verdict,
    trl_reward_func,
)
from reward.own import file as own_file

Write = Callable[[str], Path]

FAULTS = '''
import asyncio, os, time
from reward import Score, Verdict, batched

def single(sample):
    """1 for a unit."""
    if sample.id == "raises":
        raise KeyError("unit")
    if sample.id == "exits": raise SystemExit(3)
    if sample.id == "hangs": time.sleep(60)
    if sample.id == "dies": os._exit(7)
    wrong = {"text": "yes", "nan": float("nan"), "none": None, "list": [1.0], "infra": Score(1.0, Verdict.INFRA_ERROR, "down")}
    return wrong.get(sample.id, 1.0)

@batched
def together(samples):
    assert len({sample.prompt for sample in samples}) == 1
    return [len(samples) * value if (value := single(s)) == 1.0 else value for s in samples if s.id != "missing"]

async def awaited(sample):
    await asyncio.sleep(60 if sample.id == "waits" else 0.01)
    return single(sample)
'''
LINE = {name: FAULTS.splitlines().index(text) + 1 for name, text in {
    "single": "def single(sample):", "together": "@batched", "awaited": "async def awaited(sample):",
    "raises": '        raise KeyError("unit")'}.items()}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of rewards."""

    def written(text: str) -> Path:
        file = tmp_path / "my_rewards.py"
        file.write_text(text)
        return file

    return written


def sample(id_: str, completion: str = "3 m", **metadata: Any) -> Sample:
    return Sample(id_, "how far?", completion, "3 m", metadata=metadata)


def scored(name: str, samples: Sequence[Sample], **term: Any) -> list[SampleReward]:
    return Mixture([RewardTerm(name=name, **term)], infra_error_limit=1.0).score(samples)


def details(rewards: Sequence[SampleReward]) -> list[str]:
    return [next(iter(reward.components.values())).detail for reward in rewards]


def test_a_number_of_a_sample_is_its_reward_and_passes_above_zero(write: Write) -> None:
    file = write(
        "def says_unit(sample, *, worth=1.0):\n    return worth * (sample.metadata['unit'] in sample.completion)\n"
    )
    rewards = scored(
        f"{file}:says_unit", [sample("1", unit="m"), sample("2", unit="km")], params={"worth": 2.0}, weight=0.5
    )
    assert [(reward.value, reward.verdict) for reward in rewards] == [(1.0, Verdict.PASS), (0.0, Verdict.WRONG)]
    assert list(rewards[0].components) == ["says_unit"], "its metrics are named by the function"


def test_scores_and_scalars_of_numpy_are_taken_as_they_are(write: Write) -> None:
    file = write(
        "import numpy\nfrom reward import Score, Verdict\n"
        "def graded(sample):\n"
        "    return numpy.float32(0.5) if sample.id == 'n' else Score(0.7, Verdict.WRONG, 'nearly')\n"
    )
    number, score = scored(f"{file}:graded", [sample("n"), sample("s")])
    assert (number.value, number.verdict) == (0.5, Verdict.PASS)
    assert (score.value, score.verdict, details([score])) == (0.7, Verdict.WRONG, ["nearly"])


def test_a_file_is_run_as_python_runs_it(write: Write) -> None:
    file = write("def f(sample, weight: float = 2.0): return f.__annotations__['weight'](1)")
    assert [reward.value for reward in scored(f"{file}:f", [sample("a")])] == [1.0]


def test_the_name_that_counts_may_be_a_label_and_domains_hold(write: Write) -> None:
    term = RewardTerm(name=f"{write('def f(sample): return 1')}:f", label="mine", domains=["own"])
    assert term.component == "mine"
    other = RewardTerm(name="exact_answer")
    [reward] = Mixture([term, other], infra_error_limit=1.0).score([sample("1")])
    assert list(reward.components) == ["exact_answer"]


def test_a_fault_on_one_sample_masks_that_sample_and_says_where(write: Write) -> None:
    file = write(FAULTS)
    told = {
        "raises": f"line {LINE['raises']}: KeyError: 'unit'",
        "hangs": f"line {LINE['single']}: it took longer than 0.5 s",
        "exits": "SystemExit: 3",
        "dies": f"line {LINE['single']}: its process ended with status 7",
        "text": f"line {LINE['single']}: it returned 'yes' (str), not a number",
        "nan": "it returned nan, not a finite number",
        "none": "it returned None: the sample is not scored",
        "list": "it returned [1.0] (list), not a number",
        "infra": "it returned INFRA_ERROR: down",
    }
    ids = [id_ for fault in told for id_ in (fault, f"after {fault}")]
    rewards = dict(zip(ids, scored(f"{file}:single", [sample(id_) for id_ in ids], timeout_s=0.5), strict=True))
    for fault, why in told.items():
        assert rewards[f"after {fault}"].value == 1.0
        assert (rewards[fault].value, rewards[fault].verdict) == (None, Verdict.INFRA_ERROR)
        assert details([rewards[fault]])[0].startswith(f"{file}, line ")
        assert why in details([rewards[fault]])[0]


def test_of_a_batch_the_faulty_samples_are_masked_and_the_others_are_scored_together(write: Write) -> None:
    ids = ["a", "raises", "missing", "dies", "hangs", "text", "b"]
    rewards = scored(f"{write(FAULTS)}:together", [sample(id_) for id_ in ids], timeout_s=0.5)
    assert [reward.value for reward in rewards] == [2.0, None, None, None, None, None, 2.0], "of the two that are left"


def test_what_fails_together_and_never_alone_masks_all_and_says_so(write: Write) -> None:
    file = write(
        "from reward import batched\n@batched\ndef odd(samples):\n    assert len(samples) == 1\n    return [1.0]\n"
    )
    rewards = scored(f"{file}:odd", [sample("a"), sample("b")])
    # A sample without a score is tried once more, here with the other one again.
    assert [reward.value for reward in rewards] == [None, None]
    assert "line 4: AssertionError (on 2 samples together, on none of them alone)" in details(rewards)[0]


def test_calls_that_are_awaited_run_together_and_fail_alone(write: Write) -> None:
    ids = ["a", "raises", "waits", "dies", "b"]
    rewards = scored(f"{write(FAULTS)}:awaited", [sample(id_) for id_ in ids], timeout_s=0.5)
    assert [reward.value for reward in rewards] == [1.0, None, None, None, 1.0]


def test_so_many_calls_are_awaited_at_once_and_no_more(write: Write) -> None:
    file = write(
        "import asyncio\nnow = most = 0\n"
        "async def crowd(sample):\n"
        "    global now, most\n    now += 1\n    most = max(most, now)\n"
        "    await asyncio.sleep(0.05)\n    now -= 1\n    return most\n"
    )
    rewards = scored(f"{file}:crowd", [sample(str(number)) for number in range(40)])
    assert max(reward.value or 0 for reward in rewards) == 32


def test_a_loop_outlives_its_batch_so_that_clients_can_be_kept(write: Write) -> None:
    file = write("import asyncio\nloops = set()\nasync def f(sample):\n    loops.add(asyncio.get_running_loop())\n    return len(loops)\n")  # fmt: skip
    mixture = Mixture([RewardTerm(name=f"{file}:f")])
    assert [mixture.score([sample("1")])[0].value for _ in range(2)] == [1.0, 1.0]


def test_calls_that_hang_or_die_are_waited_for_a_few_times_only(write: Write) -> None:
    file = write("import time\nfrom reward import batched\n\n\ndef f(sample):\n    time.sleep(60)\n")
    function = own_file.reward_of(file, "f", timeout_s=0.2).function
    begun = time.monotonic()
    scores = function([sample(str(number)) for number in range(64)])
    assert time.monotonic() - begun < 40
    assert [score.verdict for score in scores] == [Verdict.INFRA_ERROR] * 64
    assert scores[0].detail.endswith("it took longer than 0.2 s")
    assert scores[-1].detail.startswith("not tried")


def test_scored_samples_make_up_for_calls_that_die(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_file, "MOST_LOST", 1)
    monkeypatch.setattr(own_file, "SCORED_FOR_A_LOSS", 2)
    function = own_file.reward_of(write(FAULTS), "single").function
    scores = function([sample(id_) for id_ in ("a", "a", "dies", "a", "dies", "a")])
    assert [score.value == 1.0 for score in scores] == [True, True, False, True, False, False]
    assert scores[-1].detail.startswith("not tried, since 2 calls")


def test_what_raises_on_every_row_ends_the_batch_with_the_first_reason(write: Write) -> None:
    file = write("def f(sample):\n    return sample.metadata['unti']\n")
    with pytest.raises(InfrastructureError) as stopped:
        Mixture([RewardTerm(name=f"{file}:f")]).score([sample("a"), sample("b")])
    assert "100.0% of the samples could not be judged" in str(stopped.value)
    assert f"reward 'f' on sample 'a': {file}, line 2: KeyError: 'unti'" in str(stopped.value)


# TRL's signature


@pytest.mark.parametrize(
    "body",
    [
        "[float(completion.endswith(u)) for completion, u in zip(completions, unit)]",
        "[float(completion[0]['content'].endswith(u)) for completion, u in zip(completions, unit)]",
        "[float(completion[-1].get('content').endswith(u)) for completion, u in zip(completions, unit)]",
    ],
)
def test_trls_signature_gets_columns_and_texts_or_messages_as_the_function_reads_them(body: str, write: Write) -> None:
    file = write(f"def f(completions, unit, **columns):\n    return {body}\n")
    rewards = scored(f"{file}:f", [sample("1", unit="m"), sample("2", unit="s")])
    assert [reward.value for reward in rewards] == [1.0, 0.0]


def test_prompts_are_the_whole_conversation_or_its_last_text(write: Write) -> None:
    file = write(
        "def f(prompts, completions):\n"
        "    return [(p == 'how far?') + 10 * (p[0]['content'] == 'Be brief.') + 100 * (p[-1]['role'] == 'user') for p in prompts]\n"
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "how far?"}]
    assert scored(f"{file}:f", [sample("1", messages=messages)])[0].value == 111.0


def test_every_column_reaches_the_rest_of_the_arguments_and_the_ground_truth_is_the_answer(write: Write) -> None:
    file = write(
        "def f(completions, answer, worth=1.0, **columns):\n"
        "    assert set(columns) == {'unit', 'prompts', 'ground_truth'}, columns\n"
        "    return [worth * (c == a) for c, a in zip(completions, answer)]\n"
    )
    assert scored(f"{file}:f", [sample("1", unit="m")], params={"worth": 3.0})[0].value == 3.0


def test_a_column_that_one_sample_lacks_is_there_for_the_others(write: Write) -> None:
    file = write(
        "def f(completions, unit='cm'):\n    return [float(u == 'm') for u in unit]\n"
        "def g(completions, **columns):\n    return [float(u == 'm') for u in columns['unit']]\n"
    )
    for name in ("f", "g"):
        found = scored(f"{file}:{name}", [sample("1", unit="m"), sample("2")])
        assert [reward.value for reward in found] == [1.0, 0.0]


def test_texts_of_trls_signature_can_be_sent_to_a_pool_and_copied(write: Write) -> None:
    file = write(
        "import copy, pickle\n"
        "def f(completions, **kwargs):\n"
        "    sent = copy.deepcopy(pickle.loads(pickle.dumps(completions)))\n"
        "    return [float(text == '3 m' and text[0]['content'] == '3 m') for text in sent]\n"
    )
    assert [found.value for found in scored(f"{file}:f", [sample("1"), sample("2", "4 m")])] == [1.0, 0.0]


def test_none_is_not_scored_as_in_trl_and_the_reward_goes_back_to_trl(write: Write) -> None:
    file = write("def f(completions, answer):\n    return [None if a == '?' else 1.0 for a in answer]\n")
    reward = trl_reward_func(f"{file}:f")
    assert reward(["p", "p"], ["c", "c"], answer=["?", "x"]) == [None, 1.0]


def test_none_leaves_a_sample_to_the_other_rewards_as_in_trl(write: Write) -> None:
    file = write(
        "def f(completions, kind):\n    return [None if k == 'code' else 1.0 for k in kind]\n"
        "def g(completions, kind):\n    return [0.5 if k == 'code' else None for k in kind]\n"
    )
    samples = [sample("1", kind="code"), sample("2", kind="math"), sample("3", kind="code")]
    both = [RewardTerm(name=f"{file}:f"), RewardTerm(name=f"{file}:g"), RewardTerm(name="repetition", weight=0.0)]
    found = Mixture(both).score(samples)
    assert [reward.value for reward in found] == [0.5, 1.0, 0.5]
    assert [list(reward.components) for reward in found] == [
        ["g", "repetition"],
        ["f", "repetition"],
        ["g", "repetition"],
    ]
    assert [reward.verdict for reward in found] == [Verdict.PASS] * 3
    alone = Mixture([both[0], both[2]], infra_error_limit=1.0).score(samples)
    assert [(reward.value, reward.verdict) for reward in alone] == [
        (None, Verdict.INFRA_ERROR), (1.0, Verdict.PASS), (None, Verdict.INFRA_ERROR)
    ]  # fmt: skip
    measured = Mixture([both[0].model_copy(update={"weight": 0.0}), both[1].model_copy(update={"weight": 0.0})])
    assert [list(reward.components) for reward in measured.score(samples)] == [["g"], ["f"], ["g"]]


def test_a_column_that_the_data_lack_is_named_beside_those_there_are(write: Write) -> None:
    file = write("def f(completions, unit):\n    return [1.0] * len(unit)\n")
    rewards = scored(f"{file}:f", [sample("1", unit="m"), sample("2", units="m")])
    assert [reward.value for reward in rewards] == [1.0, None]
    assert (
        "it wants the column 'unit', which the data lack; they have answer, ground_truth, units" in details(rewards)[1]
    )


def test_which_columns_are_wanted_is_known_before_any_sample(write: Write) -> None:
    file = write(
        "from reward import columns\n@columns('unit', 'scale')\ndef declared(sample): return 1\n"
        "def named(completions, unit, worth=1.0): return []\n"
    )
    mixture = Mixture([RewardTerm(name=f"{file}:declared", domains=["a"]), RewardTerm(name=f"{file}:named", params={})])
    assert mixture.columns("a") == {"declared": ["unit", "scale"], "named": ["unit"]}
    assert mixture.columns("b") == {"named": ["unit"]}


# What is refused before a sample is scored


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        ("def f(sample): return 1", "g", "it has no function 'g'; its functions: f"),
        ("def f(sample) return 1", "f", "line 1: expected ':'"),
        ("import nowhere_to_be_found", "f", "line 1: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("\nraise SystemExit(1)", "f", "line 2: SystemExit: 1"),
        ("import os\nos._exit(4)", "f", "the process that imported it ended with status 4"),
        ("def f(): return 1", "f", "line 1: the function must take a sample first"),
        ("def f(sample, **rest): return 1", "f", "line 1: the function must name its parameters"),
        ("def f(completions, trainer_state): return []", "f", "'trainer_state' is one that only TRL's own trainer"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(text: str, function: str, message: str, write: Write) -> None:
    file = write(text)
    with pytest.raises(RewardError) as refused:
        Mixture([RewardTerm(name=f"{file}:{function}")])
    assert f"the reward my_rewards.py:{function} cannot be used: {file}: " in str(refused.value)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_import_that_hangs_is_ended(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_file, "IMPORT_S", 2.0)
    before = set(psutil.Process().children())
    with pytest.raises(RewardError, match="its import took longer than 2 s"):
        Mixture([RewardTerm(name=f"{write('while True: pass')}:f")])
    assert set(psutil.Process().children()) <= before


def test_a_file_that_is_missing_and_parameters_that_do_not_fit(write: Write, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"the reward file .*nowhere\.py does not exist"):
        Mixture([RewardTerm(name=f"{tmp_path}/nowhere.py:f")])
    file = write("def f(sample, needed, *, worth=1.0): return 1")
    with pytest.raises(ParameterError, match=r"unknown parameter 'wroth'\. Did you mean 'worth'"):
        Mixture([RewardTerm(name=f"{file}:f", params={"wroth": 1, "needed": 1})])
    with pytest.raises(ParameterError, match="missing parameter 'needed'"):
        Mixture([RewardTerm(name=f"{file}:f")])


def test_an_unknown_reward_says_how_to_add_one_and_a_limit_of_time_is_for_files() -> None:
    with pytest.raises(
        UnknownReward, match=r"my_rewards\.py:my_function; or .* entry point of the group moe_align.rewards"
    ):
        Mixture([RewardTerm(name="says_unit")])
    with pytest.raises(ValueError, match="timeout_s is for a function in a file"):
        RewardTerm(name="exact_answer", timeout_s=1)


# Its process


def test_the_file_of_the_beginning_is_what_scores_also_after_a_change_and_in_another_process(write: Write) -> None:
    file = write("def f(sample): return 1")
    mixture = Mixture([RewardTerm(name=f"{file}:f")])
    write("def f(sample): return 2")
    assert pickle.loads(pickle.dumps(mixture)).score([sample("1")])[0].value == 1.0
    assert Mixture([RewardTerm(name=f"{file}:f")]).score([sample("1")])[0].value == 2.0


def test_helpers_beside_the_file_are_found_and_what_it_prints_is_no_output(
    write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_helpers.py").write_text("WORTH = 4\n")
    file = write(
        "from my_helpers import WORTH\nprint('imported')\ndef f(sample):\n    print('called')\n    return WORTH\n"
    )
    assert scored(f"{file}:f", [sample("1")])[0].value == 4.0
    said = capfd.readouterr()
    assert (said.out, "called" in said.err) == ("", True)


def test_a_module_in_a_directory_without_init_is_a_part_of_the_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "helpers").mkdir()
    (tmp_path / "wandb").mkdir()
    (tmp_path / "helpers" / "units.py").write_text("WORTH = 4\n")
    file = write("from helpers.units import WORTH\nimport wandb\ndef f(sample):\n    return WORTH\n")
    assert own_file.files_of(file) == [file, tmp_path / "helpers" / "units.py"]
    assert scored(f"{file}:f", [sample("1")])[0].value == 4.0


def test_its_process_is_not_this_one_and_ends_with_the_reward(write: Write) -> None:
    function = own_file.reward_of(write("import os\ndef f(sample): return os.getpid()"), "f").function
    pid = int(function([sample("1")])[0].value)
    assert pid != os.getpid()
    assert int(function([sample("1")])[0].value) == pid, "it stays for the next batch"
    del function
    assert not psutil.pid_exists(pid)


def test_its_process_is_killed_with_the_one_that_started_it_also_where_it_hangs_in_c(
    write: Write, tmp_path: Path
) -> None:
    file = write(
        "import os, pathlib, re\n"
        "def f(sample):\n"
        "    pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n"
        "    re.match('(a+)+$', 'a' * 60 + 'b')\n"
    )
    script = (
        f"from reward import *; Mixture([RewardTerm(name={str(file) + ':f'!r})]).score([Sample('1', '', '', None)])"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    child = psutil.Process(int(pid.read_text()))
    parent.kill()
    parent.wait()
    child.wait(10)
