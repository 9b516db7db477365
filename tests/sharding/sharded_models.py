"""Steps and actions of small models on eight fake devices and on one; run by the tests beside it in a process.

    python tests/sharding/sharded_models.py openvla
    python tests/sharding/sharded_models.py pi05 few

compares everything, or a little of it, and prints what it found as one line of JSON.
"""

import functools
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import nano_flow
import numpy as np
from collectives import is_of_token, most_of_token, moved_out, not_zero3, num_passes, numbers_of_token
from nano_policy import INSTRUCTIONS, nano_config, random_observation, random_params, some_stats

from stare_jax.models import PI05_EXPERTS, PI05_PALIGEMMA, LoRAConfig, make_policy
from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.siglip import SigLIPConfig
from stare_jax.models.observation import without_scene
from stare_jax.plan.exchanges import read_collectives
from stare_jax.rollout.acting import policy_act
from stare_jax.sharding import arrays
from stare_jax.sharding.mesh import make_mesh, num_parts, path_name, tree_shardings
from stare_jax.state.optimizer import OptimizerConfig, frozen_params, make_optimizer
from stare_jax.state.train_state import create_state
from stare_jax.train.ppo import PPOConfig, make_ppo_step
from stare_jax.train.ppo_batch import DecisionBatch
from stare_jax.train.sft import SFTBatch, SFTConfig, make_sft_step
from stare_jax.train.tpo import TPOConfig, make_tpo_step
from stare_jax.train.tpo_reference import PairBatch, ScoredTrajectory
from stare_jax.train.update import lower_step

MESHES = ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8})
TRAINED = {"openvla": ("full", "lora"), "pi05": ("full", "expert", "lora")}
"""model -> what of it is trained."""
KEPT = tuple(("kept", "ppo", size, mesh) for size in (None, 8) for mesh in MESHES)
"""cases of pi0.5 whose expert is trained, with contexts that are kept."""
FEW = {
    "openvla": (("lora", "ppo", 8, MESHES[0]), ("full", "sft", None, MESHES[1])),
    "pi05": (("full", "sft", None, MESHES[0]), ("expert", "ppo", 8, MESHES[1])),
}
"""model -> (what is trained, phase, microbatch, mesh), of which all kinds of layout are seen at least once."""
SIZE, RANK = 16, 4
# With SGD-like moments (large eps) a difference in rounding stays one.
OPTIMIZER = OptimizerConfig(learning_rate=0.1, eps=1.0)
TRAINING = (True, 0.0)
"""True if the policy is trained, and how much of the training is done."""


def all_cases(model):
    cases = itertools.product(TRAINED[model], ("sft", "tpo", "ppo"), (None, 8), MESHES)
    return itertools.chain(cases, KEPT if model == "pi05" else ())


def nano_pi05(**changes):
    """Two cameras and no stem, so that what is frozen is all that the image goes through; all widths divide by 8."""
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    return nano_flow.flow_config(
        siglip=SigLIPConfig(width=32, depth=2, num_heads=2, mlp_dim=40, patch_size=8),
        paligemma=GemmaConfig(width=16, depth=2, mlp_dim=56, **heads),
        expert=GemmaConfig(width=24, depth=2, mlp_dim=48, **heads),
        noise="learned",
        stem=(),
        **changes,
    )


@functools.cache
def policy_and_params(model, trained):
    execution = Execution(remat="full")
    if model == "openvla":
        config = nano_config(lora=LoRAConfig(rank=RANK) if trained == "lora" else None, execution=execution)
    else:
        lora = LoRAConfig(rank=RANK, targets=PI05_EXPERTS) if trained == "lora" else None
        frozen = (PI05_PALIGEMMA,) if trained in ("expert", "kept") else ()
        config = nano_pi05(lora=lora, frozen_patterns=frozen, execution=execution)
    policy = make_policy(config, some_stats(config.action_dim, config.state_dim))
    return policy, random_params(policy)


def prompts(size):
    return (INSTRUCTIONS * size)[:size]


def raw_actions(policy, shape):
    chunk = () if policy.window is None else (policy.window,)
    return np.random.default_rng(0).uniform(-0.3, 0.5, (*shape, *chunk, policy.action_dim)).astype(np.float32)


@functools.cache
def decided(model, trained):
    """Decisions of the policy in as many states as a batch has, and these states."""
    policy, params = policy_and_params(model, trained)
    observation = random_observation(policy, prompts(SIZE))
    return jax.device_get(jax.jit(policy.sample)(params, observation, jax.random.key(0))), observation


