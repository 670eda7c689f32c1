"""What a run leaves behind and shows: its directory, environment, metrics, samples, and progress."""

from align.run.directory import RunDirectory, read_status
from align.run.environment import check_machine, environment_record
from align.run.files import json_line, write_atomically
from align.run.metrics import MetricsLog
from align.run.progress import Progress
from align.run.samples import read_jsonl, read_samples, write_jsonl, write_samples
from align.run.stacks import save_stacks

__all__ = [
    "MetricsLog",
    "Progress",
    "RunDirectory",
    "check_machine",
    "environment_record",
    "json_line",
    "read_jsonl",
    "read_samples",
    "read_status",
    "save_stacks",
    "write_atomically",
    "write_jsonl",
    "write_samples",
]
