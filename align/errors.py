"""The errors that the command line knows."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec

ENGINES = ("torch", "ray", "vllm", "deepspeed")


class UserError(Exception):
    """Something the user gave is wrong: the message says what, where, and what to do. Shown without a traceback."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put `what` before the message of a UserError that comes out of the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


@contextmanager
def reward_errors() -> Iterator[None]:
    """Make a UserError of a RewardError that comes out of the block, or of the function that this decorates."""
    from reward import RewardError

    try:
        yield
    except RewardError as error:
        raise UserError(str(error)) from error


def check_installed(engines: Iterable[str]) -> None:
    """Raise UserError for engines that are not installed, with the command that installs them."""
    if missing := [name for name in engines if find_spec(name) is None]:
        raise UserError(not_installed(*missing))


def not_installed(*engines: str) -> str:
    """That engines are not installed, and the command that installs them."""
    return (
        f"{', '.join(engines)} {'is' if len(engines) == 1 else 'are'} not installed: `pip install 'moe-align[cuda]'` on a machine with NVIDIA "
        "GPUs, `pip install 'moe-align[cpu]'` on others"
    )


class Terminated(KeyboardInterrupt):
    """The run was asked to stop by SIGTERM, as batch systems and clusters do."""


class AlarmError(Exception):
    """An alarm that the recipe says ends the run."""


class NonFiniteError(Exception):
    """Rewards, log-probabilities, losses or gradients were not finite for several steps in a row."""


class RayDiedError(Exception):
    """The Ray that a run has started is gone, and all its actors with it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint that ends an error message about an unknown name, such as " (did you mean 'answer'?)"; empty without a near one."""
    found = get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
