"""The toy's fixtures."""

from toy_fixtures import make_run, params, policy, spec  # noqa: F401
