"""The two ways a command ends badly. An entry point prints the one line and leaves with the status."""


class UsageError(Exception):
    """What the user asked for cannot be done, seen before anything is allocated. Exit status 2."""

    status = 2


class RunError(Exception):
    """Something failed while running. Exit status 1; the last checkpoint is intact."""

    status = 1


class Preempted(Exception):
    """The run was saved after SIGTERM or Ctrl-C; the same command goes on. Exit status 75 (EX_TEMPFAIL)."""

    status = 75
