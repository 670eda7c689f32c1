"""What a judge is told for each benchmark, and how its judgement is read.

The wording is our own, so that numbers compare between policies judged by the same judge, not with published tables; a
template file of the user's replaces it. Placeholders are those of `string.Template`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from align.errors import UserError

MT_BENCH = """\
You judge the answers of an AI assistant. Read the conversation below, and judge the assistant's last answer only: is it
correct, does it do what the user asked for, is it complete, and is it easy to follow? Longer is not better.
$reference
<conversation>
$conversation
</conversation>

First say in a few sentences what is good and what is wrong about the last answer. Then rate it from 1 (useless) to 10
(nothing could be better). The last line of your judgement must be the rating in double square brackets, like [[5]].
"""

ALPACA_EVAL = """\
Two AI assistants were given the same instruction. Say which of their answers most people would prefer: the one that
follows the instruction better, is right, and is of more use. Neither the order of the answers nor their length matters.

<instruction>
$instruction
</instruction>

<answer_a>
$answer_a
</answer_a>

<answer_b>
$answer_b
</answer_b>

First give your reasons in a few sentences. The last line of your judgement must be [[A]] if answer A is better, [[B]]
if answer B is better, or [[C]] if neither is.
"""

ALIGN_BENCH = """\
请你担任公正的评审，评价一个人工智能助手对下面这个问题的回答。请从这些维度分别评价：$dimensions。

<问题>
$question
</问题>

<参考答案>
$reference
</参考答案>

<助手的回答>
$answer
</助手的回答>

请先对照参考答案，指出助手的回答好在哪里、错在哪里，并逐一说明每个维度的情况。
然后给每个维度打一个1到10的整数分，再给一个1到10的综合得分。
事实正确性和满足用户需求最为重要：答非所问、有根本错误或有害的回答，综合得分不超过2分。
质量与参考答案相当的回答得7到8分，只有明显优于参考答案的回答才能得9到10分。

最后一行必须是如下形式的全部得分：
$form
"""

TEMPLATES: Mapping[str, tuple[str, frozenset[str]]] = {
    "mt_bench": (MT_BENCH, frozenset({"conversation"})),
    "alpaca_eval": (ALPACA_EVAL, frozenset({"instruction", "answer_a", "answer_b"})),
    "align_bench": (ALIGN_BENCH, frozenset({"question", "answer"})),
}
"""The template of each benchmark, and the placeholders that any template of it must have."""

OVERALL = "综合得分"
_FACTUAL = ("事实正确性", "满足用户需求", "清晰度", "完备性")
_LOGICAL = ("事实正确性", "满足用户需求", "逻辑连贯性", "完备性")
_CREATIVE = ("事实正确性", "满足用户需求", "逻辑连贯性", "创造性", "丰富度")
_ADVISING = ("事实正确性", "满足用户需求", "公平与可负责程度", "创造性")
ALIGN_BENCH_CATEGORIES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "数学计算": ("mathematics", _LOGICAL),
    "逻辑推理": ("logic", _LOGICAL),
    "基本任务": ("fundamental", _FACTUAL),
    "中文理解": ("chinese", _FACTUAL),
    "专业能力": ("professional", _FACTUAL),
    "综合问答": ("open", _ADVISING),
    "文本写作": ("writing", _CREATIVE),
    "角色扮演": ("role_play", _CREATIVE),
}
"""AlignBench's categories: our name of each, and the dimensions that its answers are judged by (arXiv:2311.18743).

The authors choose dimensions by subcategory; translation, which they count as creative, is the one that differs here.
"""
DIMENSIONS = {
    "事实正确性": "factuality",
    "满足用户需求": "user_need",
    "清晰度": "clarity",
    "完备性": "completeness",
    "逻辑连贯性": "coherence",
    "创造性": "creativity",
    "丰富度": "richness",
    "公平与可负责程度": "responsibility",
}


def judge_template(benchmark: str, file: Path | None) -> Template:
    """The template of a benchmark, ours or the user's. Raises UserError for one that the benchmark cannot fill in."""
    ours, needed = TEMPLATES[benchmark]
    if file is None:
        return Template(ours)
    template = Template(file.read_text(encoding="utf-8"))
    known = set(Template(ours).get_identifiers())
    used = set(template.get_identifiers())
    wrong = [f"has no ${name}" for name in sorted(needed - used)] + [f"uses ${name}" for name in sorted(used - known)]
    if not template.is_valid():
        wrong.append("has a $ that begins no placeholder (write $$ for the sign itself)")
    if wrong:
        names = ", ".join(f"${name}" for name in sorted(known))
        raise UserError(f"{file}: a template for {benchmark} {'; '.join(wrong)}. Its placeholders are {names}")
    return template


def read_rating(judgement: str) -> float | None:
    """The last rating in double square brackets, or None where there is none from 1 to 10."""
    found = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", judgement)
    return _in_range(found[-1]) if found else None


def read_choice(judgement: str) -> str | None:
    """ "A", "B", or "C" for neither: the last in double square brackets, or None where there is none."""
    found = re.findall(r"\[\[\s*([ABC])\s*\]\]", judgement)
    return found[-1] if found else None


def read_dimensions(judgement: str, dimensions: Sequence[str]) -> dict[str, float] | None:
    """The last score of each dimension and of OVERALL, or None where one of them is not there from 1 to 10."""
    scores = {}
    for name in (*dimensions, OVERALL):
        found = re.findall(rf"{name}['\"’”]?\s*[:：]\s*(\d+(?:\.\d+)?)", judgement)
        score = _in_range(found[-1]) if found else None
        if score is None:
            return None
        scores[name] = score
    return scores


def _in_range(number: str) -> float | None:
    value = float(number)
    return value if 1 <= value <= 10 else None
