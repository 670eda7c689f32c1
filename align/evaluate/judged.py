"""Open-ended benchmarks that a language model judges.

The questions are not ours to ship: they are given as a file of JSON lines with the fields that their authors publish.

- MT-Bench (arXiv:2306.05685): each answer of a conversation of two turns gets a rating from 1 to 10.
- AlpacaEval 2.0: each answer is compared to the reference's in both orders, so that a preference is 0, 1/4, 1/2, 3/4
  or 1 (the authors draw one order, and weigh the judge's two verdicts by their probabilities). `length_control` says
  what the length-controlled win rate is here.
- AlignBench (arXiv:2311.18743): each answer gets scores from 1 to 10 in several dimensions and over all.

A judgement that the judge did not give, or that cannot be read, is counted and left out: it is never a 0.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FilePath, ValidationError

from align.errors import UserError
from align.evaluate.hooks import Checkpoint, Metrics, register
from align.evaluate.judge import Judge, JudgeOptions
from align.evaluate.judge_benchmarks import BENCHMARKS, Respondent
from align.evaluate.judge_texts import judge_template
from align.run.files import read_jsonl_lines
from rollout import Fleet


def ready(benchmark: str, questions: Path, judge: JudgeOptions, template: Path | None = None) -> None:
    """The questions and the template can be read, and the judge answers."""
    read_questions(questions, BENCHMARKS[benchmark].question)
    judge_template(benchmark, template)
    Judge(judge).check()


@register("judged", ready=ready)
def judged(
    checkpoint: Checkpoint,
    fleet: Fleet,
    *,
    benchmark: Literal["mt_bench", "alpaca_eval", "align_bench"],
    questions: FilePath,
    judge: JudgeOptions,
    template: FilePath | None = None,
    max_new_tokens: Annotated[int, Field(ge=1)] = 1024,
    limit: Annotated[int, Field(ge=1)] | None = None,
    seed: int = 0,
) -> Metrics:
    """A judge's verdicts on the policy's answers to the first `limit` questions of a benchmark.

    Before the policy is asked anything the judge is: UserError where it refuses, EvaluationError where it cannot be
    reached. Of the `judgements`, `failed` is the share that the judge did not give and `unreadable` the share without a
    verdict in them; where that is all of them, the benchmark is not run.
    """
    wanted = BENCHMARKS[benchmark]
    asked = read_questions(questions, wanted.question)[:limit]
    wording = judge_template(benchmark, template)
    voice = Judge(judge)
    voice.check()
    cases = wanted.cases(asked, Respondent(checkpoint, fleet, max_new_tokens, seed))
    judgements = voice.ask([wording.substitute(case.fields) for case in cases])
    verdicts = [
        None if judgement.text is None else case.read(judgement.text)
        for case, judgement in zip(cases, judgements, strict=True)
    ]
    failed = sum(judgement.text is None for judgement in judgements)
    unusable = sum(verdict is None for verdict in verdicts)
    values = wanted.values(asked, cases, verdicts) | {
        "judgements": len(cases),
        "failed": failed / len(cases),
        "unreadable": (unusable - failed) / len(cases),
    }
    not_run: dict[str, str] = {}
    if unusable == len(cases):
        first = judgements[0].error or f"no verdict in {(judgements[0].text or '')[-80:]!r}"
        not_run[benchmark] = f"none of the {len(cases)} judgements could be used; the first: {first}"
    rows: list[dict[str, Any]] = [
        {
            "id": case.id,
            "part": case.part,
            "category": case.category,
            "prompt": case.prompt,
            "completion": case.completion,
            "judgement": judgement.text,
            "verdict": None if verdict is None else str(verdict),
            "error": judgement.error,
        }
        for case, judgement, verdict in zip(cases, judgements, verdicts, strict=True)
    ]
    return Metrics({f"{benchmark}/{name}": value for name, value in values.items()}, not_run, rows)


def read_questions(file: Path, kind: type[BaseModel]) -> list[Any]:
    """The questions of a file. Raises UserError with the line of one that lacks a field or has a wrong one."""
    questions = []
    for line, row in read_jsonl_lines(file):
        try:
            questions.append(kind.model_validate(row))
        except ValidationError as error:
            wrong = error.errors()[0]
            raise UserError(f"{file}, line {line}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None
    if not questions:
        raise UserError(f"{file} is empty: give the benchmark's questions, one JSON object on each line")
    return questions
