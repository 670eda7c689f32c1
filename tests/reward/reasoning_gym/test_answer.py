"""reasoning_gym's own scorers, in workers, without their holes."""

import inspect
import json
import re
import warnings
from typing import Any

import pytest

from reward import Sample, UnusableAnswer, Verdict
from reward.isolation.pool import End, Outcome
from reward.reasoning_gym import answer as module
from reward.reasoning_gym.answer import EXACT_TASKS, REFUSED_TASKS, reasoning_gym_answer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

WITHOUT_GOLD = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Tasks with many solutions that give none."""
UNBOXABLE = {"codeio"}
"""Tasks whose answers may have unbalanced braces, which only the tags can hold."""
ALLOWED = sorted(DATASETS.keys() - REFUSED_TASKS.keys())
READ_PAST_THE_END = {"knights_knaves", "sokoban"}
"""Tasks whose scorers overlook further words after the right answer, though not a second answer."""


def sample(completion: str, task: str, entry: dict[str, Any]) -> Sample:
    metadata = {"reasoning_gym": {"task": task, "entry": entry}}
    return Sample(id="s", prompt="?", completion=completion, ground_truth=None, metadata=metadata)


def entries(task: str, size: int) -> list[dict[str, Any]]:
    """As they lie in the metadata of a data set: plain JSON."""
    return json.loads(json.dumps(list(reasoning_gym.create_dataset(task, size=size, seed=1)), default=str))


def test_the_two_lists_are_of_tasks_that_exist() -> None:
    assert REFUSED_TASKS.keys() | EXACT_TASKS <= DATASETS.keys()
    assert len(ALLOWED) == len(DATASETS) - 10


@pytest.mark.parametrize("task", ALLOWED)
def test_every_task_passes_its_own_answers_and_no_others(task: str) -> None:
    for entry in entries(task, 2):
        gold = entry["answer"]
        if task not in WITHOUT_GOLD:
            written = f"<answer>{gold}</answer>" if task in UNBOXABLE else rf"\boxed{{{gold}}}"
            right = reasoning_gym_answer(sample(written, task, entry))
            assert (right.verdict, right.value) == (Verdict.PASS, 1.0), (gold, right.detail)
        longer = "zz" if task in READ_PAST_THE_END else f"{gold} or not {gold}x"
        for wrong in (longer, "zzz", "1e9999999", "sNaN", "[" * 2000, "\N{FULLWIDTH DIGIT FIVE}"):
            score = reasoning_gym_answer(sample(rf"\boxed{{{wrong}}}", task, entry))
            assert score.verdict in (Verdict.WRONG, Verdict.TIMEOUT), wrong  # coin_flip computes 10 ** 9999999
            assert score.value == 0.0


@pytest.mark.parametrize("task", ALLOWED)
def test_no_allowed_scorer_evaluates_the_answer(task: str) -> None:
    """By the source of every function of its module: eval only on data, sympy's parser and exec never in a scorer."""
    dataset, _ = DATASETS[task]
    source = inspect.getsource(dataset.score_answer)
    names = set(re.findall(r"(?:self\.|\b)(\w+)\(", source))
    helpers = [value for name, value in inspect.getmembers(dataset) if name in names and inspect.isfunction(value)]
    helpers += [value for name, value in vars(inspect.getmodule(dataset)).items() if name in names]
    for part in [source, *(inspect.getsource(one) for one in helpers if inspect.isfunction(one))]:
        evaluated = re.findall(r"\b(?:eval|exec|sympify|parse_expr|literal_eval|loads_pickle)\(([^)]*)", part)
        allowed = {"number_sorting": ['entry["answer"]'], "bitwise_arithmetic": ["problem"]}.get(task, [])
        if task == "propositional_logic":
            allowed = ["expr", "expr[1:-1]", "left_expr", "right_expr", "sub_expr"]  # its own parser of that name
        assert set(evaluated) <= set(allowed), evaluated


@pytest.mark.parametrize("task", sorted(REFUSED_TASKS.keys() - {"composite"}))
def test_the_refused_scorers_do_evaluate_the_answer(task: str) -> None:
    source = inspect.getsource(DATASETS[task][0].score_answer)
    assert re.search(r"(?:eval|parse_expr)\(answer\)|parse_expr\(answer,", source)


@pytest.mark.parametrize("task", sorted(REFUSED_TASKS))
def test_a_refused_task_masks_its_samples_with_the_reason(task: str) -> None:
    with pytest.raises(UnusableAnswer, match=f"task '{task}' is refused: it"):
        reasoning_gym_answer(sample(r"\boxed{5}", task, {"answer": "5", "metadata": {}}))


def test_an_unknown_task_masks_its_samples() -> None:
    with pytest.raises(UnusableAnswer, match="no task 'no such task'"):
        reasoning_gym_answer(sample(r"\boxed{5}", "no such task", {"answer": "5", "metadata": {}}))


