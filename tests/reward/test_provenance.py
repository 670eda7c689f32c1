"""Marked texts answer a template's questions as plain ones do, and every character of a rendering keeps its author."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.provenance import ASSISTANT, OTHERS, TEMPLATE, render_with_authors

texts = st.text(alphabet="ab# \n", max_size=12)
EXPRESSIONS = [
    "'ab' in x",
    "x == 'ab'",
    "x != 'ab'",
    "x.startswith('a')",
    "x.startswith(('b', '#'))",
    "x.endswith('a\n')",
    "x.find('ab')",
    "x.rfind('ab')",
    "x.count('a')",
    "x.split('ab') | join('|')",
    "x.split('a', 1) | join('|')",
    "x.split() | join('|')",
    "x.rsplit('ab', 1) | join('|')",
    "x.partition('#') | join('|')",
    "x.rpartition('a') | join('|')",
    "x.splitlines() | join('|')",
    "x | trim",
    "x.strip('a')",
    "x.lstrip('\n')",
    "x.rstrip('b#')",
    "x | replace('ab', 'c')",
    "x[1:]",
    "('a' + x).split('ab')[0]",
    "(x + 'b').split('ab')[-1]",
    "('a' ~ x).split('ab')[-1] | trim",
    "x | length",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
@given(text=texts)
def test_a_question_has_the_same_answer(expression: str, text: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = f"{{% set x = messages[0].content %}}[{{{{ {expression!s} }}}}]"
    messages: Any = [{"role": "user", "content": text}]
    plain = render_jinja_template([messages], chat_template=template, add_generation_prompt=False)[0][0]
    assert render_with_authors(template, messages, add_generation_prompt=False)[0] == plain


def test_every_character_keeps_its_author() -> None:
    template = (
        "{% macro shown(x) %}{{ x }}{% endmacro %}"
        "{% for m in messages %}<{{ m.role ~ ':' + shown(m.content).split('/')[-1] | trim }}>{% endfor %}"
    )
    messages = [{"role": "user", "content": "a/ b\n"}, {"role": "assistant", "content": "c"}]
    text, author = render_with_authors(template, messages)
    assert text == "<user:b><assistant:c>"
    assert [place for place in range(len(text)) if author(place) == OTHERS] == [text.index("b")]
    assert [place for place in range(len(text)) if author(place) == ASSISTANT] == [text.index(":c") + 1]
    assert author(0) == TEMPLATE


def test_a_content_of_private_characters_is_no_other_than_others() -> None:
    text, author = render_with_authors(
        "{{ messages[0].content }}.", [{"role": "user", "content": "\U000f0001a\U0010fffd"}]
    )
    assert text == "\U000f0001a\U0010fffd."
    assert [author(place) for place in range(4)] == [OTHERS, OTHERS, OTHERS, TEMPLATE]
