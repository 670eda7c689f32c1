"""Worker processes for whatever a model wrote: judged within hard limits, or killed and replaced at once.

    workers = Killable(Path("job.py"))
    outcomes = workers.run([{"answer": "1/2"}, {"answer": "9^{9^{9}}"}])  # one Outcome each, in order

There are no signal alarms and no threads: the limits are kept from outside, by SIGKILL and by the kernel, and so
they hold inside C code too. What crosses the border are lines of JSON, of bounded length in both directions;
nothing is unpickled. The other side is `inside`, which also says what a job is; `types` has what is asked and
answered.

The limit on time is processor time, so that a busy machine takes no reward away from an honest answer. An answer
that used it up is the model's fault. A worker that ends otherwise, or gets no processor for `stuck_s`, is ours: the
request is tried once more in a fresh worker, and then reported as INFRA, never as a wrong answer.
"""

from reward.isolation.killable.pool import Killable
from reward.isolation.killable.types import End, Limits, Outcome, WorkersUnavailable

__all__ = ["End", "Killable", "Limits", "Outcome", "WorkersUnavailable"]
