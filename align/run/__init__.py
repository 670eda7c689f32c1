"""What a run leaves behind and shows: its directory, environment, metrics, samples, and progress."""

from align.run.directory import RunDirectory, read_status
from align.run.environment import check_machine, environment_record
from align.run.files import cut, json_line, synced_size, write_atomically
from align.run.metrics import MetricsLog
from align.run.progress import Progress
from align.run.samples import read_jsonl, read_samples, write_jsonl, write_samples
from align.run.secrets import redacted
from align.run.stacks import save_stacks

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
    "save_stacks",
    "synced_size",
    "write_atomically",
    "write_jsonl",
    "write_samples",
]
