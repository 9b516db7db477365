import dataclasses

import pytest

from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_state, openvla_tiny
from stare_jax.models.blank import blank_policy
from stare_jax.models.mlp import MLPConfig
from stare_jax.runs.fit import unseen_perturbation

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
