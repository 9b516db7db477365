"""Several tasks at once: every row by its own task."""

import dataclasses

import jax
import numpy as np
import pytest
from stage_signals import random_signals, with_params

from stare_jax.stages import as_specs, by_task, get_task, potentials, separate, shared_stage_names
from stare_jax.stages.spec import TaskSpec

SPECS = tuple(map(get_task, ("StackCube-v1", "PushCube-v1", "LiftPegUpright-v1")))


def trace(spec, signals):
    separation = separate(spec, signals)
    return separation, potentials(spec, signals, separation)


def test_a_row_is_labelled_and_scored_by_its_own_task():
    task = np.array([2, 0, 1, 1, 0, 2], np.int32)
    rows = [random_signals(seed, 12) for seed in range(len(task))]
    signals = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    together = jax.jit(jax.vmap(by_task(SPECS, trace)))(task, signals)
    assert len({np.asarray(together[1][i]).tobytes() for i in range(len(task))}) > 1
    for i, row in enumerate(rows):
        alone = jax.jit(trace, static_argnums=0)(SPECS[task[i]], row)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-6), together, alone)


def test_one_task_asks_for_no_index():
    signals = random_signals(0, 12)
    got = by_task(SPECS[1], trace)(None, signals)
    jax.tree.map(np.testing.assert_array_equal, got, trace(SPECS[1], signals))
    assert as_specs(SPECS[1]) == as_specs((SPECS[1],)) == (SPECS[1],)


def test_tasks_have_the_same_number_of_stages():
    push = SPECS[1]
    cut = {name: getattr(push, name)[:3] for name in ("stage_names", "event_fns", "cost_fns", "potential_fns")}
    shorter = dataclasses.replace(push, env_id="Short-v0", distance_fns=push.distance_fns[:3], **cut)
    assert isinstance(shorter, TaskSpec) and shorter.num_stages == 3
    with pytest.raises(ValueError, match="tasks: got .*'PushCube-v1': 4, 'Short-v0': 3.* stages, expected .* the same"):
        as_specs((push, shorter))
    with pytest.raises(ValueError, match="expected at least one task"):
        as_specs(())


def test_stages_keep_their_names_where_all_tasks_have_them():
    push = SPECS[1]
    assert shared_stage_names((push, with_params(push, d_push=0.3))) == push.stage_names
    assert shared_stage_names(SPECS) == ("stage 1", "stage 2", "stage 3", "stage 4")
