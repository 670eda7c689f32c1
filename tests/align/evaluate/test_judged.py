"""Judged benchmarks against real HTTP servers that speak the chat completions API, some of them badly."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.errors import UserError
from align.evaluate.hooks import EvaluationError, Metrics, PolicyCheckpoint, check_ready, run
from align.evaluate.judge_benchmarks import AlignBenchQuestion, AlpacaEvalQuestion, MtBenchQuestion
from align.evaluate.judged import judge_template, with_references

from .judge_server import Reply, Server

MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 101, "category": "math", "turns": ["1+1?", "And 2+2?"], "reference": ["2", "4"]},
]
ALPACA_EVAL = [
    {"instruction": "Name a fruit", "output": "An apple is a fruit.", "generator": "reference"},
    {"instruction": "Name a tree", "output": "Oak"},
]
ALIGN_BENCH = [
    {"question_id": 1, "category": "数学计算", "subcategory": "初等数学", "question": "1+1=?", "reference": "2"},
    {"question_id": 2, "category": "文本写作", "subcategory": "实用文体写作", "question": "写信", "reference": "信"},
]


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(reply: Callable[[str], Reply], unsupported: Collection[str] = ()) -> Server:
        servers.append(Server(reply, unsupported))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def measure(checkpoint: PolicyCheckpoint, scripted: Any, tmp_path: Path) -> Callable[..., Metrics]:
    """Runs a benchmark with a policy that answers "Fig", unless told otherwise."""

    def measure(
        benchmark: str,
        rows: list[Any],
        url: str,
        judge: dict[str, Any] | None = None,
        policy: Callable[[str], str] = lambda prompt: "Fig",
        **params: Any,
    ) -> Metrics:
        questions = tmp_path / "questions.jsonl"
        questions.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        options = {"base_url": url, "model": "judge", "retries": 0, "timeout_s": 20} | (judge or {})
        given = {"benchmark": benchmark, "questions": questions, "judge": options, "max_new_tokens": 24} | params
        return run("judged", checkpoint, scripted(policy), given)

    return measure


def after_check(reply: Callable[[str], Reply]) -> Callable[[str], Reply]:
    """A judge that is well when it is asked for a word at the start."""
    return lambda prompt: "Yes." if prompt == "Say yes." else reply(prompt)


def test_mt_bench_rates_both_turns_and_means_by_category(serve: Any, measure: Callable[..., Metrics]) -> None:
    def judge(prompt: str) -> str:
        second = "Again." in prompt or "2+2" in prompt
        return f"Reasons [[3]].\nRating: [[{(8 if second else 6) + ('1+1' in prompt)}]]"

    server = serve(judge)
    metrics = measure("mt_bench", MT_BENCH, server.url)
    assert metrics.values == {
        "mt_bench/score": (6 + 8 + 7 + 9) / 4,
        "mt_bench/turn_1": 6.5,
        "mt_bench/turn_2": 8.5,
        "mt_bench/category/writing": 7.0,
        "mt_bench/category/math": 8.0,
        "mt_bench/unanswered": 0.0,
        "mt_bench/judgements": 4,
        "mt_bench/failed": 0.0,
        "mt_bench/unreadable": 0.0,
    }
    assert metrics.not_run == {}
    (second,) = [prompt for prompt in server.prompts if "2+2" in prompt]
    assert "User: 1+1?\n\nAssistant: Fig\n\nUser: And 2+2?\n\nAssistant: Fig" in second
    assert "<reference>\n4\n</reference>" in second
    assert not any("<reference>" in prompt for prompt in server.prompts if "Write." in prompt)
    assert {(row["id"], row["part"]) for row in metrics.rows} == {
        (id_, turn) for id_ in ("81", "101") for turn in ("turn 1", "turn 2")
    }


def test_a_judge_that_thinks_may_answer_in_parts(serve: Any, measure: Callable[..., Metrics]) -> None:
    parts = [{"type": "thinking", "thinking": [{"text": "[[2]]"}]}, {"type": "text", "text": "Rating: [[7]]"}]
    reply = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": parts}}]})
    assert measure("mt_bench", MT_BENCH, serve(lambda _: (200, reply)).url).values["mt_bench/score"] == 7.0


def test_questions_are_answered_at_the_temperature_of_their_category(
    serve: Any, checkpoint: PolicyCheckpoint, scripted: Any, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in MT_BENCH))
    fleet, judge = scripted(lambda prompt: "Fig"), {"base_url": serve(lambda prompt: "[[5]]").url, "model": "m"}
    given = {"benchmark": "mt_bench", "questions": questions, "judge": judge, "max_new_tokens": 9}
    run("judged", checkpoint, fleet, given)
    assert [options.temperature for options in fleet.calls] == [0.0, 0.7, 0.0, 0.7]


def test_alpaca_eval_asks_in_both_orders_so_that_a_judge_who_likes_the_first_says_a_tie(
    serve: Any, measure: Callable[..., Metrics]
) -> None:
    server = serve(lambda prompt: "[[A]]")
    metrics = measure("alpaca_eval", ALPACA_EVAL, server.url)
    assert metrics.values["alpaca_eval/win_rate"] == 0.5
    assert metrics.values["alpaca_eval/same_in_both_orders"] == 0.0
    asked = [re.findall(r"<answer_[ab]>\n(.*)\n</answer_[ab]>", prompt) for prompt in server.prompts[1:]]
    assert sorted(asked) == sorted(
        [["Fig", "Oak"], ["Oak", "Fig"], ["Fig", "An apple is a fruit."], ["An apple is a fruit.", "Fig"]]
    )


def test_alpaca_eval_counts_wins_of_the_policy(serve: Any, measure: Callable[..., Metrics]) -> None:
    def prefers(word: str) -> Callable[[str], str]:
        return lambda prompt: "[[A]]" if re.search(rf"<answer_a>\n{word}\n", prompt) else "[[B]]"

    for word, rate in (("Fig", 1.0), ("(Oak|An apple.*)", 0.0)):
        values = measure("alpaca_eval", ALPACA_EVAL, serve(prefers(word)).url).values
        assert values["alpaca_eval/win_rate"] == rate
        assert values["alpaca_eval/same_in_both_orders"] == 1.0
        assert abs(values["alpaca_eval/length_controlled_win_rate"] - rate) < 0.1
    assert values["alpaca_eval/longer_by"] == np.mean([3 - 20, 3 - 3])


def test_align_bench_scores_dimensions_and_means_over_categories(serve: Any, measure: Callable[..., Metrics]) -> None:
    def judge(prompt: str) -> str:
        overall = 4 if "写信" in prompt else 8
        names = re.findall(r"'(\w+)': 1到10", prompt)
        return "评价……\n" + str(dict.fromkeys(names, 6) | {"综合得分": overall})

    metrics = measure("align_bench", ALIGN_BENCH, serve(judge).url)
    values = {name.removeprefix("align_bench/"): value for name, value in metrics.values.items()}
    assert (values["reasoning"], values["language"], values["overall"]) == (8, 4, 6)
    assert (values["category/mathematics"], values["category/writing"]) == (8, 4)
    dimensions = {name.split("/")[1] for name in values if name.startswith("dimension/")}
    assert dimensions == {"factuality", "user_need", "coherence", "completeness", "creativity", "richness"}
    only_mathematics = measure("align_bench", ALIGN_BENCH, serve(judge).url, limit=1).values
    assert only_mathematics["align_bench/reasoning"] == 8
    assert not only_mathematics.keys() & {"align_bench/overall", "align_bench/language"}


def test_a_judgement_that_cannot_be_read_is_counted_and_never_a_zero(
    serve: Any, measure: Callable[..., Metrics]
) -> None:
    server = serve(lambda prompt: "I like it." if "Write." in prompt else "[[9]]")
    metrics = measure("mt_bench", MT_BENCH, server.url)
    assert metrics.values["mt_bench/score"] == 9.0
    assert metrics.values["mt_bench/unreadable"] == 0.5
    assert "mt_bench/category/writing" not in metrics.values
    assert metrics.not_run == {}
    assert [row["verdict"] for row in metrics.rows if row["category"] == "writing"] == [None, None]


def test_with_no_verdict_at_all_the_benchmark_is_not_run(serve: Any, measure: Callable[..., Metrics]) -> None:
    for benchmark, rows in (("mt_bench", MT_BENCH), ("alpaca_eval", ALPACA_EVAL), ("align_bench", ALIGN_BENCH)):
        metrics = measure(benchmark, rows, serve(lambda prompt: "No comment.").url)
        assert re.search(
            r"none of the \d judgements could be used; the first: .*No comment", metrics.not_run[benchmark]
        )
        assert metrics.values[f"{benchmark}/unreadable"] == 1.0
        assert not {"score", "win_rate", "overall"} & {name.split("/")[1] for name in metrics.values}
        assert all(row["completion"] == "Fig" for row in metrics.rows), "the answers are kept"


def test_a_judge_that_is_down_is_found_out_before_the_policy_is_asked(
    serve: Any, checkpoint: PolicyCheckpoint, scripted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    monkeypatch.setenv("THE_KEY", "sk-secret")
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(MT_BENCH[0]))
    wrong_key = serve(lambda prompt: (401, json.dumps({"error": {"message": "Incorrect API key provided: sk-secret"}})))
    no_model = serve(lambda prompt: (404, json.dumps({"error": {"message": "the model `m` does not exist"}})))
    no_api = serve(lambda prompt: (200, '{"hello": "world"}'))
    odd = [
        serve(lambda prompt, odd=odd: (200, f'{{"choices": {odd}}}'))
        for odd in (
            '[{"index": 0, "message": null}]',
            '[{"message": "hi"}]',
            '{"a": 1}',
            '[{"message": {"content": 7}}]',
        )
    ]
    no_json = serve(lambda prompt: (200, "<html>"))
    broken = serve(lambda prompt: (500, "oh"))
    slow = serve(lambda prompt: time.sleep(4) or "Yes.")
    for url, error, message in (
        (nobody, EvaluationError, "cannot be asked: Connection error"),
        (broken.url, EvaluationError, "cannot be asked: .*500"),
        (slow.url, EvaluationError, r"cannot be asked: no answer within judge\.timeout_s = 1\.5 s"),
        (wrong_key.url, UserError, "refuses: .*401.*check judge.base_url, judge.model and judge.api_key_env"),
        (no_model.url, UserError, "refuses: .*does not exist"),
        (no_api.url, UserError, "refuses: what it sent is no chat completion"),
        *((each.url, UserError, "refuses: what it sent is no chat completion") for each in odd),
        (no_json.url, UserError, "refuses: what it sent is no JSON"),
    ):
        fleet = scripted(lambda prompt: "Fig")
        judge = {"base_url": url, "model": "m", "api_key_env": "THE_KEY", "timeout_s": 1.5, "retries": 0}
        with pytest.raises(error, match=message) as caught:
            run("judged", checkpoint, fleet, {"benchmark": "mt_bench", "questions": questions, "judge": judge})
        assert not fleet.calls
        # And before the stage, in no more time than one attempt may take.
        patient = {"benchmark": "mt_bench", "questions": questions, "judge": judge | {"retries": 50}}
        started = time.monotonic()
        with pytest.raises(UserError, match="the judge 'm' at http") as before:
            check_ready("judged", patient)
        assert time.monotonic() - started < 4
        for found in (caught, before):
            assert "sk-secret" not in str(found.value)
            assert len(str(found.value).splitlines()) == 1
    fine = serve(lambda prompt: "Yes.")
    check_ready("judged", patient | {"judge": judge | {"base_url": fine.url}})
    assert fine.prompts == ["Say yes."]
    questions.write_text("{}")
    with pytest.raises(UserError, match=r"questions\.jsonl, line 1: question_id: Field required"):
        check_ready("judged", patient | {"judge": judge | {"base_url": fine.url}})


def test_the_key_comes_from_the_named_variable_and_from_no_other(
    serve: Any, measure: Callable[..., Metrics], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-somebody-elses")
    monkeypatch.setenv("THE_KEY", "sk-secret")
    caplog.set_level("DEBUG")
    server = serve(lambda prompt: "[[5]]")
    with pytest.raises(UserError, match="the environment variable OTHER_KEY is not set"):
        measure("mt_bench", MT_BENCH, server.url, {"api_key_env": "OTHER_KEY"})
    measure("mt_bench", MT_BENCH, server.url)
    assert server.keys == {"Bearer none"}
    metrics = measure("mt_bench", MT_BENCH, server.url, {"api_key_env": "THE_KEY"})
    assert server.keys == {"Bearer none", "Bearer sk-secret"}
    assert "sk-" not in caplog.text + str(metrics)


def test_a_judge_that_reasons_is_asked_with_the_parameters_that_it_takes(
    serve: Any, measure: Callable[..., Metrics]
) -> None:
    server = serve(lambda prompt: "[[5]]", unsupported=("temperature", "max_tokens"))
    assert measure("mt_bench", MT_BENCH, server.url).values["mt_bench/score"] == 5.0
    assert server.last.keys() == {"model", "messages", "max_completion_tokens"}
    plain = serve(lambda prompt: "[[5]]")
    measure("mt_bench", MT_BENCH, plain.url)
    assert plain.last.keys() == {"model", "messages", "max_tokens", "temperature"}


def test_passing_failures_are_tried_again(serve: Any, measure: Callable[..., Metrics]) -> None:
    failed: set[str] = set()

    def judge(prompt: str) -> Reply:
        if prompt in failed:
            return "[[5]]"
        failed.add(prompt)
        return 503, "busy"

    metrics = measure("mt_bench", MT_BENCH, serve(judge).url, {"retries": 2})
    assert metrics.values["mt_bench/score"] == 5.0
    assert metrics.values["mt_bench/failed"] == 0.0


def test_slow_and_refused_judgements_are_counted_apart(serve: Any, measure: Callable[..., Metrics]) -> None:
    over = threading.Event()

    def judge(prompt: str) -> Reply:
        if "Again." in prompt:
            over.wait(60)
        return (400, json.dumps({"error": {"message": "not that"}})) if "2+2" in prompt else "[[7]]"

    metrics = measure("mt_bench", MT_BENCH, serve(after_check(judge)).url, {"timeout_s": 3})
    over.set()
    assert metrics.values["mt_bench/failed"] == 0.5
    assert metrics.values["mt_bench/score"] == metrics.values["mt_bench/turn_1"] == 7.0
    errors = [row["error"] for row in metrics.rows]
    assert sum("timed out" in error for error in errors) == sum("not that" in error for error in errors) == 1


def test_a_judge_that_dies_is_not_asked_for_ever(serve: Any, measure: Callable[..., Metrics]) -> None:
    server = serve(after_check(lambda prompt: (500, "oh")))
    rows = [{"instruction": f"Question {i}", "output": "a"} for i in range(30)]
    metrics = measure("alpaca_eval", rows, server.url, {"concurrency": 2})
    assert len(server.prompts) <= 1 + 10 + 2
    assert metrics.values["alpaca_eval/failed"] == 1.0
    assert "500" in metrics.not_run["alpaca_eval"]
    assert "not asked: the judge had failed 1" in metrics.rows[-1]["error"]


def test_a_judge_that_fails_now_and_then_is_asked_on(serve: Any, measure: Callable[..., Metrics]) -> None:
    numbers = iter(range(1000))
    server = serve(after_check(lambda prompt: "[[C]]" if next(numbers) % 2 else (500, "oh")))
    rows = [{"instruction": f"Question {i}", "output": "a"} for i in range(15)]
    metrics = measure("alpaca_eval", rows, server.url, {"concurrency": 1})
    assert len(server.prompts) == 1 + 30
    assert metrics.values["alpaca_eval/failed"] == 0.5


def test_no_more_requests_at_one_time_than_allowed(serve: Any, measure: Callable[..., Metrics]) -> None:
    def judge(prompt: str) -> str:
        time.sleep(0.05)
        return "[[C]]"

    server = serve(judge)
    rows = [{"instruction": f"Question {i}", "output": "a"} for i in range(8)]
    measure("alpaca_eval", rows, server.url, {"concurrency": 3})
    assert server.busiest == 3


@pytest.mark.parametrize(
    ("benchmark", "row", "message"),
    [
        ("mt_bench", {"question_id": 1, "category": "math"}, r"questions\.jsonl, line 2: turns: Field required"),
        ("mt_bench", {"question_id": 1, "category": "math", "turns": ["a"]}, r"line 2: turns"),
        ("alpaca_eval", {"instruction": "a", "output": 5}, r"line 2: output: .*string"),
        ("align_bench", ALIGN_BENCH[0] | {"category": "数学"}, r"line 2: category: .*'数学' is none of .*数学计算"),
    ],
)
def test_a_question_that_cannot_be_used_is_named_by_its_line(
    benchmark: str, row: dict[str, Any], message: str, measure: Callable[..., Metrics]
) -> None:
    good = {"mt_bench": MT_BENCH, "alpaca_eval": ALPACA_EVAL, "align_bench": ALIGN_BENCH}[benchmark][0]
    with pytest.raises(UserError, match=message):
        measure(benchmark, [good, row], "http://127.0.0.1:1/v1")


def test_a_conversation_that_may_not_fit_is_refused_at_once(serve: Any, measure: Callable[..., Metrics]) -> None:
    with pytest.raises(
        UserError, match=r"question 81 with two answers of 260 tokens does not fit into rollout\.max_length"
    ):
        measure("mt_bench", MT_BENCH, serve(lambda prompt: "[[5]]").url, max_new_tokens=260)


def test_a_template_of_the_users_own_takes_the_place_of_ours(
    serve: Any, measure: Callable[..., Metrics], tmp_path: Path
) -> None:
    template = tmp_path / "template.txt"
    template.write_text("For $$5: rate {this}.\n$conversation")
    server = serve(lambda prompt: "[[5]]")
    measure("mt_bench", MT_BENCH[:1], server.url, template=template)
    assert "For $5: rate {this}.\nUser: Write.\n\nAssistant: Fig" in server.prompts


@pytest.mark.parametrize(
    ("text", "rating"),
    [("[[7]]", 7), ("[[3]] or rather [[ 8.5 ]]", 8.5), ("[7]", None), ("[[11]]", None), ("[[0]]", None), ("", None)],
)
def test_ratings_are_read(text: str, rating: float | None) -> None:
    assert MtBenchQuestion(**MT_BENCH[0]).read(text) == rating


def test_choices_and_dimensions_are_read() -> None:
    assert [AlpacaEvalQuestion(**ALPACA_EVAL[0]).read(text) for text in ("[[A]] no, [[B]]", "[[C]]", "A", "[[D]]")] == [
        "B",
        "C",
        None,
        None,
    ]
    question = AlignBenchQuestion(**ALIGN_BENCH[0])
    said = "事实正确性: 2\n{'事实正确性': 7, \"满足用户需求\"： 6.5, '逻辑连贯性': 6, '完备性': 5, '综合得分': 8}"
    assert question.read(said) == dict(zip(question.scored, (7, 6.5, 6, 5, 8), strict=True))
    for wrong in (
        said.replace("逻辑连贯性", "创造性"),
        said.replace("综合得分", ""),
        said.replace("'完备性': 5", "'完备性': 50"),
    ):
        assert question.read(wrong) is None


def test_references_are_read_from_the_file_that_fastchat_publishes(tmp_path: Path) -> None:
    file = tmp_path / "gpt-4.jsonl"
    line = {
        "question_id": 81,
        "model_id": "gpt-4",
        "choices": [{"index": 0, "turns": ["Well.", "Better."]}],
        "tstamp": 1.0,
    }
    file.write_text(json.dumps(line))
    first, second = with_references([MtBenchQuestion(**question) for question in MT_BENCH], file)
    assert (first.reference, second.reference) == (["Well.", "Better."], ["2", "4"])
    with pytest.raises(UserError, match=r"gpt-4\.jsonl: it has no answer to any of the questions"):
        with_references([MtBenchQuestion(**MT_BENCH[1])], file)
    with pytest.raises(UserError, match="references are for mt_bench alone"):
        with_references([AlpacaEvalQuestion(**ALPACA_EVAL[0])], file)
    file.write_text(json.dumps(line | {"choices": []}))
    with pytest.raises(UserError, match=r"gpt-4\.jsonl, line 1: choices: "):
        with_references([MtBenchQuestion(**MT_BENCH[0])], file)


def test_a_template_must_have_what_is_judged_and_nothing_unknown(tmp_path: Path) -> None:
    template = tmp_path / "template.txt"
    for text, message in (
        ("Rate it.", r"has no \$conversation"),
        ("$conversation $answer", r"uses \$answer\. Its placeholders are \$conversation, \$reference"),
        ("$conversation for 5 $", "begins no placeholder"),
    ):
        template.write_text(text)
        with pytest.raises(UserError, match=message):
            judge_template("mt_bench", template)
