"""The four SimplerEnv WidowX tasks from the low-dimensional state, at a size for one CPU core a run.

    python launch/train.py --config=configs/widowx_state.py                                  STA-PPO with the spoon
    python launch/train.py --config=configs/widowx_state.py:PutEggplantInBasketScene-v1,ppo  any of `methods.METHODS`
    python launch/study.py --study=configs/studies/widowx_state.py                           the methods side by side

The numbers are those of configs/franka_state.py, in episodes of 60 actions. Greedy decisions from one official start
are alike, so an evaluation plays each of them equally often: 192 episodes are 8 times 24 starts, and 3 times the 64 of
the eggplant. Nobody has measured it yet.
"""

from configs.franka_state import config_of_state

TASKS = (
    "PutSpoonOnTableClothInScene-v1",
    "PutCarrotOnPlateInScene-v1",
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1",
    "PutEggplantInBasketScene-v1",
)


def get_config(variant: str = ""):
    """Returns the configuration; `variant` is a task or "all", a method, STA-PPO if none, and "pi05"."""
    config = config_of_state(variant, TASKS, horizon=60, name="widowx_state")
    config.evaluation.num_episodes = 192
    return config
