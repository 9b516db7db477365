"""Steps and actions of a small OpenVLA on eight fake devices and on one; run by test_sharding.py in its own process.

    python tests/train/sharded_openvla.py

compares everything and prints what it found as one line of JSON; eight_devices.py compares a little of it.
"""

import functools
import json

import jax
import numpy as np
from collectives import moved_out, not_zero3, read_collectives
from nano_policy import INSTRUCTIONS, nano_config, random_observation, random_params, some_stats

from stare_jax.models import LoRAConfig, make_policy
from stare_jax.models.layers import Execution
from stare_jax.rollout.collect import policy_act
from stare_jax.train.optimizer import OptimizerConfig, frozen_params, make_optimizer, merge_params, split_params
from stare_jax.train.ppo import PPOConfig
from stare_jax.train.sft import SFTConfig
from stare_jax.train.sharding import make_mesh, path_name, tree_shardings
from stare_jax.train.state import create_state, place
from stare_jax.train.steps import (
    DecisionBatch,
    PairBatch,
    ScoredTrajectory,
    SFTBatch,
    lower_step,
    make_ppo_step,
    make_sft_step,
    make_tpo_step,
)
from stare_jax.train.tpo import TPOConfig

MESHES = ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8})
FEW = (("ppo", True, 8, MESHES[0]), ("sft", False, None, MESHES[1]))
"""(phase, with adapters, microbatch, mesh), of which all kinds of layout are seen at least once."""
ALL = tuple(
    (phase, has_lora, microbatch, mesh)
    for phase in ("sft", "tpo", "ppo")
    for has_lora in (False, True)
    for microbatch in (None, 8)
    for mesh in MESHES
)
SIZE = 16
# With SGD-like moments (large eps) a difference in rounding stays one.
OPTIMIZER = OptimizerConfig(learning_rate=0.1, eps=1.0)


@functools.cache
def policy_and_params(has_lora):
    config = nano_config(lora=LoRAConfig(rank=4) if has_lora else None, execution=Execution(remat="full"))
    policy = make_policy(config, some_stats(config.action_dim, config.state_dim))
    return policy, random_params(policy)


def observations(policy, size):
    return random_observation(policy, (INSTRUCTIONS * size)[:size])


def sft_batch(policy):
    action = np.random.default_rng(0).uniform(-0.3, 0.5, (SIZE, policy.action_dim))
    return SFTBatch(observations(policy, SIZE), action.astype(np.float32), np.ones(SIZE, bool))


def ppo_batch(policy):
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((4, SIZE)).astype(np.float32)
    numbers[0] -= policy.action_dim * np.log(256)
    tokens = rng.integers(0, 256, (SIZE, policy.action_dim))
    return DecisionBatch(observations(policy, SIZE), tokens, *numbers, np.arange(SIZE) < SIZE - 3)


def pair_batch(policy):
    rng = np.random.default_rng(0)
    shape, num_stages = (SIZE // 2, 2), 3
    observation = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), observations(policy, SIZE))

    def side():
        return ScoredTrajectory(
            observation=observation,
            decision=rng.integers(0, 256, (*shape, policy.action_dim)),
            seed=np.zeros((*shape, 1), np.uint32),
            ref_logp=rng.normal(-16, 1, (*shape, 1)).astype(np.float32),
            valid=np.arange(shape[1]) < rng.integers(1, 3, (shape[0], 1)),
            stage_mask=rng.random((shape[0], num_stages, shape[1])) < 0.5,
            stage_cost=rng.random((shape[0], num_stages)).astype(np.float32),
            completed=rng.random((shape[0], num_stages)) < 0.7,
        )

    return PairBatch(side(), side())


