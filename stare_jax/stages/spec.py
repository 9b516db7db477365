"""Description of a task: its stages, their thresholds and weights, and the functions that label and score them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from stare_jax.config import Count, NonNegative, Positive, check_fields
from stare_jax.types import Array, Signals

POTENTIAL_SLACK = 1e-6
"""Largest excess over 1 of the sum of a potential's weights: room for the rounding of a sum, no more."""

SIGMOID_OF_ONE = 1.0 / (1.0 + math.exp(-1.0))
"""The most that a term sigma(1 - distance / scale) of a potential can give, 0.731."""

Path = Literal["nearest", "time"]
"""Reference point of the transport cost: the "nearest" of the path, or the one at the fraction of "time" gone by."""

Axis = Literal[0, 1, 2]
"""An axis of a body frame: x, y or z."""


@dataclasses.dataclass(frozen=True)
class StageParams:
    """Every threshold, weight and choice of a task's stages; metres and radians.

    The defaults are those of the pick-place family. A family ignores the fields that its stages do not use; they are
    checked all the same.
    """

    delta_reach: NonNegative = 0.05
    """Reach ends closer than this to the object; with 0 only contact ends it."""
    delta_lift: NonNegative = 0.02
    """Grasp (pick-place) ends with the object held higher than this above its support."""
    delta_goal: NonNegative = 0.05
    """Transport, push and pull end horizontally closer than this to the goal; also the region of the goal potential."""
    h_min: NonNegative = 0.05
    """Lift ends above this height."""
    slip_tol: NonNegative = 0.005
    """A held object that moves by more than this in the end-effector's frame in one step has slipped."""

    alpha_align: NonNegative = 1.0
    """alpha_1 of the grasp cost: contact alignment error."""
    alpha_slip: NonNegative = 0.1
    """alpha_2 of the grasp cost: slip."""
    alpha_contact: NonNegative = 0.05
    """alpha_c of the contact cost: missing contact."""
    alpha_perp: NonNegative = 1.0
    """alpha_perp of the contact cost: distance from the line of pushing."""
    lambda_perp: NonNegative = 1.0
    """lambda_perp of the push and pull costs: sideways motion."""
    beta_x: NonNegative = 1.0
    """Weight of the distance to the goal in the goal cost."""
    beta_v: NonNegative = 1.0
    """Weight of the motion per step in the goal cost."""
    lambda_stab: NonNegative = 1.0
    """Weight of the place cost."""
    stable_steps: Count = 5
    """M: the place cost looks at the last M steps of the stage."""
    path: Path = "nearest"
    """Reference point of the transport cost."""

    d_reach: Positive = 0.1
    """Length scale of the reach potential, in metres."""
    d_trans: Positive = 0.1
    """Length scale of the transport potential, in metres."""
    d_place: Positive = 0.05
    """Length scale of the place potential, in metres."""
    d_push: Positive = 0.1
    """Length scale of the push and pull potentials, in metres."""
    h_lift: Positive = 0.095
    """Height that scales the lift potential, in metres."""
    beta1: NonNegative = 0.5
    """Weight of the indicator in the grasp and contact potentials."""
    beta2: NonNegative = 0.5
    """Weight of the lasting grasp in the grasp potential (pick-place)."""
    beta3: NonNegative = 0.2
    """Weight of the grasp in the transport potential."""
    beta4: NonNegative = 0.2
    """Weight of the orientation in the place potential."""
    tau: Positive = 3.0
    """Number of steps after which a grasp counts as lasting."""

    up_axis: Axis = 0
    """Axis of the object's body frame that is vertical when the object is upright."""
    progressive: bool = True
    """Potentials (k + Phi_k) / K, which no completed stage lowers; False: the paper's own, Phi_k."""
    enabled: tuple[bool, ...] | None = None
    """`[K]` which stages shape the reward (figure 6); None for all."""

    def __post_init__(self):
        check_fields(self)


EventFn = Callable[[StageParams, Signals], Array]
"""(params, signals of one state) -> bool: whether the stage's terminal event holds."""

CostFn = Callable[[StageParams, Signals, Array], Array]
"""(params, signals `[T]`, bool `[T]` mask of the stage's steps) -> scalar >= 0, 0 for a stage without steps."""

PotentialFn = Callable[[StageParams, Signals], Array]
"""(params, signals `[T]`) -> `[T]` in [0, 1]."""

DistanceFn = Callable[[StageParams, Signals], Array]
"""(params, signals `[T]`) -> `[T]` >= 0, the distance that remains in the stage, in metres or radians."""


class WeightLimit(NamedTuple):
    """The rest of a stage's potential reaches `base` at most, so the sum of `base` and `weights` may not exceed 1."""

    stage: str
    weights: tuple[str, ...]
    base: float = 0.0


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task's K stages in causal order. `dataclasses.replace` makes a variant and validates it again.

    Raises:
      ValueError: the parameters could push a potential out of [0, 1], or a tuple is not of length K.
    """

    env_id: str
    family: str
    instruction: str
    stage_names: tuple[str, ...]
    params: StageParams
    event_fns: tuple[EventFn, ...]
    cost_fns: tuple[CostFn, ...]
    potential_fns: tuple[PotentialFn, ...]
    distance_fns: tuple[DistanceFn, ...]
    limits: tuple[WeightLimit, ...]
    """limits of the weights that the stages use."""

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.stage_names)

    def __post_init__(self):
        where = f"TaskSpec {self.env_id} ({self.family})"
        _check_lengths(self, where)
        _check_weights(self.params, self.limits, where)


def _check_lengths(spec: TaskSpec, where: str) -> None:
    if spec.num_stages < 1:
        raise ValueError(f"{where}: stage_names is empty, expected at least one stage.")
    lengths = {name: len(getattr(spec, name)) for name in ("event_fns", "cost_fns", "potential_fns", "distance_fns")}
    if spec.params.enabled is not None:
        lengths["params.enabled"] = len(spec.params.enabled)
    for name, length in lengths.items():
        if length != spec.num_stages:
            expected = f"expected {spec.num_stages}, one for each of {', '.join(spec.stage_names)}"
            raise ValueError(f"{where}: {name} has length {length}, {expected}.")


def _check_weights(params: StageParams, limits: Sequence[WeightLimit], where: str) -> None:
    for limit in limits:
        total = limit.base + sum(getattr(params, name) for name in limit.weights)
        if not total <= 1 + POTENTIAL_SLACK:
            terms = [f"params.{name} ({getattr(params, name)})" for name in limit.weights]
            terms = ([f"sigmoid(1) ({limit.base:.6g})"] if limit.base else []) + terms
            raise ValueError(
                f"{where}: the potential of stage {limit.stage!r} could reach {' + '.join(terms)} = {total:.6g}, "
                "expected a sum of at most 1."
            )
