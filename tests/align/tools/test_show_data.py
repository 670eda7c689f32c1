"""`align data`: what is in data, how a run would read them, and what it would refuse."""

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.cli import EXIT_USER_ERROR, main
from align.data.types import Example
from align.model.policy import load_tokenizer
from align.tools.show_data import encoded, nearest_rank, seen_by_model, show_data

from ..rows import Rows, chats, write_rows

NANO = "recipes/nano/policy"


def written(tmp_path: Path, rows: Rows) -> str:
    return str(write_rows(tmp_path / "mine.jsonl", rows))


def shown(name: str, model: str | None = None) -> str:
    console = Console(width=200, force_terminal=False)
    with console.capture() as captured:
        show_data(name, model, console)
    return captured.get()


def problems(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"p{n}", "question": f"What is {n} + 1?", "answer": f"so\n#### {n + 1}", "unit": "cm"}
        for n in range(count)
    ]


def lines(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_columns_and_counts_of_a_file(tmp_path: Path) -> None:
    text = shown(written(tmp_path, problems(40)))
    assert "mine.jsonl: for grpo, eval" in text
    assert lines(text, "form: problem")
    for column, use in (
        ("question", "prompt"),
        ("answer", "ground truth, and for rewards"),
        ("id", "id, and for rewards"),
        ("unit", "sample.metadata, for rewards"),
    ):
        [line] = lines(text, f" {column} ", " 40 ")
        assert line.rstrip().endswith(use)
    counts = [int(lines(text, f" {split} ")[0].split()[1]) for split in ("train", "validation", "test")]
    assert sum(counts) == 40
    assert "nothing of it is trained on" in text


def test_what_is_trained_on_is_marked_in_the_model_s_own_tokens(tmp_path: Path) -> None:
    text = shown(written(tmp_path, chats(30)), NANO)
    first = text[text.index("as the model sees it:") :]
    assert re.search(r"User: Say (\d+)\.\n\nAssistant:⟦ It is \1\.<｜end▁of▁sentence｜>⟧", first)
    tokenizer = load_tokenizer(NANO)
    example = Example("a", ({"role": "user", "content": "Say 0."},), "It is 0.", None, "user")
    seen = encoded(example, tokenizer)[0]
    assert (
        tokenizer.decode([i for i, t in zip(seen.token_ids, seen.trained_on, strict=True) if t])
        .strip()
        .startswith("It is 0.")
    )
    assert "Assistant:⟦ It is 0.<｜end▁of▁sentence｜>⟧" in seen_by_model(seen).plain
    [line] = lines(text, " all ")
    assert [int(number) for number in line.split()[1:]][-1] < 60


@pytest.mark.parametrize(
    ("row", "column", "use"),
    [
        ({"prompt": "Hi {}.", "chosen": "A", "rejected": "B"}, "system_prompt", "system message"),
        ({"instruction": "Hi {}.", "chosen": "A", "rejected": "B"}, "instruction", "prompt"),
        ({"prompt": "Hi {}.", "chosen": "A", "rejected": "B"}, "unit", "for rewards of DPO's evaluation"),
        ({"instruction": "Hi {}.", "output": "A"}, "system", "system message"),
        ({"prompt": "Hi {}."}, "system_prompt", "system message, and for rewards"),
    ],
)
def test_a_column_is_said_to_be_what_it_is_read_as(row: dict[str, str], column: str, use: str, tmp_path: Path) -> None:
    rows = [{column: "Be brief."} | {name: text.format(n) for name, text in row.items()} for n in range(9)]
    [line] = lines(shown(written(tmp_path, rows)), f" {column} ", " 9 ")
    assert line.rstrip().endswith(f"  {use}")


def test_pairs_are_shown_with_both_completions(tmp_path: Path) -> None:
    text = shown(written(tmp_path, [{"prompt": f"Say {n}.", "chosen": "Good.", "rejected": "Bad."} for n in range(9)]))
    assert "mine.jsonl: for reward_model" in text
    assert "chosen: ⟦Good.⟧\nrejected: Bad." in text


def test_a_conversation_that_ends_by_asking_is_shown_whole(tmp_path: Path) -> None:
    rows = [{"messages": [*row["messages"], {"role": "user", "content": "And?"}]} for row in chats(9)]
    assert re.search(r"user: Say (\d)\.\nassistant: ⟦It is \1\.⟧\nuser: And\?", shown(written(tmp_path, rows)))


def test_without_a_model_every_turn_that_is_trained_on_is_marked(tmp_path: Path) -> None:
    more = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "No.", "weight": 0}]
    last = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rows = [{"messages": [*row["messages"], *more, *last]} for row in chats(9)]
    marked = r"assistant: ⟦It is \d\.⟧\nuser: And\?\nassistant: No\.\nuser: Why\?\nassistant: ⟦So\.⟧\n"
    assert re.search(marked, shown(written(tmp_path, rows)))


