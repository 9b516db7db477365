import dataclasses

import pytest

from stare_jax.config import ConfigError
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_state, openvla_tiny
from stare_jax.models.blank import blank_policy
from stare_jax.models.mlp import MLPConfig
from stare_jax.rollout.jump_start import JumpStartConfig
from stare_jax.runs.config import RunConfig
from stare_jax.runs.fit import check_fit, unseen_perturbation
from stare_jax.train.ppo import PPOConfig

TINY = openvla_tiny()
IMAGES, WORDS = (
    "the policy reads no images: it would change nothing",
    "the policy reads no words: it would change nothing",
)


@pytest.mark.parametrize(
    ("model", "perturbation", "reason"),
    [
        (TINY, "vision/light", ""),
        (TINY, "semantics/words", ""),
        (TINY, "semantics/colour", ""),
        (TINY, "execution/robot_pose", ""),
        (
            dataclasses.replace(TINY, prompt_length=9),
            "semantics/words",
            "the policy cannot read its words: prompt_length",
        ),
        (openvla_state(prompt_template="", prompt_length=3), "semantics/words", WORDS),
        (openvla_state(), "semantics/words", ""),
        (openvla_state(), "semantics/colour", IMAGES),
        (MLPConfig(), "vision/table", IMAGES),
        (MLPConfig(), "semantics/words", WORDS),
        (MLPConfig(), "execution/start_pose", ""),
        (None, "semantics/words", "experts read no words: it would change nothing"),
        (None, "execution/object_moved", ""),
    ],
)
def test_a_perturbation_is_noticed_by_policies_that_read_what_it_changes(model, perturbation, reason):
    policy = None if model is None else blank_policy(model)
    got = unseen_perturbation(policy, EnvConfig(perturbation=perturbation))
    assert got.startswith(reason) and bool(got) == bool(reason)


ONE_STAGE = """
import dataclasses
from stare_jax.envs import Task, load_task
PUSH = load_task("PushCube-v1")
PARTS = ("stage_names", "event_fns", "cost_fns", "potential_fns", "distance_fns")
SPEC = dataclasses.replace(PUSH.spec, **{name: getattr(PUSH.spec, name)[:1] for name in PARTS})
TASK = Task(SPEC, PUSH.scene)
"""


def test_an_expert_that_is_to_begin_episodes_is_there_and_has_a_later_stage_to_come_to(tmp_path):
    file = tmp_path / "task.py"
    file.write_text(ONE_STAGE)
    env = EnvConfig(task=str(file), image_size=0, use_state="low_dim")
    ppo = PPOConfig(jump_start=JumpStartConfig(fraction=0.5))
    config = RunConfig(env, openvla_state(29), env.spec.params, ppo=ppo, phases=("ppo",))
    with pytest.raises(ConfigError) as error:
        check_fit(config)
    for part in (
        "has no expert, expected one to begin episodes (config.ppo.jump_start); see docs/tasks.md",
        "config.ppo.jump_start.fraction: got 0.5 for PushCube-v1, expected 0 for a task of one stage",
    ):
        assert part in str(error.value)
    check_fit(dataclasses.replace(config, ppo=PPOConfig()))
