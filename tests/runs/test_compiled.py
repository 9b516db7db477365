"""Compiled programs are kept with the run, unless the user keeps them elsewhere."""

import jax
import pytest

from stare_jax.runs.compiled import keep_compiled


@pytest.fixture
def without_folder():
    """No folder is set, and everything is worth keeping."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (None, 0.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_folder_and_read_from_there(without_folder, tmp_path):
    hits = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event.endswith("compilation_cache/cache_hits"))
    )
    for number in range(2):
        with keep_compiled(tmp_path / "compiled"):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
            jax.jit(lambda x: x * 3 + 1)(jax.numpy.arange(7))
        assert any((tmp_path / "compiled").iterdir())
        assert any(hits) == (number == 1)
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_is_set_stays(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert before  # as the tests are run
    with keep_compiled(tmp_path / "compiled"):
        assert jax.config.jax_compilation_cache_dir == before
    assert not (tmp_path / "compiled").exists()
