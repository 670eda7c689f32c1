"""Tasks of the reasoning_gym package: `answer` scores a completion, `job` runs the task's own scorer in a worker."""
