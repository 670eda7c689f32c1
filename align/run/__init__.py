"""What a run leaves behind and shows: its directory, checkpoints, files, log and progress, and the machine it is on."""

from align.run.directory import RunDirectory, read_status
from align.run.files import (
    cut,
    json_line,
    read_jsonl,
    read_samples,
    redacted,
    synced_size,
    write_atomically,
    write_jsonl,
    write_samples,
)
from align.run.log import MetricsLog
from align.run.machine import check_machine, environment_record
from align.run.progress import Progress

__all__ = [
    "MetricsLog",
    "Progress",
    "RunDirectory",
    "check_machine",
    "cut",
    "environment_record",
    "json_line",
    "read_jsonl",
    "read_samples",
    "read_status",
    "redacted",
    "synced_size",
    "write_atomically",
    "write_jsonl",
    "write_samples",
]
