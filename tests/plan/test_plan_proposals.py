"""Mesh, microbatches and rematerialisation that fit best: estimates by hand, and what is chosen of them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from nano_policy import nano_config

from stare_jax.envs import EnvConfig
from stare_jax.models import LoRAConfig, pi05_maniskill
from stare_jax.plan import changes, proposals
from stare_jax.plan.chips import Chip, Devices, Peak
from stare_jax.plan.page import print_fit
from stare_jax.plan.programs import Forecast, batch_rows, num_microbatches
from stare_jax.plan.stacks import Stack, kept_bytes, stacks_of
from stare_jax.runs.config import MeshConfig, RunConfig
from stare_jax.sharding.mesh import make_abstract_mesh
from stare_jax.stages import get_task
from stare_jax.train.ppo import PPOConfig

CHIP = Chip(Peak(1e12, 1e11), 1e9, 1e10)
ROWS, EIGHT = 64, MeshConfig(1, 8)


def forecast_of(name, **changes):
    """A program that was compiled, or might have been."""
    numbers = {"arguments": 3e6, "outputs": 1e5, "reused": 1e5, "intermediates": 8e7, "beside": 0, "flops": 1e9}
    times = dict.fromkeys(("cycles", "compute_s", "memory_s", "products_s", "exchange_s"))
    known = {"num_rows": ROWS, "needed": None, "exchanges": (), "compile_s": 1.0, "num_unknown_loops": 0}
    return Forecast(program=name, **(known | numbers | times | changes))


@pytest.fixture(scope="module")
def config():
    model = nano_config(lora=LoRAConfig(rank=4))
    ppo = PPOConfig(minibatch_size=ROWS, microbatch_size=16)
    env = EnvConfig("PushCube-v1", num_workers=2, envs_per_worker=4, horizon=8, image_size=model.image_size)
    return RunConfig(env, model, get_task("PushCube-v1").params, phases=("ppo",), ppo=ppo, mesh=EIGHT)


@pytest.fixture(scope="module")
def programs(config):
    return [proposals.program_of(forecast_of(name), config) for name in ("sample", "ppo")]


def fits(config, programs, memory, scale=None):
    return proposals.best_fits(config, programs, 8, memory, CHIP, scale or {})


def test_bytes_on_a_device_are_those_of_its_part():
    sharding = NamedSharding(make_abstract_mesh(), P("fsdp", ("tensor", "data")))
    tree = {"w": jax.ShapeDtypeStruct((8, 24), jnp.bfloat16, sharding=sharding)}
    assert proposals.cut_bytes(tree, MeshConfig(3, 4, 2)) == 8 / 4 * 24 / 6 * 2
    assert proposals.cut_bytes(tree, MeshConfig(1, 3, 1)) is None


def test_meshes_take_all_devices():
    meshes = [dataclasses.astuple(mesh) for mesh in proposals.meshes_of(6)]
    assert len(meshes) == len(set(meshes)) == 9 and all(d * f * t == 6 for d, f, t in meshes)
    assert len(proposals.meshes_of(8)) == 10


def test_layers_keep_less_with_rematerialisation():
    # Two layers of five tokens: their inputs of 8 numbers; 30 of products; three times these and 20 of attention.
    stack = Stack(depth=2, tokens=5, width=8, products=30, scores=20)
    assert [stack.kept(remat) for remat in ("full", "dots", "none")] == [80, 380, 2 * 5 * (8 + 90 + 20)]
    assert kept_bytes([stack], "full", 2) == 2 * (80 + 5 * 118) and stack.summed == 160


def test_frozen_images_and_text_keep_nothing():
    whole, expert = (stacks_of(pi05_maniskill(), is_prefix_trained=is_trained) for is_trained in (True, False))
    assert [stack.depth for stack in whole] == [27, 18, 18] and expert == whole[2:]


def test_an_estimate_of_the_given_configuration_is_what_was_compiled(config, programs):
    for program in programs:
        found = proposals.estimate(program, config, config, CHIP)
        assert found.peak == pytest.approx(program.forecast.peak, rel=1e-6)
        assert found.compute == pytest.approx(program.forecast.flops / CHIP.peak.flops)
        assert found.exchange > 0 and found.memory > 0
    halved = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, microbatch_size=8))
    before, after = (proposals.estimate(programs[1], config, one, CHIP) for one in (config, halved))
    # Half the rows at a time: half of what layers keep, and weights read and gathered twice as often.
    trained = proposals.cut_bytes(programs[1].trained, EIGHT)
    assert before.peak - after.peak == pytest.approx((programs[1].forecast.intermediates - 2 * trained) / 2)
    assert after[2:] == pytest.approx([2 * time for time in before[2:]]) and after.compute == before.compute


def test_what_fits_is_in_the_order_of_its_time(config, programs):
    most = fits(config, programs, 1e12)
    assert [fit.order for fit in most] == sorted(fit.order for fit in most)
    # Where there is memory for everything nothing is computed twice.
    assert most[0].config.model.execution.remat != "full"
    assert num_microbatches(most[0].config, "ppo") == 1 == most[0].config.mesh.tensor
    limit = 1.1 * max(program.forecast.peak for program in programs)
    assert max(one.peak for one in most[0].estimates.values()) > limit
    fewer = fits(config, programs, limit)
    assert 0 < len(fewer) <= len(most) and fewer[0].order >= most[0].order
    for fit in fewer:
        assert max(one.peak for one in fit.estimates.values()) <= limit
        mesh, size = fit.config.mesh, fit.config.ppo.microbatch_size or batch_rows(fit.config, "ppo")
        assert mesh.data * mesh.fsdp * mesh.tensor == 8 and size % (mesh.data * mesh.fsdp) == 0 == ROWS % size
    assert fits(config, programs, 1.0) == []


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ((2, 4, 1), [(1, 4), (1, 2), (1, 1)]),
        ((4, 4, 2), [(2, 4), (2, 2), (2, 1)]),
        ((6, 2, 2), [(6, 1)]),
        ((3, 1, 3), []),
        ((64, 1, 2), [(32, 1), (16, 1), (8, 1), (4, 1)]),
    ],
)
def test_fewer_simulators_are_fewer_of_every_group(config, layout, expected):
    names = ("num_workers", "envs_per_worker", "num_groups")
    env = dataclasses.replace(config.env, **dict(zip(names, layout, strict=True)))
    found = [*changes._fewer_rows(dataclasses.replace(config, env=env), "sample")]
    assert [(one.config.env.num_workers, one.config.env.envs_per_worker) for one in found] == expected
    assert [one.rows for one in found] == [0.5 ** (k + 1) for k in range(len(expected))]
    for one in found:
        changed = {name: getattr(one.config.env, name) for name in names}
        assert one.flags == {f"env.{n}": size for n, size in changed.items() if size != getattr(env, n)}


def test_the_best_is_compiled_until_one_fits(config, programs, capsys, monkeypatch):
    traced = {program.forecast.program: program for program in programs}
    monkeypatch.setattr(proposals, "program_of", lambda found, config: traced[found.program])
    found, limit = [program.forecast for program in programs], 1e12
    devices, compiled = Devices("8x1GB", 8, limit, None), []

    def forecast(name, changed):
        compiled.append((name, changed))
        is_first = changed == compiled[0][1]
        return forecast_of(name, intermediates=2e12 if is_first and name == "ppo" else 8e7)

    best = proposals.propose(config, found, devices, 8, forecast, max_compilations=3)
    first, second = (changed for name, changed in compiled if name == "ppo")
    assert best.config == second != first and [one.program for one in best.forecasts] == ["sample", "ppo"]
    # The next one is far smaller, as the first took so much more than its estimate.
    smaller = proposals.estimate(programs[1], config, second, CHIP).peak
    assert smaller < proposals.estimate(programs[1], config, first, CHIP).peak
    print_fit(best, config, devices, 8)
    said = capsys.readouterr().out
    assert "fits best by its sizes, at the rates of an A100-80: --config." in said and "\ncompiled:\n" in said

    compiled.clear()
    assert proposals.propose(config, found, devices, 8, forecast, max_compilations=0).forecasts == () == (*compiled,)
    none = proposals.propose(config, found, devices._replace(memory=1.0), 8, forecast, max_compilations=3)
    print_fit(none, config, devices, 8)
    assert none is None and "no mesh, microbatch and rematerialisation was found" in capsys.readouterr().out


def test_prompts_longer_than_any_instruction_are_named(config, capsys):
    long = dataclasses.replace(config, model=dataclasses.replace(config.model, prompt_length=200))
    tokens = proposals.enough_tokens(long)
    text = long.model.prompt_template.replace("{instruction}", long.env.spec.instruction)
    assert len(text) < tokens < 200 and proposals.enough_tokens(config) is None
    # A data set, here or not, may have longer instructions.
    assert proposals.enough_tokens(dataclasses.replace(long, demos_from="elsewhere")) is None
    print_fit(None, long, Devices("8x1GB", 8, 1e9, None), 8)
    assert f"--config.model.prompt_length={tokens} holds all of them" in capsys.readouterr().out
