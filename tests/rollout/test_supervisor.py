"""What a fleet does about workers that are lost, hang or refuse, without Ray or vLLM: actors and the clock are the test's."""

from queue import Empty

import pytest

from rollout import FleetOptions, RolloutError, State, WeightUpdateError
from rollout.supervisor import MOST_LOSSES
from rollout.sync.object_store import StoredWeights
from rollout.worker import RolloutWorker
from rollout.worker_handle import Doing, WorkerHandle

from .world import DIED, ONE, OPTIONS, FakeActor, World, drawn

pytestmark = pytest.mark.usefixtures("killed")


def test_batches_go_in_order_to_whoever_is_idle() -> None:
    world = World()
    started = world.supervisor.when_started()
    job = world.job("a", "b", "c")
    world.end(0)
    assert (world.batch(0), world.doing(1)) == ("a", "start")
    assert started.empty()
    world.end(1)
    assert started.get_nowait() is None
    world.end(1, drawn("b"))
    assert (world.batch(0), world.batch(1)) == ("a", "c")
    assert job.answers.get_nowait() == drawn("b")


def test_nothing_more_is_sampled_of_a_job_that_nobody_waits_for() -> None:
    world = World().started()
    left, next_one = world.job("a", "b", "c"), None
    left.is_over = True
    next_one = world.job("d")
    world.end(0, drawn("a"))
    assert world.batch(0) == "d"
    world.end(0, drawn("d"))
    assert next_one.answers.get_nowait() == drawn("d")


def test_the_batch_of_a_lost_worker_is_sampled_again_and_its_successor_has_the_weights_before_it_serves() -> None:
    world = World().started()
    world.update(4)
    world.end(0)
    world.end(1)
    job = world.job("a", "b", "c", version=4)
    first = world.actor(0)
    world.end(0, DIED)
    assert world.faults() == ["0 died sampling; restart 1 of 3; its engine batch is sampled again"]
    assert first.is_killed
    watch = first.open("watch")
    assert watch is not None
    watch.future().set_exception(DIED)
    world.tick()
    assert world.faults() == []
    assert world.states() == [State.RESTARTING, State.HEALTHY]
    world.end(1, drawn("b", 4))
    assert world.batch(1) == "a"
    world.end(0)
    assert (world.doing(0), world.loads(0)) == ("load", [4])
    world.end(0)
    assert world.batch(0) == "c"
    assert world.faults() == ["0 serves again, with the weights of version 4"]
    world.end(0, drawn("c", 4))
    world.end(1, drawn("a", 4))
    assert [job.answers.get_nowait() for _ in "bca"] == [drawn(name, 4) for name in "bca"]


def test_a_worker_that_dies_while_nothing_is_wanted_of_it_is_replaced() -> None:
    world = World().started()
    world.die(1)
    assert world.faults() == ["1 died idle; restart 1 of 3"]
    assert world.doing(1) == "start"
    assert len(world.actors) == 3


def test_what_an_ended_process_still_answers_is_of_no_account() -> None:
    world = World().started()
    job = world.job("a")
    late = world.actor(0).open("sample")
    world.die(0)
    assert late is not None
    late.future().set_result(drawn("a"))
    world.tick()
    assert job.answers.empty()
    assert world.batch(1) == "a"


def test_an_update_survives_a_worker_that_dies_while_it_loads() -> None:
    world = World().started()
    world.update(2)
    world.end(0)
    assert world.loaded.empty()
    world.die(1)
    assert world.loaded.get_nowait() is None
    world.end(1)
    assert world.loads(1) == [2]
    assert world.states()[1] is State.STALE


def test_an_update_is_not_everywhere_while_every_worker_is_being_restarted() -> None:
    world = World().started()
    world.die(0)
    world.die(1)
    world.update(2)
    assert world.loaded.empty()
    world.end(0)
    world.end(0)
    assert world.loaded.get_nowait() is None


def test_with_every_worker_dead_and_no_restart_left_it_is_an_error() -> None:
    world = World(OPTIONS.model_copy(update={"max_restarts": 1})).started()
    world.die(0)
    world.die(0)
    assert world.faults()[1] == "0 died loading the policy; not restarted again (rollout.max_restarts = 1)"
    assert world.states() == [State.DEAD, State.HEALTHY]
    world.die(1)
    with pytest.raises(RolloutError, match=r"all rollout workers are dead .*: worker 1 died loading the policy"):
        world.die(1)


def test_restarts_are_counted_from_the_last_trajectory() -> None:
    world = World().started()
    for _ in range(2):
        world.die(0)
    world.end(0)
    assert world.supervisor.workers[0].restarts == 2
    world.job("a")
    world.end(0, drawn("a"))
    assert world.supervisor.workers[0].restarts == 0


