"""Compiled programs on disk, so that a run that goes on does not compile again."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from stare_jax.sharding import pod


@contextlib.contextmanager
def keep_compiled(directory: Path) -> Iterator[None]:
    """Keeps what is compiled while open in a folder, unless `jax_compilation_cache_dir` names another already.

    The folder belongs to one process, of several to process 0: two that write at once would read each other's
    half-written files.
    """
    if not pod.is_main() or jax.config.jax_compilation_cache_dir:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
