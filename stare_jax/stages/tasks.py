"""The eight tasks of the paper, four of each simulator, in three families. Data, no logic."""

from typing import Any

from stare_jax.stages.costs import (
    contact_cost,
    goal_cost,
    grasp_cost,
    lift_cost,
    place_cost,
    push_cost,
    reach_cost,
    transport_cost,
    upright_cost,
)
from stare_jax.stages.potentials import (
    contact_potential,
    goal_potential,
    grasp_potential,
    lasting_grasp_potential,
    lift_potential,
    place_potential,
    push_potential,
    reach_potential,
    transport_potential,
    upright_potential,
)
from stare_jax.stages.separate import grasped, grasped_and_lifted, lifted, near_goal, reached, succeeded, touched
from stare_jax.stages.spec import SIGMOID_OF_ONE, Requirements, StageParams, TaskSpec, WeightLimit

_PICK_PLACE: dict[str, Any] = {
    "family": "pick-place",
    "stage_names": ("reach", "grasp", "transport", "place"),
    "params": StageParams(),
    "event_fns": (reached, grasped_and_lifted, near_goal, succeeded),
    "cost_fns": (reach_cost, grasp_cost, transport_cost, place_cost),
    "potential_fns": (reach_potential, lasting_grasp_potential, transport_potential, place_potential),
    "requirements": Requirements(
        non_negative=("alpha_align", "alpha_slip", "lambda_stab", "beta1", "beta2", "beta3", "beta4"),
        positive=("d_reach", "d_trans", "d_place", "tau"),
        counts=("stable_steps",),
        limits=(
            WeightLimit("grasp", ("beta1", "beta2")),
            WeightLimit("transport", ("beta3",), base=SIGMOID_OF_ONE),
            WeightLimit("place", ("beta4",), base=SIGMOID_OF_ONE),
        ),
    ),
}

_PUSH: dict[str, Any] = {
    "family": "push-pull",
    "stage_names": ("reach", "contact", "push", "goal"),
    # Success is a distance below .10; with delta_goal at .10 too the last stage would have no step.
    "params": StageParams(delta_goal=0.13, beta1=1.0, beta2=0.0, beta3=0.0, beta4=0.0),
    "event_fns": (reached, touched, near_goal, succeeded),
    "cost_fns": (reach_cost, contact_cost, push_cost, goal_cost),
    "potential_fns": (reach_potential, contact_potential, push_potential, goal_potential),
    "requirements": Requirements(
        non_negative=("alpha_contact", "alpha_perp", "lambda_perp", "beta_x", "beta_v", "beta1"),
        positive=("d_reach", "d_push"),
        counts=(),
        limits=(WeightLimit("contact", ("beta1",)),),
    ),
}

_PULL = {**_PUSH, "stage_names": ("reach", "contact", "pull", "goal")}

_LIFT_UPRIGHT: dict[str, Any] = {
    "family": "lift-upright",
    "stage_names": ("reach", "grasp", "lift", "upright"),
    "params": StageParams(beta1=1.0, beta2=0.0, beta3=0.0, beta4=0.0),
    "event_fns": (reached, grasped, lifted, succeeded),
    "cost_fns": (reach_cost, grasp_cost, lift_cost, upright_cost),
    "potential_fns": (reach_potential, grasp_potential, lift_potential, upright_potential),
    "requirements": Requirements(
        non_negative=("alpha_align", "alpha_slip", "beta1"),
        positive=("d_reach", "h_lift"),
        counts=(),
        limits=(WeightLimit("grasp", ("beta1",)),),
    ),
}

_SPECS = (
    # ManiSkill3, Franka.
    TaskSpec(env_id="StackCube-v1", instruction="stack the red cube on the green cube", **_PICK_PLACE),
    TaskSpec(env_id="PushCube-v1", instruction="push the blue cube to the target", **_PUSH),
    TaskSpec(env_id="PullCube-v1", instruction="pull the blue cube to the target", **_PULL),
    TaskSpec(env_id="LiftPegUpright-v1", instruction="lift the peg upright", **_LIFT_UPRIGHT),
    # SimplerEnv, WidowX; the instructions are the simulator's own.
    TaskSpec(env_id="PutSpoonOnTableClothInScene-v1", instruction="put the spoon on the towel", **_PICK_PLACE),
    TaskSpec(env_id="PutCarrotOnPlateInScene-v1", instruction="put carrot on plate", **_PICK_PLACE),
    TaskSpec(
        env_id="StackGreenCubeOnYellowCubeBakedTexInScene-v1",
        instruction="stack the green block on the yellow block",
        **_PICK_PLACE,
    ),
    TaskSpec(env_id="PutEggplantInBasketScene-v1", instruction="put eggplant into yellow basket", **_PICK_PLACE),
)

TASKS: tuple[str, ...] = tuple(spec.env_id for spec in _SPECS)
"""The environment ids of the eight tasks."""

_SPEC_BY_ENV_ID = {spec.env_id: spec for spec in _SPECS}


def get_task(env_id: str) -> TaskSpec:
    """Returns the task of an environment; `dataclasses.replace` makes variants of it.

    Raises:
      ValueError: there is no such task; the message lists the eight.
    """
    if env_id not in _SPEC_BY_ENV_ID:
        raise ValueError(f"env_id is {env_id!r}, expected one of: {', '.join(TASKS)}.")
    return _SPEC_BY_ENV_ID[env_id]
