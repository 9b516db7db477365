"""The table of benchmarks/rollout.py, over toys."""

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