def take_steps(phase, has_lora, microbatch, mesh):
    """Two steps of one compiled program, which takes no other layout than the one it returns; and its text."""
    policy, params = policy_and_params(has_lora)
    settings = {"optimizer": OPTIMIZER, "microbatch_size": microbatch}
    make_step, config, batch, extra = {
        "sft": lambda: (make_sft_step, SFTConfig(batch_size=SIZE, **settings), sft_batch(policy), ()),
        "tpo": lambda: (make_tpo_step, TPOConfig(batch_size=SIZE // 2, **settings), pair_batch(policy), ()),
        "ppo": lambda: (make_ppo_step, PPOConfig(minibatch_size=SIZE, **settings), ppo_batch(policy), (True, 0.0)),
    }[phase]()
    freeze = frozen_params(policy, config.optimizer)
    tx = make_optimizer(config.optimizer, num_steps=10)
    state = create_state(params, tx, mesh=mesh, rules=policy.sharding_rules, freeze=freeze)
    inputs = (place(batch, mesh), *extra)
    compiled = lower_step(make_step(policy, tx, config), policy, config, state, *inputs).compile()
    trainable, frozen = split_params(state.params, freeze)
    moved = state.replace(params=trainable)
    for _ in range(2):
        moved, _ = compiled(moved, frozen, *inputs)
    return moved.replace(params=merge_params(moved.params, frozen)), compiled.as_text()


def compare_steps(phase, has_lora, microbatch, mesh_sizes):
    """Returns how far a step on a mesh is from one on one device, and what is wrong with its layout."""
    mesh = make_mesh(**mesh_sizes)
    single, _ = take_steps(phase, has_lora, microbatch, make_mesh())
    state, text = take_steps(phase, has_lora, microbatch, mesh)
    policy, params = policy_and_params(has_lora)
    shardings = tree_shardings(state, mesh, policy.sharding_rules)
    misplaced = jax.tree.map(lambda x, s: not x.sharding.is_equivalent_to(s, x.ndim), state, shardings)
    leaves = [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(state.params)]
    shapes = [(name, leaf.shape, not leaf.sharding.is_fully_replicated) for name, leaf in leaves]
    found = read_collectives(text)
    num_passes = 3 if phase == "tpo" and microbatch else 2  # it scores all decisions before it differentiates some
    if mesh_sizes == {"fsdp": 8}:
        problems = not_zero3(found, shapes, dict.fromkeys(("dino", "siglip", "llm"), num_passes))
    else:
        problems = moved_out(found)
    return {
        "case": [phase, has_lora, microbatch, mesh_sizes],
        "difference": difference(state.params, single.params),
        "change": difference(state.params, params),
        "misplaced": [path_name(path) for path, is_wrong in jax.tree.leaves_with_path(misplaced) if is_wrong],
        "exchanged": problems,
    }


def compare_actions(mesh_sizes, size):
    """Returns what a policy with adapters decides on a mesh and on one device, greedily and not."""
    policy, params = policy_and_params(has_lora=True)
    observation, found = observations(policy, size), {"case": [mesh_sizes, size]}
    for temperature in (0.0, 1.0):
        decisions = []
        for mesh in (make_mesh(), make_mesh(**mesh_sizes)):
            placed = jax.device_put(params, tree_shardings(params, mesh, policy.sharding_rules))
            act = policy_act(policy, placed, jax.random.key(1), temperature=temperature)
            decisions.append(jax.device_get(act(observation, None, (INSTRUCTIONS * size)[:size], None)[0]))
        found[f"tokens_{temperature:g}"] = bool((decisions[0].action_tokens == decisions[1].action_tokens).all())
        found[f"difference_{temperature:g}"] = difference(*decisions)
    return found


def difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), *jax.device_get((a, b)))))


def compare(step_cases, action_cases):
    """Returns what test_sharding.py asserts."""
    return {
        "steps": [compare_steps(*case) for case in step_cases],
        "actions": [compare_actions(*case) for case in action_cases],
    }


def compare_few():
    return compare(FEW, [(MESHES[0], SIZE)])


if __name__ == "__main__":
    # Three rows are no whole number of rows on any device.
    print(json.dumps(compare(ALL, [(mesh, size) for mesh in MESHES for size in (SIZE, 3)])))
