import json

import pytest

from align.data.cards import load_card
from align.data.drawing import key_hash
from align.data.loader import load_split
from align.data.types import Example, normalised
from align.errors import UserError
from reward.math.answer import math_answer
from reward.reasoning_gym.answer import reasoning_gym_answer
from reward.types import Sample, Verdict

from ..rows import write_card, write_rows


def gsm8k_rows(name, count):
    return [{"question": f"{name} asks {i}?", "answer": f"By <<1+1=2>> it is {i}.\n#### {i}"} for i in range(count)]


def file_card(directory, train, test, train_suffix="jsonl"):
    write_rows(directory / "train.jsonl", train)
    write_rows(directory / "test.jsonl", test)
    splits = {"train": {"from": f"train.{train_suffix}"}, "test": {"from": "test.jsonl"}}
    fields = {"prompt": "q", "response": "r", "answer": "a"}
    return load_card(write_card(directory / "mine.md", {"kind": "file", "splits": splits, "fields": fields}))


def row(q, a="1", r="It is 1."):
    return {"q": q, "a": a, "r": r}


def prompts(loaded):
    return [example.prompt_text for example in loaded.examples]


def test_a_training_prompt_of_the_test_split_is_dropped_and_counted(tmp_path):
    card = file_card(tmp_path, [row("What is  IT?\n"), row("Else?")], [row("what is it?"), row("Third?")])
    loaded = load_split(card, "train")
    assert prompts(loaded) == ["Else?"]
    assert (loaded.dropped_contaminated, loaded.unchecked) == (1, ())
    assert prompts(load_split(card, "test")) == ["what is it?", "Third?"]


def test_contamination_is_dropped_before_the_limit_is_applied(tmp_path):
    card = file_card(tmp_path, [row("Same?")] * 50 + [row("Else?")], [row("Same?")])
    loaded = load_split(card, "train", limit=1)
    assert prompts(loaded) == ["Else?"]
    assert loaded.dropped_contaminated == 50


def test_a_split_that_is_all_contaminated_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"split train: no examples \(2 dropped, which are held out: 2 in mine/test\)"):
        load_split(file_card(tmp_path, [row("Same?")] * 2, [row("Same?")]), "train")


def test_examples_of_a_table_are_complete(tmp_path):
    (example,) = load_split(file_card(tmp_path, [row("Q?", a=7)], [row("T?")]), "train").examples
    assert example == Example(
        id="mine/train/0",
        messages=({"role": "user", "content": "Q?"},),
        response="It is 1.",
        answer="7",
        domain="arithmetic",
        metadata={"a": 7, "r": "It is 1."},
    )


@pytest.mark.parametrize(
    ("published", "written", "miss"),
    [
        (7, "7", "8"),
        (8.0, "8", "80"),
        (1e-05, "0.00001", "0.0001"),
        (1e16, "10^{16}", "10^{15}"),
        (100 / 3, r"\frac{100}{3}", "33.4"),
        ("2 (coats)", "2", "3"),
        (["2", "5"], "5, 2", "2"),
    ],
)
def test_an_answer_as_it_is_published_can_be_met(tmp_path, published, written, miss):
    (example,) = load_split(file_card(tmp_path, [row("Q?", a=published)], [row("T?")]), "train").examples
    samples = [Sample("s", "Q?", rf"\boxed{{{answer}}}", example.answer) for answer in (written, miss)]
    assert [score.verdict for score in math_answer(samples)] == [Verdict.PASS, Verdict.WRONG]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": "Q?", "r": "R", "a": float("nan")}, "line 2: column 'a' is empty: the answer is missing"),
        ({"q": "Q?", "r": "R"}, r"train\.jsonl, line 2: no column 'a' for the answer; there are q, r"),
        ({"q": "Q?", "r": "R", "a": None}, "line 2: column 'a' is empty: the answer is missing"),
        ({"q": "Q?", "r": "R", "a": ""}, "line 2: column 'a' is empty: the answer is missing"),
        ({"q": ["Q?"], "r": "R", "a": "1"}, "line 2: column 'q' must hold text for the prompt, not \\['Q\\?'\\]"),
        ({"q": "\ud800", "r": "R", "a": "1"}, "line 2: column 'q': character 1 is half of a surrogate"),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        load_split(file_card(tmp_path, [row("Good?"), bad], [row("T?")]), "train")


def test_empty_and_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="no examples"):
        load_split(file_card(tmp_path, [], [row("T?")]), "train")
    with pytest.raises(UserError, match=r"must end in one of \.jsonl, .*\.parquet"):
        load_split(file_card(tmp_path, [], [], train_suffix="txt"), "train")
    with pytest.raises(UserError, match=r"train\.parquet does not exist"):
        load_split(file_card(tmp_path, [], [], train_suffix="parquet"), "train")


def test_gsm8k_from_a_local_directory_carves_validation_out_of_train(tmp_path):
    write_rows(tmp_path / "train.jsonl", gsm8k_rows("Train", 400))
    write_rows(tmp_path / "test.jsonl", [*gsm8k_rows("Test", 9), gsm8k_rows("Train", 400)[0]])
    card = load_card("gsm8k")
    train, validation, test = (load_split(card, split, path=tmp_path) for split in ("train", "validation", "test"))
    kept = len(train.examples) + len(validation.examples)
    dropped = train.dropped_contaminated + validation.dropped_contaminated
    assert (kept, dropped) == (399, 1)
    assert 5 <= len(validation.examples) <= 40
    assert not {normalised(p) for p in prompts(train)} & {normalised(p) for p in prompts(validation)}
    assert test.examples[3].answer == "3"
    assert test.examples[3].response is None
    assert test.examples[3].messages[-1]["content"] == "Test asks 3?\nPut the final answer in \\boxed{}."
    assert train.unchecked == ()


