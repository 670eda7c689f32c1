"""What a judge is told and what is read in its judgement."""

from pathlib import Path

import pytest

from align.errors import UserError
from align.evaluate.judge_texts import judge_template, read_choice, read_dimensions, read_rating


@pytest.mark.parametrize(
    ("text", "rating"),
    [("[[7]]", 7), ("[[3]] or rather [[ 8.5 ]]", 8.5), ("[7]", None), ("[[11]]", None), ("[[0]]", None), ("", None)],
)
def test_ratings_are_read(text: str, rating: float | None) -> None:
    assert read_rating(text) == rating


def test_choices_and_dimensions_are_read() -> None:
    assert [read_choice(text) for text in ("[[A]] no, [[B]]", "[[C]]", "A", "[[D]]")] == ["B", "C", None, None]
    text = "清晰度: 2\n{'清晰度': 7, \"完备性\"： 6.5, '综合得分': 8}"
    assert read_dimensions(text, ["清晰度", "完备性"]) == {"清晰度": 7, "完备性": 6.5, "综合得分": 8}
    assert read_dimensions(text, ["清晰度", "创造性"]) is None
    assert read_dimensions("{'清晰度': 7}", ["清晰度"]) is None
    assert read_dimensions("{'清晰度': 70, '综合得分': 8}", ["清晰度"]) is None


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
