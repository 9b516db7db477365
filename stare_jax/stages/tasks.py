"""The eight tasks of the paper, four of each simulator, in three families. Data, no logic."""

import dataclasses

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
from stare_jax.stages.rewards import distance_to_goal, distance_to_height, distance_to_object, distance_to_upright
from stare_jax.stages.separate import grasped, grasped_and_lifted, lifted, near_goal, reached, succeeded, touched
from stare_jax.stages.spec import SIGMOID_OF_ONE, StageParams, TaskSpec, WeightLimit

_STACK_CUBE = TaskSpec(
    env_id="StackCube-v1",
    family="pick-place",
    instruction="stack the red cube on the green cube",
    stage_names=("reach", "grasp", "transport", "place"),
    params=StageParams(),
    event_fns=(reached, grasped_and_lifted, near_goal, succeeded),
    cost_fns=(reach_cost, grasp_cost, transport_cost, place_cost),
    potential_fns=(reach_potential, lasting_grasp_potential, transport_potential, place_potential),
    distance_fns=(distance_to_object, distance_to_object, distance_to_goal, distance_to_goal),
    limits=(
        WeightLimit("grasp", ("beta1", "beta2")),
        WeightLimit("transport", ("beta3",), base=SIGMOID_OF_ONE),
        WeightLimit("place", ("beta4",), base=SIGMOID_OF_ONE),
    ),
)

_PUSH_CUBE = TaskSpec(
    env_id="PushCube-v1",
    family="push-pull",
    instruction="push the blue cube to the target",
    stage_names=("reach", "contact", "push", "goal"),
    # Success is a distance below .10; with delta_goal at .10 too the last stage would have no step.
    params=StageParams(delta_goal=0.13, beta1=1.0, beta2=0.0, beta3=0.0, beta4=0.0),
    event_fns=(reached, touched, near_goal, succeeded),
    cost_fns=(reach_cost, contact_cost, push_cost, goal_cost),
    potential_fns=(reach_potential, contact_potential, push_potential, goal_potential),
    distance_fns=(distance_to_object, distance_to_object, distance_to_goal, distance_to_goal),
    limits=(WeightLimit("contact", ("beta1",)),),
)

_LIFT_PEG_UPRIGHT = TaskSpec(
    env_id="LiftPegUpright-v1",
    family="lift-upright",
    instruction="lift the peg upright",
    stage_names=("reach", "grasp", "lift", "upright"),
    params=StageParams(beta1=1.0, beta2=0.0, beta3=0.0, beta4=0.0),
    event_fns=(reached, grasped, lifted, succeeded),
    cost_fns=(reach_cost, grasp_cost, lift_cost, upright_cost),
    potential_fns=(reach_potential, grasp_potential, lift_potential, upright_potential),
    distance_fns=(distance_to_object, distance_to_object, distance_to_height, distance_to_upright),
    limits=(WeightLimit("grasp", ("beta1",)),),
)


def _pick_place(env_id: str, instruction: str) -> TaskSpec:
    return dataclasses.replace(_STACK_CUBE, env_id=env_id, instruction=instruction)


_SPECS = (
    # ManiSkill3, Franka.
    _STACK_CUBE,
    _PUSH_CUBE,
    dataclasses.replace(
        _PUSH_CUBE,
        env_id="PullCube-v1",
        instruction="pull the blue cube to the target",
        stage_names=("reach", "contact", "pull", "goal"),
    ),
    _LIFT_PEG_UPRIGHT,
    # SimplerEnv, WidowX; the instructions are the simulator's own.
    _pick_place("PutSpoonOnTableClothInScene-v1", "put the spoon on the towel"),
    _pick_place("PutCarrotOnPlateInScene-v1", "put carrot on plate"),
    _pick_place("StackGreenCubeOnYellowCubeBakedTexInScene-v1", "stack the green block on the yellow block"),
    _pick_place("PutEggplantInBasketScene-v1", "put eggplant into yellow basket"),
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
