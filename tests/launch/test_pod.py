"""Runs of two processes with four devices each, by the command that users start, beside one with eight."""

import in_pod

from stare_jax.logging import read_metrics


def test_two_processes_train_as_one_does(tmp_path):
    first, second = in_pod.reports(in_pod.finish(in_pod.start("record", tmp_path)))
    assert first["code"] == second["code"] == 0
    assert (first["shared"], second["shared"]) == ([0, 1], [2, 3, 4])
    assert (first["dealt"], second["dealt"]) == ([0, 1, 4, 5], [2, 3, 6, 7])
    assert first["layouts"] == second["layouts"] == [[4, 1, 1], [1, 4, 1], [1, 2, 2], [1, 1, 4]]
    assert first["refused"] == [
        "mesh: got data x fsdp x tensor = (1, 2, 1), expected all 8 devices of 2 processes; data = -1 takes them",
        "size: got 12, expected a multiple of 8, all devices, as tensor = 8 goes across hosts",
    ]
    # One process wrote, of the episodes of both.
    lines = [line for line in read_metrics(tmp_path / "two") if line["phase"] == "ppo"]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["env/num_episodes"] == 8 for line in lines) and lines[-1]["perf/compilations"] == 0

    (alone,) = in_pod.reports(in_pod.finish(in_pod.start("replay", tmp_path, num_processes=1)))
    assert alone["codes"] == [0, 0]
    # Sums over devices are taken in another order.
    assert max(alone[phase] for phase in ("sft", "tpo", "ppo")) < 1e-6 < 5e-6 < min(alone["moved"].values())
