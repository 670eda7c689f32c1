"""What the threads of the engines' processes were doing when something took too long."""

from align.run.directory import RunDirectory
from align.run.secrets import redacted


def save_stacks(directory: RunDirectory, stacks: str) -> str | None:
    """Write them into the run. Returns the file's path in it, None where there are none."""
    if not stacks:
        return None
    directory.stacks_directory.mkdir(exist_ok=True)
    file = directory.stacks_directory / f"{len(list(directory.stacks_directory.iterdir())) + 1:03d}.txt"
    file.write_text(redacted(stacks), encoding="utf-8")
    return str(file.relative_to(directory.path))