@pytest.mark.parametrize(
    ("task", "gold", "hole"),
    [
        ("gsm_symbolic", "288", "-288"),
        ("gsm_symbolic", "288", "288 or 5"),
        ("gsm_symbolic", "288", "\N{ARABIC-INDIC DIGIT TWO}\N{ARABIC-INDIC DIGIT EIGHT}" * 2),
        ("chain_sum", "5", "\N{FULLWIDTH DIGIT FIVE}"),
        ("chain_sum", "5", "15"),
        ("chain_sum", "15", "1_5"),
        ("gcd", "5", "1 2 3 4 5"),
        ("game_of_life_halting", "True", "False"),
        ("game_of_life_halting", "False", "True"),
        ("spell_backward", "abc", "abcx"),
        ("letter_jumble", "one two", "one two three"),
    ],
)
def test_the_holes_of_the_scorers_are_closed(task: str, gold: str, hole: str) -> None:
    score = reasoning_gym_answer(sample(rf"\boxed{{{hole}}}", task, {"answer": gold, "metadata": {}}))
    assert (score.verdict, score.value) == (Verdict.WRONG, 0.0)


@pytest.mark.parametrize(("said", "passes"), [(1.0, True), (0.9, False), (1.5, False), ("1.0", False), (None, False)])
def test_only_a_score_of_exactly_one_passes(monkeypatch: pytest.MonkeyPatch, said: Any, passes: bool) -> None:
    outcome = Outcome(End.DONE, {"score": said}, "answer")
    monkeypatch.setattr(module.workers, "run", lambda requests: [outcome])
    score = reasoning_gym_answer(sample(r"\boxed{5}", "gcd", {"answer": "5"}))
    assert score.verdict is (Verdict.PASS if passes else Verdict.WRONG)
    assert score.value == float(passes)


@pytest.mark.parametrize(
    ("end", "verdict"), [(End.TIMEOUT, Verdict.TIMEOUT), (End.MEMORY, Verdict.MEMORY), (End.INFRA, Verdict.INFRA_ERROR)]
)
def test_who_is_at_fault(monkeypatch: pytest.MonkeyPatch, end: End, verdict: Verdict) -> None:
    monkeypatch.setattr(module.workers, "run", lambda requests: [Outcome(end, phase="answer")])
    assert reasoning_gym_answer(sample(r"\boxed{5}", "gcd", {"answer": "5"})).verdict is verdict


def test_a_hanging_scorer_is_killed() -> None:
    entry = entries("rubiks_cube", 1)[0]
    score = reasoning_gym_answer(sample(r"\boxed{F5000000}", "rubiks_cube", entry))
    assert score.verdict in (Verdict.TIMEOUT, Verdict.MEMORY)
    assert reasoning_gym_answer(sample(r"\boxed{5}", "gcd", {"answer": "5"})).value == 1.0


def test_an_entry_that_its_scorer_cannot_use_masks_the_sample() -> None:
    with pytest.raises(UnusableAnswer, match="for the ground truth too"):
        reasoning_gym_answer(sample(r"\boxed{5}", "sudoku", {"answer": "5", "metadata": {}}))


@pytest.mark.parametrize(
    ("task", "entry"),
    [
        ("number_sorting", {"answer": "__import__('os').getpid()", "metadata": {"direction": "ascending"}}),
        ("bitwise_arithmetic", {"answer": "5", "metadata": {"problem": "__import__('os').getpid()"}}),
        ("bitwise_arithmetic", {"answer": "5", "metadata": {}}),
    ],
)
def test_no_row_of_the_data_is_evaluated_that_the_task_would_not_generate(task: str, entry: dict[str, Any]) -> None:
    with pytest.raises(UnusableAnswer, match="not of the kind that it generates"):
        reasoning_gym_answer(sample(r"\boxed{5}", task, entry))


def test_a_spray_or_no_answer_never_reaches_the_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.workers, "run", lambda requests: pytest.fail("asked"))
    entry = {"answer": "5", "metadata": {}}
    for completion, verdict in (
        (r"\boxed{5} \boxed{6}", Verdict.WRONG),
        ("<answer>5</answer><answer>6</answer>", Verdict.WRONG),
        (r"\boxed{" + "5" * 30_000 + "}", Verdict.WRONG),
        ("5", Verdict.NO_ANSWER),
        (r"\boxed{}", Verdict.NO_ANSWER),
        ("<answer> </answer>", Verdict.NO_ANSWER),
    ):
        assert reasoning_gym_answer(sample(completion, "spell_backward", entry)).verdict is verdict


def test_the_tags_of_its_own_prompts_will_do() -> None:
    entry = {"answer": "5", "metadata": {}}
    assert reasoning_gym_answer(sample("<answer>5</answer>", "gcd", entry)).value == 1.0
    assert reasoning_gym_answer(sample(r"<answer>5</answer> \boxed{6}", "gcd", entry)).value == 0.0


@pytest.mark.parametrize("metadata", [{}, {"reasoning_gym": {}}, {"reasoning_gym": {"task": "gcd", "entry": {}}}])
def test_metadata_without_the_entry_is_unusable(metadata: dict[str, Any]) -> None:
    bare = Sample(id="s", prompt="?", completion=r"\boxed{5}", ground_truth="5", metadata=metadata)
    with pytest.raises(UnusableAnswer, match="metadata needs"):
        reasoning_gym_answer(bare)


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("<think>I put it in <answer>...</answer>.</think><answer>{}</answer>", Verdict.PASS),
        (r"<think>so \boxed{{{}}}</think><answer>{}</answer>", Verdict.PASS),
        ("<think>maybe <answer>{}</answer> or", Verdict.NO_ANSWER),
    ],
)
def test_what_is_thought_is_no_answer(completion: str, verdict: Verdict) -> None:
    (entry,) = entries("chain_sum", 1)
    said = completion.format(*[entry["answer"]] * 2)
    assert reasoning_gym_answer(sample(said, "chain_sum", entry)).verdict is verdict
