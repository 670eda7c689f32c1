"""What runs in the zygote's process and in the sandbox: the standard library only, and relative imports only.

The zygote is started as `python -I -S` and imports this package under the name `child`, so that nothing of the
trainer, of its packages or of its environment is ever in a process that could run a candidate. The chain of
processes, each the parent of the next:

    zygote      `zygote.py`: builds the read-only root once; forks a supervisor for each run; reads no program
    supervisor  `supervisor.py`: enters new namespaces, kills the run at its deadline or when its owner goes
    init        `init.py`: process 1 of the run; one child and one empty /tmp for each case; reports how it ended
    case        `case.py`: gives everything up (`confine.py`), then runs the candidate, or the tests that call it

For trusted work on what a model wrote, such as algebra, the zygote is a Python that sees the installed packages and loads a
job in place of the root; the supervisor enters no namespaces, and its one child is a `worker.py`.
"""
