"""Workers for a job: what a request does to its process never reaches us, and never takes the next one along."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from reward.isolation.pool import End, WorkerLimits, WorkerPool

JOB = """
import os, signal, time

def warm():
    pass

def work(request, enter):
    enter("first")
    do = request["do"]
    if do == "in turn":
        step = sorted(os.listdir(request["folder"]))[0]
        os.rmdir(os.path.join(request["folder"], step))
        do = step[2:]
    if do == "spin":
        while True:
            pass
    if do == "power":
        return {"bits": (7 ** (10 ** 9)).bit_length()}
    if do == "work":
        time.sleep(request.get("after", 0))
        end = time.process_time() + request["seconds"]
        while time.process_time() < end:
            pass
    if do == "phases":
        for phase in ("second", "third"):
            end = time.process_time() + 0.2
            while time.process_time() < end:
                pass
            enter(phase)
    if do == "memory":
        return {"length": len(bytearray(1 << 32))}
    if do == "exit":
        os._exit(3)
    if do == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if do == "once" and not os.path.exists(request["mark"]):
        os.mkdir(request["mark"])
        os._exit(3)
    if do == "raise":
        raise ValueError("secret")
    if do == "recurse":
        return work(request, enter)
    if do == "chatter":
        return {"text": "x" * 1_000_000}
    if do == "sleep":
        time.sleep(60)
    if do == "print":
        print("noise on standard output")
    if do == "write":
        try:
            with open(request["path"], "w") as file:
                file.write("x" * 10)
        except OSError:
            return {"written": False}
    if do == "environment":
        return {"names": sorted(os.environ)}
    if do == "pid":
        return {"pid": os.getpid(), "parent": os.getppid()}
    return {"echo": do}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


@pytest.fixture
def workers(job: Path) -> Iterator[WorkerPool]:
    pool = WorkerPool(job, workers=2, limits=WorkerLimits(cpu_s=0.3, stuck_s=20.0, memory_bytes=64 << 20))
    yield pool
    pool.close()


def ends(workers: WorkerPool, *doings: str) -> list[End]:
    return [outcome.end for outcome in workers.run([{"do": do} for do in doings])]


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family(workers: WorkerPool) -> list[int]:
    """The numbers of the zygote, of the supervisors and of their workers, in this order."""
    zygote = psutil.Process(workers._keeper.zygote().pid)
    return [one.pid for one in (zygote, *zygote.children(recursive=True))]


