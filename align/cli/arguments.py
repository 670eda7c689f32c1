"""What several commands take, and the exit statuses of all."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from align.shipped import found

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 75


File = Annotated[Path, Argument(metavar="FILE", help="recipe file, for example recipes/nano/grpo.yaml", callback=found)]
Overrides = Annotated[list[str] | None, Argument(metavar="key=value", help="for example grpo.steps=20 seed=1")]
RunPath = Annotated[Path, Argument(metavar="RUN", help="run directory, for example runs/nano-grpo")]
Model = Annotated[str, Option(help="Hugging Face directory or hub name")]
Dtype = Annotated[Literal["float32", "bfloat16"], Option()]
MaxLength = Annotated[int, Option(min=16, help="prompt and completion, in tokens")]
A_REWARD = "name of a reward, as `align rewards list` shows them, or a function of one's own: my_rewards.py:my_function"
BELOW_RUN = "; a new file in the run's scores/ when not given"
Params = Annotated[str, Option(help='the reward\'s parameters as YAML, for example "{partial: true}"')]
Timeout = Annotated[
    float | None,
    Option("--timeout", min=0.001, max=86400, help="seconds that a call of a function of one's own may take (30)"),
]
Workers = Annotated[int, Option(min=1, help="rollout workers")]
TrustRemoteCode = Annotated[
    bool,
    Option(
        "--trust-remote-code", help="run the Python code that comes with the model; only for code that you have read"
    ),
]