def test_repeated_prompts_are_counted(tmp_path: Path) -> None:
    other = [row | {"id": f"other{n}", "answer": "5"} for n, row in enumerate(problems(20)[:3])]
    same = [row | {"id": f"same{n}"} for n, row in enumerate(problems(20)[:2])]
    assert "5 of 25 rows have the prompt of another, 2 of them its answer too" in shown(
        written(tmp_path, problems(20) + other + same)
    )
    assert "no prompt comes twice" in shown(written(tmp_path, problems(20)))


def test_rows_that_would_be_refused_are_listed(tmp_path: Path) -> None:
    text = shown(written(tmp_path, [*problems(20), {"question": "", "answer": "1"}, *problems(1)]))
    assert "2 rows cannot be used:" in text
    assert lines(text, "line 21: ", "is empty")
    assert lines(text, "line 22: the id 'p0' is already that of")


def test_a_first_row_that_would_be_refused_is_listed_as_any_other(tmp_path: Path) -> None:
    text = shown(written(tmp_path, [{"messages": [{"role": "bot", "content": "x"}]}, *chats(20)]))
    assert lines(text, "line 1: ", "unknown role 'bot'")
    assert lines(text, "messages", "21", "conversation")


def test_rows_that_the_template_refuses_are_listed(tmp_path: Path) -> None:
    rows = [*chats(20), {"messages": [{"role": "tool", "content": "x"}]}]
    rows[5] = {"messages": [{"role": "developer", "content": "Be brief."}, *rows[5]["messages"]]}
    text = shown(written(tmp_path, rows), NANO)
    assert "1 rows cannot be used:" in text
    assert "1 rows of 20 that were encoded are refused by the model's template or tokenizer:" in text


def test_text_of_data_moves_no_cursor_and_is_no_markup(tmp_path: Path) -> None:
    rows = [{"prompt": f"[bold]{n}[/x] \x1b[2J", "answer": "1"} for n in range(9)]
    text = shown(written(tmp_path, rows))
    assert "\x1b[2J" not in text
    assert "[bold]" in text


@pytest.mark.parametrize(("share", "found"), [(0.95, 95), (1.0, 100), (0.001, 1)])
def test_a_length_that_a_share_of_rows_does_not_exceed(share: float, found: int) -> None:
    assert nearest_rank(list(range(100, 0, -1)), share) == found


def test_cards_are_shown_and_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    assert "nano_math" in capfd.readouterr().out
    assert "data card nano_chat: for sft, grpo, eval" in shown("nano_chat")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nano_maths", "did you mean 'nano_math'"),
        ("none.jsonl", "none.jsonl does not exist"),
        ("none/*.csv", "no file has a name of this pattern"),
    ],
)
def test_what_is_not_there_is_named(name: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", name]) == EXIT_USER_ERROR
    assert message in capfd.readouterr().err
