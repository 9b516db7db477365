"""The import command in a process of its own: the software renderer crashes in one that has loaded TensorFlow."""

import contextlib
import io
from typing import NamedTuple
from unittest import mock


class Done(NamedTuple):
    """End of a call of the command."""

    status: int
    output: str
    error: str


def run(arguments, *, stop_after=None, kill_at=None) -> Done:
    """Calls the command.

    Args:
        arguments: of the command line.
        stop_after: number of episodes after which it is asked to stop, as by Ctrl-C.
        kill_at: index of the episode at which it is killed, with nothing saved.
    """
    import import_rlds as command

    from stare_jax.data import import_rlds as importer

    num_polls = 0

    class Interruption(command.Interruption):
        @property
        def requested(self):
            nonlocal num_polls
            num_polls += 1
            return num_polls == stop_after

        @requested.setter
        def requested(self, value):
            pass

    append = importer._append

    def append_or_die(*call, index, **more):
        if index == kill_at:
            raise KeyboardInterrupt
        return append(*call, index=index, **more)

    output, error = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(command, "Interruption", Interruption))
        stack.enter_context(mock.patch.object(importer, "_append", append_or_die))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(error))
        status = command.main(arguments)
    return Done(status, output.getvalue(), error.getvalue())