def test_one_file_alone_says_what_it_could_not_be_compared_with(tmp_path):
    path = write_rows(tmp_path / "any name.jsonl", gsm8k_rows("Train", 100))
    card = load_card("gsm8k")
    assert load_split(card, "train", path=path).unchecked == ("test",)
    assert load_split(card, "test", path=str(path)).unchecked == ()


def test_parquet_in_shards_as_on_the_hub(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard, rows in enumerate([gsm8k_rows("A", 3), gsm8k_rows("B", 3)]):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"test-0000{shard}-of-00002.parquet")
    examples = load_split(load_card("gsm8k"), "test", path=tmp_path).examples
    assert [example.id for example in examples] == [f"gsm8k/test/{i}" for i in range(6)]
    assert examples[5].prompt_text.startswith("B asks 2?")


def test_an_answer_without_its_mark_is_named(tmp_path):
    path = write_rows(tmp_path / "test.jsonl", [*gsm8k_rows("Test", 2), {"question": "Q?", "answer": "It is 4."}])
    with pytest.raises(UserError, match="line 3: no answer after '####' in column 'answer'"):
        load_split(load_card("gsm8k"), "test", path=path)


def test_a_directory_without_the_split_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has none of test\.jsonl, test\.parquet"):
        load_split(load_card("gsm8k"), "test", path=tmp_path)


def test_an_unreachable_hub_says_how_to_do_without(monkeypatch):
    import datasets

    def refuse(*_args, **_options):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"(?s)hub: ConnectionError: Couldn't reach.*`path`.*test\.jsonl"):
        load_split(load_card("gsm8k"), "test")


def test_the_hub_is_asked_for_what_the_card_says(monkeypatch):
    import datasets

    asked = []

    def answer(*args, **options):
        asked.append((args, options["revision"], options["split"]))
        return gsm8k_rows(options["split"], 60)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    card = load_card("gsm8k")
    assert load_split(card, "train").unchecked == ()
    assert {split for _, _, split in asked} == {"train", "test"}
    assert {(args, revision) for args, revision, _ in asked} == {(("openai/gsm8k", "main"), card.source.revision)}


def test_nano_math_takes_parameters_levels_and_a_seeded_limit():
    card = load_card("nano_math")

    def load(limit, seed):
        params = {"worked_share": 1.0, "worked_differences": 1.0}
        return load_split(card, "train", params=params, levels=[1], limit=limit, seed=seed).examples

    worked = load(20, seed=5)
    assert {(example.level, example.metadata["kind"]) for example in worked} == {(1, "worked")}
    assert load(20, seed=5) == worked
    assert load(10, seed=5) == worked[:10]
    assert {example.id for example in load(20, seed=6)} != {example.id for example in worked}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nano_math", {"params": {"worked_shar": 1}}, "unknown key 'worked_shar'.*'worked_share'"),
        ("nano_math", {"params": {"worked_share": 2}}, "params of data card nano_math: worked_share"),
        ("nano_math", {"levels": [1, 4]}, "no level 4; there are only 1, 2, 3"),
        ("nano_math", {"limit": 0}, "limit of 0"),
        ("nano_math", {"path": "x.jsonl"}, "takes no path"),
        ("gsm8k", {"params": {"worked_share": 1}}, "takes no params"),
        ("chain_sum", {"params": {"max_term": 3}}, "chain_sum refuses .*max_term"),
        ("chain_sum", {"params": {"min_terms": 9}}, "chain_sum refuses .*max_terms must be"),
        ("chain_sum", {"params": {"seed": 9}}, "seed belongs to splits"),
        ("chain_sum", {"levels": [1]}, "no level 1; there are none"),
    ],
)
def test_options_that_do_not_fit_the_card(name, options, message):
    with pytest.raises(UserError, match=message):
        load_split(load_card(name), "test", **options)


def test_a_split_the_card_lacks(tmp_path):
    with pytest.raises(UserError, match="no split 'validation', only test, train"):
        load_split(file_card(tmp_path, [row("A?")], [row("B?")]), "validation")


@pytest.mark.parametrize("name", ["chain_sum", "gsm_symbolic"])
def test_generated_splits_are_disjoint_and_solved_by_the_verifier_of_their_task(name):
    card = load_card(name)
    by_split = {split: load_split(card, split) for split in ("train", "validation", "test")}
    assert by_split["train"].dropped_contaminated > 0
    for split, later in (("train", "validation"), ("train", "test"), ("validation", "test")):
        without_instruction = {e.prompt_text.removesuffix(f"\n{card.instruction}") for e in by_split[split].examples}
        assert not {key_hash(normalised(prompt)) for prompt in without_instruction} & by_split[later].prompts
    for example in by_split["test"].examples[:100]:
        json.dumps(example.metadata)
        sample = Sample(
            id=example.id,
            prompt=example.prompt_text,
            completion=rf"\boxed{{{example.answer}}}",
            ground_truth=example.answer,
            domain=example.domain,
            metadata=example.metadata,
        )
        assert reasoning_gym_answer(sample).verdict is Verdict.PASS