def sft_batch(model, trained):
    policy, _ = policy_and_params(model, trained)
    shape = (SIZE,) if policy.window is None else (SIZE, policy.window)
    return SFTBatch(random_observation(policy, prompts(SIZE)), raw_actions(policy, (SIZE,)), np.ones(shape, bool))


def ppo_batch(model, trained):
    decision, observation = decided(model, trained)
    old_value, advantage, return_, gap = np.random.default_rng(0).standard_normal((4, SIZE)).astype(np.float32)
    numbers = (decision.logp + 0.05 * gap[:, None] / decision.logp.shape[1], old_value, advantage, return_)
    return DecisionBatch(observation, decision.trace, *numbers, np.arange(SIZE) < SIZE - 3)


def with_contexts(batch, mesh):
    """The batch without images and prompts, and the contexts of its decisions, of each device those of its own."""
    (policy, params), num_blocks = policy_and_params("pi05", "kept"), num_parts(mesh)
    contexts = jax.device_get(jax.jit(policy.encode)(params, batch.observation))
    contexts = jax.tree.map(lambda x: x.reshape(num_blocks, -1, *x.shape[1:]), contexts)
    row = np.arange(SIZE, dtype=np.int32) % (SIZE // num_blocks)
    return batch._replace(observation=without_scene(batch.observation), row=row), arrays.to_mesh(contexts, mesh)


def pair_batch(model, trained):
    """Pairs of two decisions a side; policies with chunks decide on two actions at a time, of which one is missing."""
    (policy, _), (decision, observation) = policy_and_params(model, trained), decided(model, trained)
    rng = np.random.default_rng(0)
    shape, num_stages = (SIZE // 2, 2), 3
    num_scores = 2 if policy.preference_score is None else 2 * policy.chunk
    what = decision.trace if policy.preference_score is None else raw_actions(policy, (SIZE,))
    observation, what = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), (observation, what))

    def side():
        return ScoredTrajectory(
            observation=observation,
            decision=jax.tree.map(lambda x: rng.permuted(x, axis=0), what),
            seed=np.ones((*shape, 1), np.uint32),
            ref_logp=rng.normal(-16, 1, (shape[0], num_scores, 1)).astype(np.float32),
            valid=np.arange(num_scores) < rng.integers(1, num_scores + 1, (shape[0], 1)),
            stage_mask=rng.random((shape[0], num_stages, num_scores)) < 0.5,
            stage_cost=rng.random((shape[0], num_stages)).astype(np.float32),
            completed=rng.random((shape[0], num_stages)) < 0.7,
        )

    return PairBatch(side(), side())


def ppo_config(model, settings):
    """A flow is kept near the reference, too."""
    return PPOConfig(minibatch_size=SIZE, kl_coef=0.1 if model == "pi05" else None, **settings)