def wait_for(condition, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_the_outcomes_are_in_the_order_of_the_requests(workers: WorkerPool) -> None:
    outcomes = workers.run([{"do": str(number)} for number in range(500)])
    assert [outcome.reply["echo"] for outcome in outcomes] == [str(number) for number in range(500)]
    assert workers.run([]) == []


@pytest.mark.parametrize("bomb", ["spin", "power"], ids=["in Python", "inside C code"])
def test_what_uses_up_its_time_is_killed_and_the_next_is_served_at_once(workers: WorkerPool, bomb: str) -> None:
    ends(workers, "a")
    outcome = workers.run([{"do": bomb}])[0]
    assert (outcome.end, outcome.phase) == (End.TIMEOUT, "first")
    started = time.monotonic()
    assert ends(workers, "b") == [End.DONE]
    assert time.monotonic() - started < 3.0


def test_a_bomb_among_others_costs_only_itself(workers: WorkerPool) -> None:
    assert ends(workers, "a", "spin", "b", "memory", "c") == [End.DONE, End.TIMEOUT, End.DONE, End.MEMORY, End.DONE]


def test_every_phase_has_the_time_anew(workers: WorkerPool) -> None:
    outcome = workers.run([{"do": "phases"}])[0]  # 0.4 s in all, 0.3 s are allowed
    assert (outcome.end, outcome.phase) == (End.DONE, "third")


def test_a_phase_can_have_more_time(job: Path) -> None:
    pool = WorkerPool(job, workers=1, limits=WorkerLimits(cpu_s=0.1, phase_cpu_s={"first": 3.0}))
    assert pool.run([{"do": "work", "seconds": 0.3}])[0].end is End.DONE
    pool.close()


def test_a_worker_that_dies_is_ours_to_explain_after_a_second_try(workers: WorkerPool, tmp_path: Path) -> None:
    assert workers.run([{"do": "once", "mark": str(tmp_path / "mark")}])[0].end is End.DONE
    outcome = workers.run([{"do": "exit"}])[0]
    assert (outcome.end, outcome.detail) == (End.INFRA, "the worker ended with code 3")


def test_a_crash_that_repeats_belongs_to_the_request(workers: WorkerPool) -> None:
    assert ends(workers, "segv") == [End.CRASH]


@pytest.mark.parametrize(
    ("in_turn", "end"),
    [("segv exit segv", End.CRASH), ("exit segv exit", End.INFRA), ("segv exit a", End.DONE)],
    ids=lambda value: value.replace(" ", ", ") if isinstance(value, str) else "",
)
def test_of_a_crash_and_a_fault_of_ours_the_one_that_repeats_counts(
    workers: WorkerPool, in_turn: str, end: End, tmp_path: Path
) -> None:
    for place, way in enumerate(in_turn.split()):
        (tmp_path / "ways" / f"{place} {way}").mkdir(parents=True)
    assert workers.run([{"do": "in turn", "folder": str(tmp_path / "ways")}])[0].end is end


@pytest.mark.parametrize("fault", ["raise", "recurse", "chatter"])
def test_no_fault_of_the_job_or_the_machine_is_an_answer(workers: WorkerPool, fault: str) -> None:
    outcome = workers.run([{"do": fault}])[0]
    assert outcome.end is End.INFRA
    assert "secret" not in outcome.detail
    assert ends(workers, "a") == [End.DONE]


def test_a_worker_that_does_nothing_is_at_fault_itself(job: Path) -> None:
    pool = WorkerPool(job, limits=WorkerLimits(cpu_s=0.2, stuck_s=0.5))
    outcome = pool.run([{"do": "sleep"}])[0]
    assert (outcome.end, outcome.detail[:20]) == (End.INFRA, "got 0.00 s of proces")
    pool.close()


def test_who_waits_for_a_processor_has_all_of_the_time_afterwards(job: Path) -> None:
    pool = WorkerPool(job, limits=WorkerLimits(cpu_s=0.5, stuck_s=60.0))
    waiting = {"do": "work", "after": 1.0}
    ends = [outcome.end for outcome in pool.run([waiting | {"seconds": seconds} for seconds in (0.4, 60.0)])]
    assert ends == [End.DONE, End.TIMEOUT]
    pool.close()


def test_who_may_take_longer_may_wait_longer_for_a_processor(job: Path) -> None:
    pool = WorkerPool(job, workers=1, limits=WorkerLimits(cpu_s=0.05, phase_cpu_s={"first": 1.0}, stuck_s=1.0))
    ends = [pool.run([{"do": "work", "after": 1.5, "seconds": seconds}])[0].end for seconds in (0.1, 60.0)]
    assert ends == [End.DONE, End.TIMEOUT]
    pool.close()


def test_a_request_beyond_the_limit_is_not_sent(job: Path) -> None:
    pool = WorkerPool(job, limits=WorkerLimits(request_bytes=100))
    outcomes = pool.run([{"do": "x" * 1000}, {"do": "a"}])
    assert [outcome.end for outcome in outcomes] == [End.INFRA, End.DONE]
    pool.close()


def test_standard_output_is_no_part_of_the_protocol(workers: WorkerPool) -> None:
    assert workers.run([{"do": "print"}])[0].reply == {"echo": "print"}


def test_a_worker_writes_no_file_and_knows_no_secret(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "secret")
    pool = WorkerPool(job)
    assert pool.run([{"do": "write", "path": str(tmp_path / "written")}])[0].reply == {"written": False}
    assert not (tmp_path / "written").exists() or (tmp_path / "written").stat().st_size == 0
    assert "SOME_API_TOKEN" not in pool.run([{"do": "environment"}])[0].reply["names"]
    pool.close()


def test_workers_are_used_again_and_replaced_after_so_many_requests(job: Path) -> None:
    pool = WorkerPool(job, workers=1, limits=WorkerLimits(requests_per_worker=3))
    pids = [outcome.reply["pid"] for outcome in pool.run([{"do": "pid"}] * 9)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 3]
    pool.close()


@pytest.mark.parametrize("victim", [0, 1, -1], ids=["the zygote", "a supervisor", "a worker"])
def test_a_process_killed_from_outside_is_replaced(workers: WorkerPool, victim: int) -> None:
    ends(workers, "a")
    pid = family(workers)[victim]
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: not alive(pid))
    assert ends(workers, "a", "b", "spin", "c") == [End.DONE, End.DONE, End.TIMEOUT, End.DONE]
    assert pid not in family(workers)


