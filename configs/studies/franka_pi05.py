"""Rows of pi0.5 in table 2 at our size: a flow over chunks of actions, from the state, on the two hard Franka tasks.

    python launch/study.py --study=configs/studies/franka_pi05.py --jobs=2
    python launch/compare.py --study=runs/franka_pi05 --out=results/franka_pi05 --baseline=pi_rl

Steps to the target are divided by those of pi_RL, the paper's baseline for this model.
"""

from configs.studies.franka_state import NUM_DEMOS
from stare_jax.runs.study import Study

TASKS = ("StackCube-v1", "LiftPegUpright-v1")


def get_study() -> Study:
    """Returns the grid of runs."""
    return Study(
        config="configs/franka_state.py:{task},{method},pi05",
        methods=("sft", "grape", "sta_tpo", "pi_rl", "sta_ppo", "ipi"),
        tasks=TASKS,
        seeds=(0, 1, 2),
        task_changes={task: {"demos.num_demos": NUM_DEMOS[task]} for task in TASKS},
    )
