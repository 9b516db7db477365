"""Figure 6 at our size: STA-PPO on two Franka tasks with the signal of one stage turned off.

    python launch/study.py --study=configs/studies/franka_toggles.py --workdir=runs/franka_state --jobs=2
    python launch/compare.py --study=runs/franka_state --out=results/franka_state

In the folder of configs/studies/franka_state.py it shares that study's imitations and its runs of PPO and STA-PPO.
"""

from configs.studies.franka_state import NUM_DEMOS
from stare_jax.runs.study import Study, Variant

TASKS = ("StackCube-v1", "LiftPegUpright-v1")
NUM_STAGES = 4
TOGGLES = {
    f"without_{off + 1}": Variant("sta_ppo", {"stages.enabled": tuple(k != off for k in range(NUM_STAGES))})
    for off in range(NUM_STAGES)
}
"""STA-PPO without the signal of one stage; "without_1" has none in the first."""


def get_study() -> Study:
    """Returns the grid of runs."""
    return Study(
        config="configs/franka_state.py:{task},{method}",
        methods=("ppo", "sta_ppo", *TOGGLES),
        tasks=TASKS,
        seeds=(0, 1, 2),
        task_changes={task: {"demos.num_demos": NUM_DEMOS[task]} for task in TASKS},
        variants=TOGGLES,
    )
