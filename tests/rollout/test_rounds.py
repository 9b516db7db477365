"""Episodes that are lost with a simulator are run again."""

import jax
import numpy as np
import pytest
from test_collect import SCRIPTS, SEEDS, Script, ScriptedEnv, scripted_act

from stare_jax.rollout.collect import collect_episodes, get_episode
from stare_jax.rollout.rounds import MAX_TRIES, collect_round


def collect(scripts, seeds, **options):
    return collect_episodes(ScriptedEnv(2, scripts), scripted_act, seeds, stop_at_success=True, **options)


@pytest.mark.parametrize("as_a_whole", [False, True])
def test_a_lost_episode_is_run_again_and_reported_once(as_a_whole, caplog):
    tries, reported = [], []

    def run(chosen, on_episode):
        tries.append(list(chosen))
        scripts = SCRIPTS | ({11: Script(dies_at=1), 14: Script(dies_at=0)} if len(tries) == 1 else {})
        seeds = [SEEDS[e] for e in chosen]
        return collect(scripts, seeds, on_episode=on_episode, keep_images=lambda e, episode: seeds[e] != 12)

    def report(episode):
        reported.append(int(episode.observation.state[0, 0]))  # its seed

    rollout = collect_round(run, 7, as_a_whole=as_a_whole, on_episode=report)
    expected = collect(SCRIPTS, SEEDS)
    assert tries == [list(range(7)), list(range(7)) if as_a_whole else [1, 4]]
    assert sorted(reported) == SEEDS and rollout.num_dropped == 0 and rollout.is_complete
    assert rollout.instructions == expected.instructions and "2 of 7 episodes were lost" in caplog.text
    again = 22 if as_a_whole else 4 + 4
    assert rollout.num_steps == 22 - 4 - 4 + 1 + again  # the lost ones took one action and none
    assert sorted(rollout.images) == [0, 1, 3, 4, 5, 6]
    for e in rollout.images:
        jax.tree.map(np.testing.assert_array_equal, get_episode(rollout, e), get_episode(expected, e))


def test_an_episode_that_is_always_lost_is_given_up():
    tries = []

    def run(chosen, on_episode):
        tries.append(list(chosen))
        return collect(SCRIPTS | {12: Script(dies_at=2)}, [SEEDS[e] for e in chosen], on_episode=on_episode)

    rollout = collect_round(run, 7, as_a_whole=False, on_episode=lambda episode: None)
    assert tries == [list(range(7))] + [[2]] * (MAX_TRIES - 1)
    assert rollout.num_dropped == 1 and rollout.images is None
    np.testing.assert_array_equal(rollout.trajectory.valid.any(axis=1), [1, 1, 0, 1, 1, 1, 1])


def test_a_round_that_is_stopped_is_not_complete():
    rollout = collect_round(
        lambda chosen, on_episode: collect(SCRIPTS, SEEDS, on_episode=on_episode, should_stop=lambda: True),
        7,
        as_a_whole=False,
        on_episode=lambda episode: None,
    )
    assert not rollout.is_complete
