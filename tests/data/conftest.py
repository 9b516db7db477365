import jax
import made_trajectories
import numpy as np
import pytest


@pytest.fixture
def make_trajectory():
    return made_trajectories.make_trajectory


@pytest.fixture
def assert_same():
    """Says whether two trees are equal to the bit."""

    def check(got, expected):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            assert a.dtype == b.dtype and a.shape == b.shape, (path, a.dtype, a.shape, b.dtype, b.shape)
            assert a.tobytes() == b.tobytes(), path

    return check
