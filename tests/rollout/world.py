"""A supervisor without Ray or vLLM: its actors answer when a test says, and its clock is the test's."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import ActorDiedError, RayTaskError

from rollout import FinishReason, FleetOptions, Prompt, RolloutError, SamplingOptions, State, Trajectory
from rollout.engine import Request
from rollout.processes import ProcessId
from rollout.supervisor import Batch, Job, Supervisor, Update
from rollout.sync.base import WeightSource
from rollout.sync.object_store import StoredWeights
from rollout.worker import WorkerSetup

OPTIONS = FleetOptions(
    workers=2, probe_interval_s=5, probe_timeout_s=10, stall_timeout_s=40, batch_timeout_s=100, start_timeout_s=300
)
ONE = OPTIONS.model_copy(update={"workers": 1})
DIED = ActorDiedError()


class Call:
    """A call of an actor's method, which is answered when the test wants."""

    def __init__(self, method: Any, arguments: Sequence[Any]):
        self.method: str = method.__name__
        self.arguments = arguments
        self._future: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self._future


@dataclass(eq=False)
class FakeActor:
    number: int
    calls: list[Call] = field(default_factory=list)
    is_killed: bool = False

    def options(self, **_: Any) -> "FakeActor":
        return self

    def call(self, method: Any, *arguments: Any) -> Call:
        self.calls.append(Call(method, arguments))
        return self.calls[-1]

    def kill(self) -> None:
        self.is_killed = True

    def open(self, *methods: str) -> Call | None:
        """The last call of these methods that is not answered."""
        return next((c for c in reversed(self.calls) if c.method in methods and not c.future().done()), None)


class World:
    """A supervisor of actors that do what the test says, at the times that it says."""

    def __init__(self, options: FleetOptions = OPTIONS):
        self.now = 0.0
        self.actors: list[FakeActor] = []
        setup = WorkerSetup("model", "float32", options, [2])
        self.supervisor = Supervisor(options, setup, self._new_actor, lambda: self.now)  # type: ignore[arg-type]
        self.serials = self.steps = 0
        self.tick()

    def _new_actor(self, number: int) -> FakeActor:
        self.actors.append(FakeActor(number))
        return self.actors[-1]

    def tick(self, seconds: float = 0, *, silent: Sequence[int] = ()) -> None:
        """Time passes, and all probes are answered but those of `silent` workers."""
        self._answer_probes(silent)
        self.now += seconds
        self.supervisor.tick(0)
        self._answer_probes(silent)
        self.supervisor.tick(0)

    def _answer_probes(self, silent: Sequence[int]) -> None:
        for worker in self.supervisor.workers:
            if worker.actor and worker.number not in silent and (pulse := self.actor(worker.number).open("pulse")):
                pulse.future().set_result((ProcessId("node", 100 + worker.number, 0.0, 3), self.steps))

    def actor(self, number: int) -> FakeActor:
        actor = self.supervisor.workers[number].actor
        assert actor is not None
        return actor  # type: ignore[return-value]

    def doing(self, number: int) -> str | None:
        call = self._task(number)
        return call.method if call else None

    def end(self, number: int, result: Any = None) -> None:
        """What the worker is doing ends: with this result, or with this error."""
        call = self._task(number)
        assert call is not None
        if isinstance(result, RolloutError | ValueError):
            call.future().set_exception(RayTaskError(call.method, f"{result}", result))
        elif isinstance(result, Exception):
            call.future().set_exception(result)
        else:
            call.future().set_result(result)
        self.tick()

    def die(self, number: int) -> None:
        """The process of a worker ends, whatever it is doing."""
        watch = self.actor(number).open("watch")
        assert watch is not None
        watch.future().set_exception(DIED)
        self.tick()

    def _task(self, number: int) -> Call | None:
        return self.actor(number).open("start", "sample", "load", "offload", "onload", "probe")

    def started(self) -> "World":
        for number in range(len(self.supervisor.workers)):
            self.end(number)
        self.steps += 1
        return self

    def job(self, *prompts: str, version: int = 0) -> Job:
        job = Job(SamplingOptions(), version)
        self.supervisor.submit([Batch(job, [Request(Prompt(name, [1]), 0, 7)]) for name in prompts])
        self.tick()
        return job

    def batch(self, number: int) -> str:
        """The prompt that the worker is sampling."""
        call = self._task(number)
        assert call is not None
        assert call.method == "sample"
        return str(call.arguments[0][0].prompt.id)

    def update(self, version: int, source: WeightSource | None = None, modules: Sequence[str] | None = None) -> Update:
        self.serials += 1
        update = Update(self.serials, version, source or StoredWeights([]), modules)
        self.loaded = self.supervisor.update(update)
        self.tick()
        return update

    def loads(self, number: int) -> list[Any]:
        """The versions that the worker's process has been given, in order."""
        return [call.arguments[1] for call in self.actor(number).calls if call.method == "load"]

    def source(self, number: int) -> WeightSource:
        """What the worker is loading."""
        call = self._task(number)
        assert call is not None
        source: WeightSource = call.arguments[0]
        return source

    def faults(self) -> list[str]:
        told = []
        while not self.supervisor.faults.empty():
            told.append(self.supervisor.faults.get().message.removeprefix("rollout worker "))
        return told

    def states(self) -> list[State]:
        return [worker.state for worker in self.supervisor.workers]


def drawn(prompt: str, version: int = 0) -> list[Trajectory]:
    return [Trajectory.of_one_turn(Prompt(prompt, [1]), 0, [5], [-0.5], FinishReason.STOP, weight_version=version)]
