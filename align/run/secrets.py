"""Nothing that a run writes or says gives a secret away."""

import os
import re
from collections.abc import Sequence

SECRET_NAME = re.compile(r"(^|[._-])(token|secret|password|passwd|credentials?|api[_-]?key|access[_-]?key)$", re.I)
SECRET_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY)$", re.I)
SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_)\w{8,}|(?<=://)[^/@\s]+@")
SHORTEST = 8
"""A shorter value of a variable is no secret, or it would blot out words."""


def redacted(text: str) -> str:
    """`text` with *** for well-known forms of tokens and for the values of environment variables named like a secret."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and SECRET_VARIABLE.search(name):
            text = text.replace(value, "***")
    return SECRET_VALUE.sub("***", text)


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """`arguments` with *** for the values of keys named like a secret and for well-known forms of tokens."""
    shown = []
    hide_next = False
    for argument in arguments:
        key, equals, value = argument.partition("=")
        secret = SECRET_NAME.search(key) is not None
        if hide_next and not argument.startswith("-"):
            shown.append("***")
        elif secret and equals and value:
            shown.append(f"{key}=***")
        else:
            shown.append(SECRET_VALUE.sub("***", argument))
        hide_next = secret and not equals and argument.startswith("-")
    return shown