def test_a_job_that_does_not_load_says_why_and_scores_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_package")
    outcome = WorkerPool(broken).run([{"do": "a"}])[0]
    assert outcome.end is End.INFRA
    assert "no_such_package" in outcome.detail


def test_closing_leaves_no_process_and_no_zombie(workers: WorkerPool) -> None:
    ends(workers, "a", "spin", "segv", "exit", "memory", "b")
    pids = family(workers)
    assert len(pids) > 1
    workers.close()
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert ends(workers, "a") == [End.DONE]


def test_the_dead_leave_no_zombie_while_the_pool_lives(workers: WorkerPool) -> None:
    ends(workers, *["spin", "segv", "exit", "memory"])
    assert wait_for(lambda: len(family(workers)) == 1 + 2 * sum(map(bool, workers._idle.queue)))
    assert all(alive(pid) for pid in family(workers))


@pytest.mark.parametrize("doing", ["a", "spin"], ids=["idle", "busy"])
def test_workers_die_with_a_parent_that_is_killed(job: Path, doing: str) -> None:
    script = f"""
from pathlib import Path
import psutil, sys, threading, time
from reward.isolation.pool import WorkerLimits, WorkerPool
pool = WorkerPool(Path({str(job)!r}), workers=1, limits=WorkerLimits(cpu_s=60.0))
pool.run([{{"do": "a"}}])
print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
pool.run([{{"do": {doing!r}}}])
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        assert all(alive(pid) for pid in pids)
        parent.kill()
    assert wait_for(lambda: not any(alive(pid) for pid in pids))


def test_threads_take_turns_and_a_thread_that_ends_takes_no_worker_along(workers: WorkerPool) -> None:
    answers: dict[int, list[str]] = {}

    def ask(number: int) -> None:
        outcomes = workers.run([{"do": f"{number}-{row}"} for row in range(50)])
        answers[number] = [outcome.reply["echo"] for outcome in outcomes]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: [f"{number}-{row}" for row in range(50)] for number in range(4)}
    before = family(workers)
    time.sleep(0.1)
    assert all(alive(pid) for pid in before)
    assert ends(workers, "a") == [End.DONE]
    assert family(workers) == before


def test_a_fork_of_ours_starts_workers_of_its_own(workers: WorkerPool) -> None:
    ours = workers.run([{"do": "pid"}])[0].reply["pid"]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        theirs = workers.run([{"do": "pid"}])[0].reply["pid"]
        os.write(writing, str(theirs).encode())
        workers.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reading, 20)) != ours
    assert workers.run([{"do": "pid"}])[0].reply["pid"] == ours


def test_an_interrupted_run_leaves_nothing_to_the_next(workers: WorkerPool) -> None:
    def interrupt(signal_number: int, frame: object) -> None:
        raise KeyboardInterrupt

    ends(workers, "a")
    before = signal.signal(signal.SIGUSR1, interrupt)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            workers.run([{"do": "work", "seconds": 0.25}])
    finally:
        signal.signal(signal.SIGUSR1, before)
    # The interrupted request would be answered first.
    assert workers.run([{"do": "phases"}])[0].reply == {"echo": "phases"}
