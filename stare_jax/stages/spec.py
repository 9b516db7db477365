"""Description of a task: its stages, their thresholds and weights, and the functions that label and score them."""

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Literal, NamedTuple

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

    The defaults are those of the pick-place family. A family ignores the fields that its stages do not use.
    """

    delta_reach: float = 0.05
    """Reach ends closer than this to the object; with 0 only contact ends it."""
    delta_lift: float = 0.02
    """Grasp (pick-place) ends with the object held higher than this above its support."""
    delta_goal: float = 0.05
    """Transport, push and pull end horizontally closer than this to the goal; also the region of the goal potential."""
    h_min: float = 0.05
    """Lift ends above this height."""
    slip_tol: float = 0.005
    """A held object that moves by more than this in the end-effector's frame in one step has slipped."""

    alpha_align: float = 1.0
    """alpha_1 of the grasp cost: contact alignment error."""
    alpha_slip: float = 0.1
    """alpha_2 of the grasp cost: slip."""
    alpha_contact: float = 0.05
    """alpha_c of the contact cost: missing contact."""
    alpha_perp: float = 1.0
    """alpha_perp of the contact cost: distance from the line of pushing."""
    lambda_perp: float = 1.0
    """lambda_perp of the push and pull costs: sideways motion."""
    beta_x: float = 1.0
    """Weight of the distance to the goal in the goal cost."""
    beta_v: float = 1.0
    """Weight of the motion per step in the goal cost."""
    lambda_stab: float = 1.0
    """Weight of the place cost."""
    stable_steps: int = 5
    """M: the place cost looks at the last M steps of the stage."""
    path: Path = "nearest"
    """Reference point of the transport cost."""

    d_reach: float = 0.1
    """Metres: length scale of the reach potential, and likewise of the potentials below."""
    d_trans: float = 0.1
    d_place: float = 0.05
    d_push: float = 0.1
    h_lift: float = 0.095
    beta1: float = 0.5
    """Weight of the indicator in the grasp and contact potentials."""
    beta2: float = 0.5
    """Weight of the lasting grasp in the grasp potential (pick-place)."""
    beta3: float = 0.2
    """Weight of the grasp in the transport potential."""
    beta4: float = 0.2
    """Weight of the orientation in the place potential."""
    tau: float = 3.0
    """Number of steps after which a grasp counts as lasting."""

    up_axis: Axis = 0
    """Axis of the object's body frame that is vertical when the object is upright."""
    progressive: bool = True
    """Potentials (k + Phi_k) / K, which no completed stage lowers; False: the paper's own, Phi_k."""
    enabled: tuple[bool, ...] | None = None
    """`[K]` which stages shape the reward (figure 6); None for all."""

    def __post_init__(self):
        if self.enabled is not None:  # A list, from a config say, would make the task unhashable.
            object.__setattr__(self, "enabled", tuple(bool(is_on) for is_on in self.enabled))


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


class Requirements(NamedTuple):
    """Conditions of a family on the parameters that its stages use, by field name."""

    non_negative: tuple[str, ...]
    positive: tuple[str, ...]
    counts: tuple[str, ...]
    """Whole numbers of at least 1."""
    limits: tuple[WeightLimit, ...]


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task's K stages in causal order. `dataclasses.replace` makes a variant and validates it again.

    Raises:
      ValueError: the parameters could push a potential out of [0, 1] or a cost below 0, or a tuple is not of length K.
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
    requirements: Requirements

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.stage_names)

    def __post_init__(self):
        where = f"TaskSpec {self.env_id} ({self.family})"
        _check_lengths(self, where)
        _check_choices(self.params, where)
        _check_weights(self.params, self.requirements, where)


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


def _check_choices(params: StageParams, where: str) -> None:
    for name, allowed in (("path", typing.get_args(Path)), ("up_axis", typing.get_args(Axis))):
        if getattr(params, name) not in allowed:
            raise ValueError(f"{where}: params.{name} is {getattr(params, name)!r}, expected one of {allowed}.")


def _check_weights(params: StageParams, requirements: Requirements, where: str) -> None:
    # Written so that NaN fails too.
    for name in requirements.non_negative:
        value = getattr(params, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{where}: params.{name} is {value}, expected a finite number >= 0.")
    for name in requirements.positive:
        value = getattr(params, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{where}: params.{name} is {value}, expected a finite number > 0.")
    for name in requirements.counts:
        value = getattr(params, name)
        if not (value >= 1 and value % 1 == 0):
            raise ValueError(f"{where}: params.{name} is {value}, expected a whole number >= 1.")
    for limit in requirements.limits:
        total = limit.base + sum(getattr(params, name) for name in limit.weights)
        if not total <= 1 + POTENTIAL_SLACK:
            terms = [f"params.{name} ({getattr(params, name)})" for name in limit.weights]
            terms = ([f"sigmoid(1) ({limit.base:.6g})"] if limit.base else []) + terms
            raise ValueError(
                f"{where}: the potential of stage {limit.stage!r} could reach {' + '.join(terms)} = {total:.6g}, "
                "expected a sum of at most 1."
            )