def test_a_batch_with_which_workers_are_lost_again_and_again_ends_its_job_alone() -> None:
    world = World(ONE.model_copy(update={"max_restarts": 9})).started()
    poison, other = world.job("poison"), world.job("b")
    for _ in range(MOST_LOSSES):
        assert world.batch(0) == "poison"
        world.end(0, DIED)
        world.end(0)
    with pytest.raises(
        RolloutError, match=r"4 rollout workers were lost with the same engine batch \(prompts poison\)"
    ):
        raise poison.answers.get_nowait()  # type: ignore[misc]
    world.end(0, drawn("b"))
    assert other.answers.get_nowait() == drawn("b")


def test_a_missed_probe_makes_a_worker_suspect_and_the_third_ends_it(killed: list[int]) -> None:
    world = World(ONE).started()
    world.job("a")
    world.tick(5)
    world.tick(6, silent=[0])
    assert world.states()[0] is State.HEALTHY
    world.tick(10, silent=[0])
    assert world.states()[0] is State.SUSPECT
    world.tick()
    world.tick()
    assert world.states()[0] is State.HEALTHY
    assert world.faults() == ["0 left a probe unanswered", "0 answers again"]
    world.steps += 1
    world.tick(5)
    for seconds in (5, 10, 10, 10):
        world.tick(seconds, silent=[0])
    assert world.supervisor.faults.get().message.endswith("left a probe unanswered")
    lost = world.supervisor.faults.get()
    assert "0 left 3 probes of 10 s unanswered; restart 1 of 3; its engine batch is sampled again" in lost.message
    assert lost.stacks == "stacks of 100"
    assert killed == [100]


def test_a_worker_that_has_started_before_anybody_looked_is_asked_who_it_is() -> None:
    worker = WorkerHandle(0, ONE, FakeActor, lambda: 0.0, lambda call: call())  # type: ignore[arg-type]
    actor = worker.start(lambda _: None)
    started = actor.call(RolloutWorker.start)
    started.future().set_result(None)
    worker.do(Doing.STARTING, started, lambda *_: None)
    assert worker.task is None
    worker.probe(0.0)
    assert actor.open("pulse")  # type: ignore[attr-defined]


def test_an_idle_worker_is_asked_for_a_token_and_ended_where_it_has_none() -> None:
    world = World().started()
    world.tick(5.1)
    assert [world.doing(0), world.doing(1)] == ["probe", "probe"]
    world.end(1)
    world.tick(10)
    assert world.states() == [State.SUSPECT, State.HEALTHY]
    world.tick(20)
    assert world.states()[0] is State.RESTARTING


def test_an_engine_that_makes_no_step_is_ended_and_one_that_goes_on_is_not() -> None:
    world = World(ONE).started()
    world.job("a")
    for _ in range(8):
        world.steps += 1
        world.tick(10)
    assert world.faults() == []
    world = World(ONE).started()
    world.job("a")
    for _ in range(5):
        world.tick(10)
    assert world.faults() == []
    world.tick(10)
    assert "0 made no engine step for rollout.stall_timeout_s = 40 s; restart 1" in world.faults()[0]


def test_a_batch_that_goes_on_for_too_long_is_an_error_with_a_cure_and_the_stacks_of_all() -> None:
    world = World().started()
    world.job("a")
    with pytest.raises(RolloutError, match=r"worker 0 .* rollout.batch_timeout_s = 100 s; raise it, or lower") as found:  # noqa: PT012
        for _ in range(11):
            world.steps += 1
            world.tick(10)
    assert found.value.stacks == "rollout worker 0: stacks of 100\nrollout worker 1: stacks of 101"


def test_without_a_limit_a_batch_goes_on_while_its_engine_makes_steps_and_new_weights_do_not() -> None:
    world = World(ONE.model_copy(update={"batch_timeout_s": FleetOptions().batch_timeout_s})).started()
    world.job("a")
    for _ in range(100):
        world.steps += 1
        world.tick(30)
    assert world.faults() == []
    world.tick(41)
    assert "made no engine step for rollout.stall_timeout_s = 40 s; restart 1" in world.faults()[0]
    world.end(0)
    world.end(0, drawn("a"))
    world.update(1)
    world.faults()
    assert world.doing(0) == "load"
    world.tick(601)
    assert "taking new weights within rollout.batch_timeout_s = 600 s; restart" in world.faults()[0]


@pytest.mark.parametrize("doing", ["load", "offload", "onload"])
def test_weights_that_take_too_long_cost_the_worker(doing: str) -> None:
    world = World().started()
    if doing == "load":
        world.update(1)
    else:
        world.supervisor.set_offloaded(True)
        world.tick()
        if doing == "onload":
            world.end(0)
            world.end(1)
            world.supervisor.set_offloaded(False)
            world.tick()
    assert world.doing(0) == doing
    world.tick(99)
    assert world.faults() == []
    world.tick(2)
    assert "within rollout.batch_timeout_s = 100 s; restart 1 of 3" in world.faults()[0]


