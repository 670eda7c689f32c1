"""Does the toolkit work on this machine's GPU, and how fast? `make gpu-check` runs it; docs/gpu.md explains the results.

Each section is a process with a time limit of its own, so that one that fails or hangs does not end the others. The model of most sections
is four layers of DeepSeek-V2-Lite with random weights in bfloat16: real shapes, and nothing to download. Results are lines of JSON in
`$OUT/gpu.jsonl` (OUT is runs/gpu_check when not set), and what the engines print is in `$OUT/log.txt`. `--tiny` goes through the sections on a
CPU with the shapes of the nano policy: it finds mistakes in these files, and measures nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from gpu_check import results
from gpu_check.machine import machine
from gpu_check.results import OUT, ROOT, TINY, WORK, emit, section_command, timed
from gpu_check.runs import lite_run, nano_run
from gpu_check.sampling import agreement, float32, graphs, invariance, nano_float32, sampling, weight_sync
from gpu_check.training import lora, training

# For a machine without a network: where processes meet, and that no hub is asked.
ENVIRONMENT = {"VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
ENVIRONMENT |= dict.fromkeys(["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"], "lo")
SECTIONS: dict[str, tuple[Callable[[], None], float]] = {
    "a": (machine, 100),
    "b": (sampling, 170),
    "c": (agreement, 110),
    "d": (weight_sync, 170),
    "e": (training, 150),
    "f": (nano_run, 230),
    "h": (graphs, 170),
    "i": (float32, 130),
    "n": (nano_float32, 110),
    "j": (invariance, 130),
    "l": (lora, 170),
    "g": (lite_run, 230),
}
"""What each letter runs, and how many seconds it may take; six times as many with `--tiny`."""
NEEDS_GPU = {"h": "needs a GPU: CUDA graphs", "j": "needs a GPU: other kernels"}


def main() -> int:
    """Run the sections that were asked for. Returns how many failed."""
    options = arguments()
    for directory in (OUT, WORK):
        directory.mkdir(parents=True, exist_ok=True)
    if options.child:
        return child(options.sections[0])
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    began, rows, failed = time.monotonic(), [], 0
    for letter in options.sections:
        left = options.budget - (time.monotonic() - began)
        limit, start = min(SECTIONS[letter][1] * (6 if TINY else 1), left), time.monotonic()
        if TINY and letter in NEEDS_GPU:
            result = NEEDS_GPU[letter]
        elif left < 20 or (failed and options.stop):
            result = f"not begun: {left:.0f} s left"
        else:
            print(f"== {letter}: at most {limit:.0f} s", flush=True)
            result = run_section(letter, limit)
            failed += result != "done"
        rows.append((f"{time.monotonic() - start:.0f}", result, SECTIONS[letter][0].__doc__))
    print("\nseconds  result")
    for seconds, result, about in rows:
        print(f"{seconds:>7}  {result:32} {about}")
    return failed


def arguments() -> argparse.Namespace:
    """The command line."""
    sections = "\n".join(f"  {function.__doc__}" for function, _ in SECTIONS.values())
    about = f"{__doc__}\nsections:\n{sections}"
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", default=list(SECTIONS), help="all if not given")
    parser.add_argument("--only", metavar="SECTION", help="one section")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no section is begun")
    parser.add_argument("--stop", action="store_true", help="begin no section after one that failed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sections = [options.only] if options.only else options.sections
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {' '.join(SECTIONS)}")
    return options


def run_section(letter: str, limit: float) -> str:
    """Run a section in a process group of its own, print what it found, and the end of its output where it failed."""
    results, log_file = OUT / "gpu.jsonl", OUT / "log.txt"
    shown = len(results.read_text().splitlines()) if results.exists() else 0
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT), str(ROOT / "benchmarks")]))
    variables = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log_file.open("ab") as log:
        began = log.tell()
        process = subprocess.Popen(
            section_command(letter), stdout=log, stderr=log, env=variables, start_new_session=True
        )
        try:
            result = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            result = "too slow"
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left running, Ray's processes among it
        process.wait()
    for line in results.read_text().splitlines()[shown:] if results.exists() else []:
        values = json.loads(line)
        where = f"{values.pop('section')} {values.pop('what')}:"
        short = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={str(v)[:200]}" for k, v in values.items())
        print(" ".join([where, *short])[:600])
    if result != "done":
        print(log_file.read_bytes()[began:].decode(errors="replace")[-2500:], flush=True)
    return result


def child(letter: str) -> int:
    """Run a section in this process. Does not return: interpreters full of native extensions can hang in their teardown."""
    results.section_name = letter
    try:
        with timed("done"):
            SECTIONS[letter][0]()
        status = 0
    except BaseException as error:
        traceback.print_exc()
        emit("failed", error=f"{type(error).__name__}: {error}"[:1500])
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
