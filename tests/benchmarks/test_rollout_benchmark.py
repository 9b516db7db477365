"""The table of benchmarks/rollout.py, over toys."""

import dataclasses
import time

import pytest

from benchmarks import rollout
from stare_jax.envs import EnvConfig, toy
from stare_jax.envs.groups import GroupedEnvs


def test_every_case_has_a_row_whose_parts_are_the_whole(monkeypatch, capsys):
    monkeypatch.setattr(
        rollout, "make_vec_env", lambda config: GroupedEnvs([toy.ToyPush(config.num_envs // 2) for _ in range(2)])
    )
    config = EnvConfig(num_workers=2, envs_per_worker=1, num_groups=2, image_size=0)
    rows = rollout.compare(config, chunk=2, rounds=1, repeats=1)
    assert [row["case"] for row in rows] == [case.name for case in rollout.cases(2)]
    for row in rows:
        parts = [row[f"{area}_fraction"] for area in rollout.AREAS]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(1, abs=0.02)
        assert row["steps_per_s"] > 0 and (row["ratio"] == 1 or row["beside"])
    assert rows[1]["policy_fraction"] > rows[0]["policy_fraction"]
    rollout.print_table(rows)
    assert "dear policy, two groups" in capsys.readouterr().out
    slow = {"reset_ms": 3.0, "step_ms": 2.0, "ratio": 1.5}
    found = rollout.goals([row | {"other_fraction": 0.01, "ratio": 2.5} for row in rows], {"spares": slow})
    assert [(row["found"], row["is_met"]) for row in found] == [(0.01, True), (2.5, True), (2.5, True), (1.5, False)]
    rollout.print_goals({"spares": slow}, found)
    said = capsys.readouterr().out
    assert "spares: 3.0 ms a step with resets, 2.0 ms without, 1.50" in said and said.count("MISSED") == 1


def test_steps_with_resets_are_measured_beside_those_without(monkeypatch):
    """In the place of processes: a reset takes long, unless a spare simulator has begun the episode."""
    begun, used = {}, []

    class Slow(toy.ToyPush):
        def step(self, action, reset_seeds=None, *, next_seeds=None, **options):
            is_ready = [seed in begun.values() for seed in reset_seeds.values()]
            used.extend(is_ready)
            time.sleep(0.002 + 0.02 * (len(is_ready) - sum(is_ready)))
            begun.clear()
            begun.update(next_seeds)
            return super().step(action[:, :2], reset_seeds)

    monkeypatch.setattr(rollout, "make_vec_env", lambda config: Slow(config.num_envs))
    config, found = EnvConfig(num_workers=2, envs_per_worker=3, image_size=0), []
    for has_spares in (False, True):
        used.clear()
        found.append(rollout.measure_resets(dataclasses.replace(config, has_spares=has_spares), 16))
        assert used == [has_spares] * 8  # every fourth step, in both processes
    assert found[0]["reset_ms"] > 40 and found[0]["ratio"] > found[1]["ratio"]
