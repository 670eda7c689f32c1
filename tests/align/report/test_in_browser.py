"""The page in a real browser: it runs from a file, asks for nothing, and does what its controls say."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.report import write_report
from align.report.serve import LiveReport, Server
from align.run import RunDirectory, write_samples

EVIL = "</script><script>document.title='taken'</script><img src=http://evil.invalid/x onerror=alert(1)>"


@pytest.fixture
def page(browser: Any, write_run: Callable[..., Path], sample_row: Callable[..., Any]) -> Path:
    """The report on a small run, with hostile texts among its own, open in the browser."""
    rows = {}
    for step in (1, 2, 3):
        told = {"prompt": f"{EVIL} {step}", "detail": EVIL, "domain": "math"}
        rows[step] = [sample_row(f"{step}+{i}=2", i / 10, id=f"step{step}/{i}", **told) for i in range(8)]
        rows[step][6] |= {"sampled": [True, False, True, True, True, True]}
        rows[step][7] |= {"domain": "code"}
        rows[step].append(sample_row("2", None, id=f"step{step}/masked"))
    load = {f"expert_load/layer_{layer}/max": layer / 10 for layer in range(12)}
    root = write_run(
        metrics=[
            {"step": s, "stage": "grpo", "time": s, "loss": 1 / s, "agreement/mean": 10.0**-s, "kl": 0, EVIL: s}
            | {name: value * (s > 1) for name, value in load.items()}
            for s in range(1, 101)
        ],
        events=[{"time": 1.0, "kind": "warning", "message": EVIL}],
        evaluations=[
            ({"name": "after GRPO", "step": 100, "problems": 1, "accuracy": 1.0}, [sample_row(EVIL, 1.0, greedy=True)])
        ],
        samples=rows,
    )
    path = write_report(root)
    browser.open(path)
    return path


def cards(browser: Any) -> list[str]:
    found: list[str] = browser.js("[...document.querySelectorAll('.sample header')].map((h) => h.textContent)")
    return found


def test_it_asks_for_nothing_and_complains_of_nothing(browser: Any, page: Path) -> None:
    assert browser.js("document.querySelectorAll('.sample').length") == 25
    assert browser.js("document.title") == "run"
    assert browser.js("document.querySelectorAll('img').length") == 0
    browser.js("new Promise((done) => setTimeout(() => done(1), 200))")
    assert browser.requests == [page.as_uri()]
    assert browser.complaints == []


def test_its_policy_refuses_what_gets_in_all_the_same(browser: Any, page: Path) -> None:
    browser.js("document.body.append(Object.assign(document.createElement('img'), {src: 'http://evil.invalid/x'})), 1")
    browser.js("document.body.append(Object.assign(document.createElement('script'), {text: 'window.taken = 1'})), 1")
    browser.wait("document.images[0].complete")
    assert browser.js("window.taken") is None
    refused = [note["entry"]["text"] for note in browser.complaints if "entry" in note]
    assert len(refused) == 2
    assert all("Content Security Policy" in text for text in refused)


def test_samples_are_filtered(browser: Any, page: Path) -> None:
    browser.enter("samples-verdict", "pass")
    assert len(cards(browser)) == 3 * 2 + 1
    assert all(card.startswith("pass") for card in cards(browser))
    browser.enter("samples-first_step", "2")
    browser.enter("samples-last_step", "2")
    assert len(cards(browser)) == 2
    browser.enter("samples-verdict", "")
    browser.enter("samples-low", "0.3")
    browser.enter("samples-high", "0.4")
    assert sorted(card.partition("step2/")[2] for card in cards(browser)) == ["3 #0", "4 #0"]
    for field in ("first_step", "last_step", "low", "high"):
        browser.enter(f"samples-{field}", "")
    browser.enter("samples-text", "STEP3/MASKED")
    assert len(cards(browser)) == 1
    browser.enter("samples-text", "")
    browser.enter("samples-masked", True)
    assert len(cards(browser)) == 3
    assert "3 of 28 samples match" in browser.js("document.getElementById('samples-count').textContent")
    browser.enter("samples-masked", False)
    browser.enter("samples-domain", "code")
    assert len(cards(browser)) == 3
    browser.enter("samples-domain", "")
    browser.enter("samples-from", "after GRPO (grpo)")
    assert len(cards(browser)) == 1
    assert browser.complaints == []


def test_samples_are_sorted_and_those_without_the_number_stand_last(browser: Any, page: Path) -> None:
    browser.enter("samples-from", "training (grpo)")
    browser.js("document.getElementById('more').click()")
    for order, ends in (("reward_low", ("reward 0", "reward 0.7")), ("reward_high", ("reward 0.7", "reward 0"))):
        browser.enter("samples-order", order)
        browser.js("document.getElementById('more').click()")
        found = cards(browser)
        assert len(found) == 27
        assert ends[0] in found[0]
        assert ends[1] in found[23]
        assert all(card.startswith("infra_error") for card in found[24:])


def test_a_token_under_the_pointer_says_its_probability(browser: Any, page: Path) -> None:
    browser.enter("samples-text", "step1/5")
    assert browser.js("document.querySelector('.completion').textContent") == "1+5=2<｜end▁of▁sentence｜>"
    kinds = browser.js("[...document.querySelectorAll('.token')].map((t) => t.className)")
    assert kinds == ["token p0", "token p1", "token p2", "token p2", "token p3", "token p3 special"]
    browser.enter("samples-text", "step1/6")
    kinds = browser.js("[...document.querySelectorAll('.token')].map((t) => t.className)")
    assert kinds[:3] == ["token p0", "token given", "token p2"]
    browser.enter("samples-text", "step1/5")
    browser.point("document.querySelectorAll('.token')[1]")
    assert browser.js("getComputedStyle(document.getElementById('tip')).visibility") == "visible"
    assert browser.js("document.getElementById('tip').textContent") == (
        '"+"\ntoken 2: log-probability -0.5, probability 0.6065\nadvantage 0'
    )


def test_curves_say_the_values_of_the_step_under_the_pointer(browser: Any, page: Path) -> None:
    read = "['figcaption span', '.legend'].map((part) => panel.querySelector(part).textContent).join(': ')"
    values = f"[...document.querySelectorAll('.panel')].slice(0, 2).map((panel) => {read})"
    assert browser.js(values)[0] == "last: loss 0.01"
    loss = "document.querySelector('.panel svg')"
    # The plot begins at 48 and ends at 350 of 360 units, for steps 1 to 100.
    browser.point(loss, across=(48 + 302 * 49 / 99) / 360)
    first, second = browser.js(values)
    assert first == "step 50: loss 0.02"
    assert second == "log scale, step 50: mean 1e-50"
    browser.js(f"{loss}.focus(), 1")
    browser.press("ArrowRight")
    assert browser.js(values)[0] == "step 51: loss 0.01961"
    browser.point("document.querySelector('h1')")
    assert browser.js(values)[0] == "last: loss 0.01"


def test_of_many_curves_the_nearest_is_named(browser: Any, page: Path) -> None:
    last = "[...document.querySelectorAll('.panel')].find((p) => p.innerText.includes('expert_load'))"
    assert "12 lines, 0 to 1.1" in browser.js(f"{last}.innerText")
    browser.point(f"{last}.querySelector('svg')", across=0.6)
    assert "layer_5 0.5" in browser.js(f"{last}.innerText")
    assert browser.js(f"{last}.querySelectorAll('.near').length") == 1


def test_a_metric_with_one_value_is_a_number(browser: Any, page: Path) -> None:
    kl = "[...document.querySelectorAll('.panel')].at(-1)"  # after the curves
    assert browser.js(f"{kl}.textContent") == "KL to the reference (nats)steps 1 to 100kl 0"
    assert browser.js(f"{kl}.querySelectorAll('svg').length") == 0


def test_smoothing_draws_the_raw_curve_behind_the_smooth_one(browser: Any, page: Path) -> None:
    assert browser.js("document.querySelectorAll('.panel .raw').length") == 0
    browser.enter("smoothing", "0.9")
    assert browser.js("document.querySelector('.panel').querySelectorAll('path').length") == 2
    assert browser.complaints == []


def test_a_telephone_needs_no_sideways_scrolling(browser: Any, page: Path) -> None:
    browser.open(page, width=400)
    assert browser.js("document.documentElement.scrollWidth") <= 400
    assert browser.js("[...document.querySelectorAll('table')].every((table) => table.closest('.scroll'))")
    assert browser.js("document.querySelector('.panel').getBoundingClientRect().width") > 300


def test_thoughts_calls_and_turns_are_told_apart(
    browser: Any, write_run: Callable[..., Path], sample_row: Callable[..., Any]
) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": f"<think>{EVIL}", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": EVIL},
        *({"role": "user", "content": f"message {i}"} for i in range(8)),
    ]
    row = sample_row("so</think> 3 <tool_call>{}</tool_call>", 1.0, metadata=json.dumps({"messages": asked}))
    bare = sample_row("<think>why</think>4", 1.0, id="bare", token_ids=None)
    count = len(row["token_ids"])
    several = sample_row("a b", 1.0, id="several")
    several |= {"turns": [{"start": 0, "end": 1}, {"start": 2, "end": 3}], "sampled": [True, False, True, *[False] * 9]}
    several["sampled"] = several["sampled"][: len(several["token_ids"])]
    browser.open(write_report(write_run(samples={1: [row, bare, several]})))
    card = "[...document.querySelectorAll('.sample')].find((card) => card.textContent.includes('%s'))"

    def turns(id_: str) -> list[list[str]]:
        found: list[list[str]] = browser.js(
            f"[...{card % id_}.querySelectorAll('.turn')].map((turn) => [...turn.children].map((part) => part.textContent))"
        )
        return found

    def parts(id_: str) -> list[list[str]]:
        found: list[list[str]] = browser.js(
            f"[...{card % id_}.querySelectorAll('.part')].map((part) => [part.dataset.kind, part.textContent])"
        )
        return found

    assert [who for who, _ in turns("problem/1")] == ["system", "assistant", "tool (add)", *["user"] * 8, "assistant"]
    assert parts("problem/1") == [
        ["thought", f"<think>{EVIL}"],
        ["tool call", 'add({"a": 1})'],
        ["thought", "so</think>"],
        ["tool call", "<tool_call>{}</tool_call>"],
    ]
    assert browser.js(f"{card % 'problem/1'}.querySelector('details').textContent").startswith("5 more messages")
    assert browser.js(f"{card % 'problem/1'}.querySelectorAll('.token').length") == count
    assert parts("bare") == [["thought", "<think>why</think>"]]
    assert [who for who, _ in turns("several")] == [
        "user",
        "assistant, turn 1 of 2",
        "environment",
        "assistant, turn 2 of 2",
        *["environment"] * (len(several["token_ids"]) > 3),
    ]
    assert browser.js("document.images.length + document.querySelectorAll('script').length") == 2
    assert browser.complaints == []


def test_tokens_have_the_colour_of_what_is_chosen(
    browser: Any, write_run: Callable[..., Path], sample_row: Callable[..., Any]
) -> None:
    row = sample_row("1+1=2", 1.0, advantage=-0.7, log_probs=[-1.0] * 6, sampled=[True, False, True, True, True, True])
    row["learner_log_probs"] = [-1.0, 0.0, -0.98, -1.2, -1.6, -0.1]
    row["weight_versions"] = [{"start": 0, "version": 4}, {"start": 3, "version": 5}]
    browser.open(write_report(write_run(samples={1: [row, sample_row("2", 0.0, advantage=float("nan"))]})))
    expected = {
        "log_prob": ["p2", "given", "p2", "p2", "p2", "p2"],
        "difference": ["p0", "given", "more1", "less2", "less3", "more3"],
        "advantage": ["less2", "given", *["less2"] * 4],
        "version": ["w0", "given", "w0", "w1", "w1", "w1"],
    }
    classes = "[...card.querySelectorAll('.token')].map((token) => token.className.split(' ')[1])"
    of_text = "[...document.querySelectorAll('.sample')].find((card) => card.textContent.includes('%s'))"
    for name, colours in expected.items():
        browser.enter("samples-colour", name)
        assert browser.js(f"((card) => {classes})({of_text % '1+1=2'})") == colours
        legend = browser.js("[...document.querySelectorAll('#samples-legend span')].map((part) => part.className)")
        assert {colour for colour in colours if colour != "given"} <= set(legend)
    # What is not known of a sample colours none of its tokens.
    assert browser.js(f"((card) => {classes})({of_text % 'ground truth: 2 · exact_answer 0'})") == ["given", "given"]
    browser.point("document.querySelectorAll('.token')[0]", across=0.4)
    told = browser.js("document.getElementById('tip').textContent")
    assert "learner − sampler: 0 nats\nadvantage -0.7\nweight version 4" in told
    browser.point("document.querySelectorAll('.token')[1]")
    assert browser.js("document.getElementById('tip').textContent") == '"+"\ntoken 2: not sampled'
    assert browser.complaints == []


def test_the_live_page_follows_the_run(
    browser: Any, write_run: Callable[..., Path], sample_row: Callable[..., Any]
) -> None:
    root = write_run(tokenizer=False)
    run = RunDirectory(root)
    server = Server(LiveReport(root), 0)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    text = "document.body.innerText"
    try:
        browser.open(server.address)
        assert "This run holds no samples yet." in browser.js(text)
        assert "This run has no metrics yet." in browser.js(text)
        for step in (1, 2):
            with run.metrics_file.open("a") as file:
                file.write(json.dumps({"step": step, "loss": 7 - step, EVIL: 1}) + "\n")
            write_samples(run.samples_file(step), [sample_row(f"{step}{EVIL}", i / 10) for i in range(3)])
            browser.wait(f"{text}.includes('loss {7 - step}') && {text}.includes('step {step}: 1 to 3 of 3 samples')")
            browser.wait(f"document.querySelectorAll('.sample').length === 3 && {text}.includes('{step}</script>')")
        with run.events_file.open("a") as file:
            file.write(json.dumps({"time": 1.0, "kind": "warning", "message": f"entropy fell {EVIL}"}) + "\n")
        browser.js("live.ask()")  # rather than wait until it does so by itself
        browser.wait("document.getElementById('tiles').innerText.includes('the last: entropy fell')")
        assert "entropy fell" in browser.js("document.getElementById('events').innerText")
        # What one has chosen stays: a step, the order, the smoothing, the step that is pointed at, what is open.
        browser.enter("samples-source", "grpo, step 1")
        browser.wait(f"{text}.includes('step 1: 1 to 3 of 3 samples')")
        browser.enter("samples-order", "reward_high")
        browser.enter("smoothing", "0.5")
        browser.js("document.querySelector('#settings details').open = true")
        browser.js("document.querySelector('.panel svg').focus(), 1")
        browser.press("ArrowLeft")
        with run.metrics_file.open("a") as file:
            file.write('{"step": 3, "loss": 4.5, "experts/layer_1/cv": 0.1}\n')
        write_samples(run.samples_file(3), [sample_row("3", 1.0)])
        browser.js("live.ask()")
        browser.wait("[...document.querySelectorAll('h2')].some((head) => head.textContent === 'Expert load')")
        browser.wait("document.querySelectorAll('#samples-source option').length === 4")
        assert "step 1: 1 to 3 of 3 samples" in browser.js(text)
        assert browser.js("document.getElementById('samples-order').value") == "reward_high"
        assert browser.js("document.getElementById('smoothing').value") == "0.5"
        assert browser.js("document.querySelector('#settings details').open")
        assert browser.js("document.querySelector('.panel figcaption span').textContent") == "step 1"
        assert browser.js("document.activeElement === document.querySelector('.panel svg')")
        assert browser.js("document.querySelectorAll('img').length") == 0
        assert browser.complaints == []
        assert all(url.startswith(server.address) for url in browser.requests)
    finally:
        server.shutdown()
        server.server_close()
    browser.js("live.ask()")
    browser.wait("document.getElementById('live').innerText.startsWith('Not up to date: no answer')")
