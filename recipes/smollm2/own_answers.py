"""What SmolLM2 itself says to the plain requests: the text that the demonstrations of sft.yaml are made of.

    python recipes/smollm2/own_answers.py MODEL FILE

lets MODEL answer requests about every topic that is not held out, with nothing said of their form, and writes FILE, which the
card `instructions` reads (`params: {answers: FILE}`). A FILE that has the same model's answers already is left as it is.
"""

import sys
from pathlib import Path

from align.errors import UserError
from align.recipe import ModelOptions, check_model_directory
from align.recipe.dtype import dtype_of_machine
from align.run.files import read_jsonl, write_jsonl
from align.tasks.instructions import plain_requests
from align.tools.offline import answers_of
from rollout import FleetOptions

REQUESTS_OF_A_TOPIC = 5
MAX_NEW_TOKENS = 96
TEMPERATURE = 0.7


def own_answers(model: str, file: Path) -> str:
    """Sample and write; returns a line on what is there. Raises UserError for a model that cannot be used."""
    options = ModelOptions(path=model, dtype=dtype_of_machine()[0])
    check_model_directory(Path(model), options)
    if file.exists() and {row.get("model") for row in read_jsonl(file)} == {model}:
        return f"{model}'s own answers are in {file} already"
    requests = plain_requests(REQUESTS_OF_A_TOPIC)
    print(f"{model} answers {len(requests)} plain requests: a few minutes on two cores", file=sys.stderr)
    rollout = FleetOptions(workers=1, threads=2, max_length=256)
    texts = answers_of(options, requests, rollout, max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(file, ({"model": model, "request": request, "answer": texts[request]} for request in requests))
    return f"{len(texts)} of {model}'s own answers are in {file}"


if __name__ == "__main__":
    try:
        print(own_answers(sys.argv[1], Path(sys.argv[2])), file=sys.stderr)
    except UserError as error:
        sys.exit(f"error: {error}")