def test_a_first_start_that_takes_too_long_or_fails_is_an_error_and_a_later_one_is_tried_again() -> None:
    world = World()
    with pytest.raises(RolloutError, match=r"not done loading the policy within rollout.start_timeout_s = 300 s"):
        world.tick(301)
    world = World()
    with pytest.raises(RolloutError, match="a rollout worker failed loading the policy"):
        world.end(0, ValueError("no such model"))
    world = World().started()
    world.die(0)
    world.tick(301)
    assert "within rollout.start_timeout_s = 300 s; restart 2 of 3" in world.faults()[-1]
    world.end(0, ValueError("no memory"))
    assert "failed loading the policy" in world.faults()[-1]
    assert world.doing(0) == "start"


def test_a_process_that_dies_at_the_first_start_is_replaced() -> None:
    world = World()
    world.die(0)
    assert world.faults() == ["0 died loading the policy; restart 1 of 3"]
    world.started()
    assert world.states() == [State.HEALTHY] * 2


def test_weights_that_a_worker_refuses_fail_their_call_and_whoever_wants_samples_until_there_are_others() -> None:
    world = World().started()
    world.update(1)
    world.end(0, WeightUpdateError("no such tensor"))
    world.end(1)
    with pytest.raises(WeightUpdateError, match="no such tensor"):
        raise world.loaded.get_nowait()  # type: ignore[misc]
    job = world.job("a", "b", version=1)
    assert isinstance(job.answers.get_nowait(), WeightUpdateError)
    world.update(2)
    for number in range(2):
        world.end(number)
    assert world.loaded.get_nowait() is None


def test_a_request_that_is_refused_ends_its_job_and_no_worker() -> None:
    world = World().started()
    job = world.job("long", "b", "c")
    world.end(0, RolloutError("prompt 'long' has 64 tokens"))
    assert "64 tokens" in str(job.answers.get_nowait())
    assert world.doing(0) is None
    assert world.faults() == []


@pytest.mark.parametrize("version", [0, 1])
def test_trajectories_of_other_weights_are_refused(version: int) -> None:
    world = World().started()
    job = world.job("a", version=1)
    world.end(0, drawn("a", version))
    answer = job.answers.get_nowait()
    if version == 1:
        assert answer == drawn("a", 1)
    else:
        assert "other weights than those of version 1" in str(answer)


def test_a_new_worker_takes_the_last_whole_weights_and_those_of_modules_since() -> None:
    world = World(ONE).started()
    replaced = []
    for version, modules in ((1, None), (2, None), (3, ["a", "b"]), (4, ["a"]), (5, ["a", "b"])):
        replaced.append([old.version for old in world.update(version, modules=modules).replaced])
        world.end(0)
    assert replaced == [[], [1], [], [], [3, 4]]
    world.die(0)
    for _ in range(3):
        world.end(0)
    assert world.loads(0) == [2, 5]
    assert world.states() == [State.HEALTHY]


def test_workers_offload_after_what_they_do_and_do_nothing_until_they_onload() -> None:
    world = World().started()
    job = world.job("a")
    offloaded = world.supervisor.set_offloaded(True)
    world.tick()
    assert [world.doing(0), world.doing(1)] == ["sample", "offload"]
    world.end(1)
    world.end(0, drawn("a"))
    assert offloaded.empty()
    world.end(0)
    assert offloaded.get_nowait() is None
    assert world.states() == [State.OFFLOADED] * 2
    assert job.answers.get_nowait() == drawn("a")
    world.tick(60)
    assert [world.doing(0), world.doing(1)] == [None, None]
    onloaded = world.supervisor.set_offloaded(False)
    world.update(1)
    for number in range(2):
        world.end(number)
        assert world.doing(number) == "load"
    assert onloaded.get_nowait() is None


def test_one_that_is_lost_offloaded_is_started_when_the_others_onload() -> None:
    world = World().started()
    world.supervisor.set_offloaded(True)
    world.tick()
    world.end(0)
    world.end(1)
    world.die(0)
    world.tick(1)
    assert world.supervisor.workers[0].actor is None
    assert len(world.actors) == 2
    started = world.supervisor.when_started()
    world.tick()
    assert started.get_nowait() is None  # none is being started
    world.supervisor.set_offloaded(False)
    world.tick()
    assert [world.doing(0), world.doing(1)] == ["start", "onload"]


def test_those_that_are_being_started_offload_when_they_are_there() -> None:
    world = World().started()
    world.die(1)
    offloaded = world.supervisor.set_offloaded(True)
    world.tick()
    world.end(0)
    assert offloaded.empty()
    world.end(1)
    world.end(1)
    assert offloaded.get_nowait() is None


def test_closing_ends_the_processes_and_frees_the_weights(killed: list[int]) -> None:
    world = World().started()
    source = StoredWeights(["reference"])
    world.update(1, source)
    world.supervisor._thread.start()
    world.supervisor.close()
    assert killed == [100, 101]
    assert source.references == ()
    with pytest.raises(Empty):
        world.loaded.get_nowait()
