"""The command that trains, in this process: importing it anew takes seconds."""

import train
from absl import flags


def run_train(arguments):
    """Runs launch/train.py in this process, and returns its exit code."""
    train._values.clear()
    try:
        train.parse_flags(["train.py", *arguments])
        return train.main([])
    except SystemExit as stopped:
        return stopped.code
    finally:
        flags.FLAGS.unparse_flags()
