"""The evaluated toy's fixtures."""

from evaluated_toy import evaluated, expert_act, run_directory, spec  # noqa: F401
