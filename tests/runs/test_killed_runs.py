"""Runs that are killed at random moments, and gone on with by the same command, are the run that nobody killed."""

import json
import subprocess
import sys

import killed_toy


def run_killed(base, num_kills, seed):
    """Returns the outcome of `killed_toy.main`, in a process of its own, and what it printed."""
    command = [sys.executable, killed_toy.__file__, str(base), str(num_kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((base / "outcome.json").read_text()), done.stdout


def test_killed_runs_are_the_run_that_nobody_killed(tmp_path):
    outcome, printed = run_killed(tmp_path, num_kills=10, seed=1)
    assert len(outcome["kills"]) == 10, printed
    assert outcome["lost"] == [] and outcome["different"] == [] and outcome["again"] == [], printed
    # What was compared: every phase's parameters and history, both data sets, every evaluation.
    kinds = ("sft: parameters", "tpo: parameters", "ppo: parameters", "demos: history", "pairs: history")
    kinds += ("ppo: history", "ppo: counters", "demos: frames", "pairs: frames", "pairs: pairs", "ppo: evaluation")
    assert set(kinds) <= set(outcome["names"])


def test_what_differs_is_found():
    whole = {"ppo: parameters": {"kernel": "aa"}, "ppo: history": [{"step": 1}]}
    other = {"ppo: parameters": {"kernel": "ab"}, "ppo: history": [{"step": 1}], "x": 1}
    assert killed_toy.kill.differing(whole, whole) == []
    assert killed_toy.kill.differing(whole, other) == ["ppo: parameters", "x"]
