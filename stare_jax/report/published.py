"""Published rates: the paper's tables 1 and 2, in %, by backbone, method and task; 300 episodes each."""

from collections.abc import Mapping
from types import MappingProxyType

OPENVLA, PI05 = "OpenVLA-7B", "pi0.5"
_WIDOWX = (
    "PutSpoonOnTableClothInScene-v1",
    "PutCarrotOnPlateInScene-v1",
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1",
    "PutEggplantInBasketScene-v1",
)
"""tasks in the order of table 1."""
_FRANKA = ("StackCube-v1", "PushCube-v1", "PullCube-v1", "LiftPegUpright-v1")


def _rows(widowx: tuple[float, ...], franka: tuple[float, ...]) -> Mapping[str, float]:
    return MappingProxyType(dict(zip((*_WIDOWX, *_FRANKA), (*widowx, *franka), strict=True)))


PUBLISHED: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    OPENVLA: {
        "sft": _rows((43.7, 52.7, 21.3, 49.0), (12.0, 11.7, 31.0, 5.3)),
        "grape": _rows((44.3, 55.0, 22.7, 53.7), (15.7, 13.3, 35.3, 7.7)),
        "sta_tpo": _rows((51.0, 57.3, 43.7, 54.3), (19.3, 16.0, 35.7, 12.3)),
        "rl4vla": _rows((93.0, 91.3, 92.0, 93.7), (64.0, 95.7, 90.3, 32.0)),
        "sta_ppo_paper": _rows((94.3, 95.3, 93.7, 95.0), (92.7, 96.0, 95.3, 89.7)),
        "ipi": _rows((98.0, 98.5, 98.0, 97.5), (94.3, 97.3, 98.5, 95.5)),
    },
    PI05: {
        "sft": _rows((49.3, 64.7, 44.7, 69.7), (26.3, 18.3, 43.0, 10.7)),
        "grape": _rows((48.0, 59.3, 48.3, 58.7), (22.7, 16.3, 45.0, 6.3)),
        "sta_tpo": _rows((54.0, 65.3, 54.0, 68.7), (28.0, 22.3, 44.7, 15.7)),
        "pi_rl": _rows((82.7, 97.3, 83.3, 55.0), (72.3, 96.7, 93.3, 58.0)),
        "sta_ppo_paper": _rows((90.7, 97.7, 85.7, 63.7), (80.7, 98.0, 92.7, 75.3)),
        "ipi": _rows((95.7, 98.7, 93.0, 78.7), (84.3, 99.3, 95.0, 80.7)),
    },
}
"""backbone -> name of the method -> task -> %. STA-PPO is with the paper's own potentials."""


def _held(*values: float) -> Mapping[str, float]:
    return MappingProxyType(dict(zip(_WIDOWX, values, strict=True)))


PUBLISHED_HOLDING: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    OPENVLA: {
        "sft": _held(70.3, 74.7, 59.0, 67.3),
        "grape": _held(72.0, 85.3, 53.3, 78.7),
        "sta_tpo": _held(85.7, 82.3, 78.3, 85.7),
        "rl4vla": _held(98.3, 96.7, 97.0, 98.3),
        "sta_ppo_paper": _held(97.7, 99.0, 98.3, 98.7),
        "ipi": _held(99.0, 99.5, 99.0, 99.0),
    },
    PI05: {
        "sft": _held(85.3, 89.3, 76.0, 92.3),
        "grape": _held(78.7, 88.3, 69.7, 80.3),
        "sta_tpo": _held(83.7, 80.3, 70.7, 83.7),
        "pi_rl": _held(98.3, 99.3, 97.3, 69.7),
        "sta_ppo_paper": _held(98.7, 99.0, 97.3, 85.7),
        "ipi": _held(99.3, 99.7, 98.0, 91.0),
    },
}
"""The same of table 1's numbers in parentheses: the object was held."""