def take_steps(model, trained, phase, microbatch, mesh):
    """Two steps of one compiled program, which takes no other layout than the one it returns; and its text."""
    policy, params = policy_and_params(model, trained)
    settings = {"optimizer": OPTIMIZER, "microbatch_size": microbatch}
    make_step, config, batch, extra = {
        "sft": lambda: (make_sft_step, SFTConfig(batch_size=SIZE, **settings), sft_batch(model, trained), ()),
        "tpo": lambda: (make_tpo_step, TPOConfig(batch_size=SIZE // 2, **settings), pair_batch(model, trained), ()),
        "ppo": lambda: (make_ppo_step, ppo_config(model, settings), ppo_batch(model, trained), TRAINING),
    }[phase]()
    freeze = frozen_params(policy, config.optimizer)
    tx = make_optimizer(config.optimizer, num_steps=10)
    state = create_state(jax.tree.map(jnp.copy, params), tx, mesh=mesh, rules=policy.sharding_rules, freeze=freeze)
    moved, frozen = state.replace(frozen=None), state.frozen
    if phase == "ppo" and config.kl_coef is not None:
        extra = (*extra, jax.tree.map(jnp.copy, state.trainable))
    if trained == "kept":
        batch, contexts = with_contexts(batch, mesh)
        extra = (*extra, contexts)
    inputs = (arrays.to_mesh(batch, mesh), *extra)
    compiled = lower_step(make_step(policy, tx, config), state, *inputs).compile()
    for _ in range(2):
        moved, _ = compiled(moved, frozen, *inputs)
    return moved.replace(frozen=frozen), compiled.as_text()


def compare_steps(model, trained, phase, microbatch, mesh_sizes):
    """Returns how far a step on a mesh is from one on one device, and what is wrong with its layout."""
    mesh = make_mesh(**mesh_sizes)
    case = (model, trained, phase, microbatch)
    single, _ = take_steps(*case, make_mesh())
    state, text = take_steps(*case, mesh)
    policy, params = policy_and_params(model, trained)
    shardings = tree_shardings(state, mesh, policy.sharding_rules)
    misplaced = jax.tree.map(lambda x, s: not x.sharding.is_equivalent_to(s, x.ndim), state, shardings)
    found = read_collectives(text)
    if mesh_sizes == {"fsdp": 8}:
        scores_first, has_reference = phase == "tpo" and microbatch is not None, phase == "ppo" and model == "pi05"
        passes = num_passes(phase, trained, scores_first=scores_first, has_reference=has_reference)
        problems = not_zero3(found, shapes_of(state.params), passes)
    else:
        problems = moved_out(found)
    return {
        "case": [*case, mesh_sizes],
        "difference": difference(state.params, single.params),
        "change": difference(state.params, params),
        "misplaced": [path_name(path) for path, is_wrong in jax.tree.leaves_with_path(misplaced) if is_wrong],
        "exchanged": problems,
    }


def compare_actions(model, mesh_sizes, size):
    """Returns what a policy with adapters decides on a mesh and on one device, greedily and not."""
    policy, params = policy_and_params(model, "lora")
    observation, found = random_observation(policy, prompts(size)), {"case": [model, mesh_sizes, size]}
    for temperature in (0.0, 1.0):
        decisions = []
        for mesh in (make_mesh(), make_mesh(**mesh_sizes)):
            placed = jax.device_put(params, tree_shardings(params, mesh, policy.sharding_rules))
            act = policy_act(policy, placed, jax.random.key(1), temperature=temperature)
            decisions.append(jax.device_get(act(observation, None, prompts(size), None)[0]))
        # Chains are numbers like all others; bins are the same or not.
        one, other = (decision.trace.get("bins", np.zeros(1)) for decision in decisions)
        found[f"tokens_{temperature:g}"] = bool((one == other).all())
        found[f"difference_{temperature:g}"] = difference(*decisions)
    return found


def exchanged_by_sampling(model):
    """Returns what the sampling of a policy with adapters, cut over eight devices, exchanges but should not."""
    (policy, params), mesh = policy_and_params(model, "lora"), make_mesh(**MESHES[1])
    placed = jax.device_put(params, tree_shardings(params, mesh, policy.sharding_rules))
    inputs = (placed, arrays.to_mesh(random_observation(policy, prompts(SIZE)), mesh), jax.random.key(1))
    found = read_collectives(jax.jit(policy.sample).lower(*inputs).compile().as_text())
    problems = []
    if model == "openvla":
        numbers, most = numbers_of_token(found), most_of_token(nano_config().llm, SIZE, RANK)
        problems = [] if 0 < numbers <= most else [f"a token exchanges {numbers} numbers, expected at most {most}"]
        found = [one for one in found if not is_of_token(one)]
    return problems + not_zero3(found, shapes_of(placed), num_passes("sample", "lora"))


def shapes_of(params):
    """Returns path, shape, and whether it is split, of every parameter."""
    leaves = jax.tree.leaves_with_path(params)
    return [(path_name(path), leaf.shape, not leaf.sharding.is_fully_replicated) for path, leaf in leaves]


def difference(a, b):
    def largest(x, y):
        return float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max())  # of flags, too

    return max(jax.tree.leaves(jax.tree.map(largest, *jax.device_get((a, b)))))


def compare(model, step_cases, action_cases):
    """Returns what test_sharding.py asserts."""
    return {
        "steps": [compare_steps(model, *case) for case in step_cases],
        "actions": [compare_actions(model, *case) for case in action_cases],
        "exchanged_by_sampling": exchanged_by_sampling(model),
    }


if __name__ == "__main__":
    model, *few = sys.argv[1:]
    # Three rows are no whole number of rows on any device.
    actions = [(MESHES[0], SIZE)] if few else [(mesh, size) for mesh in MESHES for size in (SIZE, 3)]
    print(json.dumps(compare(model, FEW[model] if few else all_cases(model), actions)))
