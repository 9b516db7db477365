"""The benchmark of pi0.5: a peer that agrees is timed, one that does not is refused; costs by hand and by XLA."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pi05
import pi05_cases
import pi05_naive
import pytest

from stare_jax.config import ConfigError
from stare_jax.models import pi05_base
from stare_jax.models.nn.linear import Execution
from stare_jax.plan.pi05_cost import gemma_weights, imitation_flops, prefix_length, sampling_phases, tower_weights
from stare_jax.state.optimizer import merge_params, split_params

TINY = ["--size=tiny", "--batch=2", "--steps=2", "--cameras=2", "--window=3", "--passes=1", "--repeats=2"]


def without_time(sizes, params):
    """The naive peer, but for what makes scale, shift and gate of the expert's last norm: that is zero."""
    name = "PaliGemma/llm/final_norm_1/Dense_0/kernel"
    return pi05_naive.make_sampler(sizes, params | {name: jnp.zeros_like(params[name])})


@pytest.mark.slow
def test_a_peer_is_timed_and_compared(tmp_path, capsys):
    out = tmp_path / "result.json"
    pi05.main([*TINY, "--cases=sample,act,sft", "--train-batch=2", "--peer=pi05_naive:make_sampler", f"--out={out}"])
    result = json.loads(out.read_text())
    ours, peer, act, device, sft = result["rows"]
    assert (act["case"], device["case"]) == ("act", "act device") and len(act["seconds"]) == len(device["seconds"]) == 2
    assert (ours["implementation"], peer["implementation"]) == ("stare_jax", "pi05_naive:make_sampler")
    assert len(ours["seconds"]) == len(peer["seconds"]) == len(sft["seconds"]) == 2 and peer["difference"] < 1e-3
    assert ours["ratio"] == peer["median_s"] / ours["median_s"] and ours["flops"] == peer["flops"] > 0
    assert sft["case"] == "sft expert" and sft["loss"] > 0 and result["errors"] == []
    assert {"command", "machine", "versions", "peak"} <= set(result) and result["machine"]["device"] == "cpu"
    assert "pi05_naive:make_sampler" in capsys.readouterr().out


@pytest.mark.slow
def test_a_peer_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(pi05_naive, "without_time", without_time, raising=False)
    with pytest.raises(SystemExit, match="sample 2: DisagreementError: actions: got a difference .* expected <= 0.001"):
        pi05.main([*TINY, "--cases=sample", "--peer=pi05_naive:without_time"])


def test_a_peer_is_a_function_of_a_file_or_of_a_module(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def make_sampler(sizes, params):\n    return sizes\n")
    assert pi05_cases.load_peer(f"{file}:make_sampler")(3, None) == 3
    assert pi05_cases.load_peer("pi05_naive:make_sampler") is pi05_naive.make_sampler
    for name, said in (
        ("pi05_naive", "expected FILE.py:function or module:function"),
        (f"{file}:sampler", "no attribute 'sampler'"),
        (f"{tmp_path}/none.py:sampler", "No such file"),
        ("no_module:sampler", "No module named 'no_module'"),
    ):
        with pytest.raises(ConfigError, match=f"^--peer: got '{name}'.*{said}"):
            pi05_cases.load_peer(name)


def test_the_costs_of_the_published_model():
    config = pi05_base(cameras=pi05_cases.CAMERAS, window=50, num_denoising_steps=10)
    # 414.8 and 1981.9 million weights, the embedding table apart; the expert's 427.9 less 116.5 of its norms.
    assert 413e6 < tower_weights(config) < 415e6 and prefix_length(config) == 968
    assert gemma_weights(config.paligemma) == pytest.approx(2_508_531_712 - 526_647_296, rel=1e-3)
    assert gemma_weights(config.expert) == pytest.approx(427_932_672 - 116_505_600, rel=1e-3)
    prefix, conditions, *steps = sampling_phases(config, 1, 10, 2)
    # Keys and values of 18 layers and 968 tokens are 17.8 MB.
    assert len(steps) == 10 and prefix.bytes == pytest.approx(2 * 2396.7e6 + 17.8e6, rel=1e-3)
    assert steps[0].bytes == pytest.approx(2 * 311.4e6 + 17.8e6, rel=1e-3) and conditions.bytes < 0.25e9
    # Products 2 (768 * 413.9e6 + 968 * 1981.9e6), attention 4 (3 * 27 * 256² * 1152 + 18 * 968² * 2048).
    assert prefix.flops == pytest.approx(0.636e12 + 3.837e12 + 0.024e12 + 0.138e12, rel=1e-3)


def unrolled():
    """Wide enough for products to outweigh all else; without loops, whose bodies XLA counts once."""
    config = pi05_cases.make_config("tiny", "float32", num_cameras=2, window=3, num_denoising_steps=1)
    wide = {"width": 128, "mlp_dim": 512, "head_dim": 32}
    return dataclasses.replace(
        config,
        siglip=dataclasses.replace(config.siglip, width=128, mlp_dim=512),
        paligemma=dataclasses.replace(config.paligemma, **wide),
        expert=dataclasses.replace(config.expert, **wide),
        image_size=56,
        execution=Execution(unroll=2),
        value_dims=(8,),
    )


@pytest.mark.parametrize("trained", ["expert", "full"])
def test_costs_agree_with_xla(trained):
    config = dataclasses.replace(
        unrolled(), frozen_patterns=pi05_cases.make_trained(unrolled(), trained, "none").frozen_patterns
    )
    policy, batch = pi05_cases.build(config), 2
    params = jax.eval_shape(policy.init, jax.random.key(0))
    observation, key = policy.observation_shape(batch), jax.eval_shape(lambda: jax.random.key(0))
    if trained == "full":
        counted = jax.jit(policy.sample).lower(params, observation, key).cost_analysis()["flops"]
        assert 1.0 < counted / sum(phase.flops for phase in sampling_phases(config, batch, 1, 4)) < 1.1

    def loss(moving, still, observation, action, key):
        return policy.imitation_loss(merge_params(moving, still), observation, action, key=key)[0].mean()

    moving, still = split_params(params, policy.frozen_patterns)
    shape = jax.ShapeDtypeStruct((batch, 3, 7), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    counted = jax.jit(jax.grad(loss)).lower(moving, still, observation, shape, keys).cost_analysis()["flops"]
    needed = imitation_flops(config, batch, is_prefix_trained=trained == "full")
    assert counted / needed == pytest.approx(1.0, abs=0.1)
