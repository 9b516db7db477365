"""One decision of a model with random weights: launch/plan.py --run-once."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import plan
import pytest

from stare_jax.envs import EnvConfig
from stare_jax.models import MLPConfig, openvla_7b
from stare_jax.models.blank import blank_policy
from stare_jax.plan import once
from stare_jax.plan.page import print_once
from stare_jax.runs.config import RunConfig
from stare_jax.stages import get_task

STATE = "configs/franka_state.py"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """The command prepares its process's environment, and this process goes on with others' tests."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")


SMALL = """
from nano_flow import flow_config

from configs.presets import base_config
from stare_jax.envs import EnvConfig
from stare_jax.models.nn.linear import Execution


def get_config():
    scene = {"siglip": None, "stem": (), "cameras": (), "image_size": 0, "state_tokens": 2}
    model = flow_config(noise="learned", execution=Execution(dtype="bfloat16"), **scene)
    return base_config(EnvConfig("PushCube-v1"), model, name="small")
"""
"""configuration of a small pi0.5, the weights of whose expert are float32 in a run"""


def test_the_command_samples_and_scores_alike(tmp_path, capsys):
    (tmp_path / "small.py").write_text(SMALL, "utf-8")
    config = f"--config={tmp_path / 'small.py'}"
    assert plan.main([config, "--run-once", "--config.model.execution.dtype=float32"]) == 0
    said = capsys.readouterr().out
    assert "in float32" in said and re.search(r"ratio before the first update: (1\.000|0\.999)\d$", said.rstrip())
    parts = ("compiling", "drawing weights", "sampling", "scoring", "peak memory of the process: ")
    assert all(part in said for part in parts)


def test_what_does_not_fit_this_machine_is_refused_before_anything_is_compiled(monkeypatch, capsys):
    monkeypatch.setattr(once, "available_bytes", lambda: 12_000_000_000)
    monkeypatch.setattr(once, "_compile", None)
    assert plan.main(["--config=configs/ipi_widowx.py", "--run-once"]) == 1
    # 7.6 billion weights and 111 million of adapters, in float32.
    message = "error: --run-once: got 12.00 GB of free memory, expected at least 15.4"
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("others", [["--devices=1x8GB"], ["--programs=sample"], ["--propose"]])
def test_options_of_compilations_do_not_go_with_it(others):
    with pytest.raises(SystemExit):
        plan.main([f"--config={STATE}", "--run-once", *others])


def run_of(model):
    env = EnvConfig("PushCube-v1", num_workers=1, envs_per_worker=1, horizon=8)
    return RunConfig(env, model, get_task("PushCube-v1").params, phases=("ppo",))


def test_scores_that_are_not_those_of_the_rollout_are_found(monkeypatch, capsys):
    policy = blank_policy(MLPConfig())

    def log_prob(*inputs, **settings):
        score = policy.log_prob(*inputs, **settings)
        return score._replace(logp=score.logp + 0.01)

    monkeypatch.setattr(once, "blank_policy", lambda model: policy._replace(log_prob=log_prob))
    found = once.decide_once(run_of(MLPConfig()))
    assert not found.agrees and found.difference == pytest.approx(0.01 * len(found.sampled), rel=0.05)
    print_once(found)
    ratio = math.exp(0.01 * len(found.sampled))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"ratio before the first update: {ratio:.2f}") and said.endswith("disagree")
    assert found._replace(dtype="bfloat16").agrees  # whose rounding is larger
    print_once(found._replace(scored=found.scored + 1e4))
    assert "first update: above 22026: more than rounding does" in capsys.readouterr().out


def test_drawn_parameters_hide_nothing_and_keep_the_scale_of_what_goes_through_them():
    shapes = jax.eval_shape(blank_policy(openvla_7b()).init, jax.random.key(0))["llm"]["layers"]
    small = {"q_proj": (2, 64, 4, 16), "o_proj": (2, 4, 16, 64), "down_proj": (2, 256, 64), "input_norm": (2, 64)}
    chosen = {
        name: jax.tree.map(lambda x, shape=shape: jax.ShapeDtypeStruct(shape, x.dtype), shapes[name])
        for name, shape in small.items()
    }
    drawn = once.draw_params({"llm": {"layers": chosen}})["llm"]["layers"]
    norm = np.asarray(drawn.pop("input_norm")["scale"], np.float32)
    assert norm.mean() == pytest.approx(1, abs=0.01) and 0.01 < norm.std() < 0.03
    for name, fan_in in {"q_proj": 64, "o_proj": 64, "down_proj": 256}.items():
        kernel = drawn[name]["kernel"]
        assert kernel.dtype == jnp.bfloat16 and kernel.shape == small[name]
        layers = np.asarray(kernel, np.float32)
        assert layers.std() == pytest.approx(fan_in**-0.5, rel=0.05) and (layers[0] != layers[1]).mean() > 0.9
