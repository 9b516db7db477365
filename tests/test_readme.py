"""The README's Python: the lines that train are run as they stand, and train."""

import re
from pathlib import Path

import jax

from stare_jax.envs import toy
from stare_jax.evaluate.protocol import EvalConfig, evaluate

README = Path(__file__).resolve().parents[1] / "README.md"


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


def test_the_lines_that_train_ppo_train_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (lines,) = [block for block in python_blocks() if "train_ppo" in block]
    names: dict = {}
    exec(compile(lines, "README.md", "exec"), names)
    config, spec = EvalConfig(num_episodes=64, num_videos=0), toy.task_spec()
    evaluation, _ = evaluate(names["policy"], names["params"], toy.ToyPush(64), spec, config, key=jax.random.key(0))
    assert evaluation.episodes.success_once.mean() > 0.9


def test_the_lines_about_stages_name_functions_that_exist():
    from stare_jax import losses, stages

    (lines,) = [block for block in python_blocks() if "stages.separate" in block]
    rooms = {"stages": stages, "losses": losses}
    called = re.findall(r"\b(stages|losses)\.(\w+)\(", lines)
    assert len(called) >= 6
    for room, function in called:
        assert callable(getattr(rooms[room], function))
