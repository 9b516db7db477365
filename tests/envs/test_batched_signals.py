import copy
import functools

import jax
import numpy as np
import pytest

from stare_jax.envs.maniskill.batched_signals import BatchedSignalReader
from stare_jax.envs.maniskill.dlpack import torch_to_jax
from stare_jax.envs.maniskill.scenes import SCENES
from stare_jax.envs.seeds import DEMO_SEEDS
from stare_jax.envs.tasks import make_expert

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy:UserWarning"),
]


def separated(env):
    """Returns the environment as it is in a batch, with the same scene."""
    from stare_jax.envs.maniskill.batched_widowx import separate_environments

    twin = copy.copy(env)
    separate_environments(twin)
    return twin


@pytest.mark.parametrize("env_id", SCENES)
def test_signals_are_those_of_the_single_environments_reader(env_id, simulators, request, monkeypatch):
    if SCENES[env_id].num_starts:
        request.getfixturevalue("widowx_assets")
    simulator, expert = simulators(env_id), make_expert(env_id)
    reader, seen, judged = BatchedSignalReader(simulator.env, SCENES[env_id]), set(), set()
    look, env = simulator._reader.look, simulator.env
    twin = separated(env) if SCENES[env_id].num_starts else env
    # ManiSkill counts grasps whenever it is asked, so it is asked once a state.
    monkeypatch.setattr(env, "evaluate", functools.cache(env.evaluate))
    monkeypatch.setattr(simulator._reader, "look", lambda: (look(), reader.look()))

    def compare(signals, is_first):
        theirs, info = env.evaluate(), twin.evaluate()
        assert {name: bool(info[name]) for name in theirs} == {name: bool(theirs[name]) for name in theirs}
        judged.update(name for name in theirs if theirs[name])
        reading = torch_to_jax(reader.ask(info["success"]))
        batch = reader.read(reading, np.array([is_first]))
        np.testing.assert_allclose(reading.gripper_opening, [simulator._reader.gripper_opening()], atol=1e-6)
        for name, value in signals._asdict().items():
            got = np.asarray(getattr(batch, name))
            assert got.dtype == np.asarray(value).dtype and got.shape == (1, *np.shape(value)), name
            np.testing.assert_allclose(got[0], value, atol=1e-6, err_msg=name)
        seen.update(name for name in ("is_grasped", "is_contact", "success") if getattr(signals, name))

    for seed in (2, DEMO_SEEDS + 2):  # The second episode is another one, and begins with the contacts of the first.
        env.evaluate.cache_clear()
        memory, signals = expert.init(), simulator.reset(seed).signals
        if twin is not env:
            twin.set_state_dict(twin.get_state_dict())
        compare(signals, True)
        for _ in range(30):
            action, memory = expert.act(signals, memory)
            env.evaluate.cache_clear()
            signals = simulator.step(action).signals
            compare(signals, False)
    assert {"is_contact", "success"} <= seen
    if twin is not env:
        assert judged == {"success", "src_on_target", "is_src_obj_grasped", "consecutive_grasp"}
    assert "is_grasped" in seen or env_id in ("PushCube-v1", "PullCube-v1")


def test_half_heights_are_those_of_each_environments_own_objects(simulators, widowx_assets):
    env_id = "PutCarrotOnPlateInScene-v1"
    on_top = SCENES[env_id].on_top(simulators(env_id).env)
    quats = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    quats /= np.linalg.norm(quats, axis=-1, keepdims=True)
    alone = [on_top(*pair) for pair in zip(*quats, strict=True)]
    assert np.ptp(alone) > 0.01
    np.testing.assert_allclose(jax.vmap(on_top)(*quats), alone, atol=1e-6)
