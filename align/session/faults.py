"""What goes wrong with the engines, on the record of a run."""

from align.session.run import Run
from rollout import Fault


def record_fault(run: Run, fault: Fault) -> None:
    """What happened to a rollout worker: a line, an event, and a file with its stacks where there are any."""
    file = run.directory.save_stacks(fault.stacks)
    seen = {"stacks": file} if file else {}
    run.progress.warn(fault.message)
    run.metrics.event("rollout_worker", fault.message, worker=fault.worker, state=str(fault.state), **seen)
