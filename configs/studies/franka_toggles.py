"""Figure 6 at our size: STA-PPO on two Franka tasks with the signal of one stage turned off.

    python launch/study.py --study=configs/studies/franka_toggles.py --workdir=runs/franka_state --jobs=2
    python launch/compare.py --study=runs/franka_state --out=results/franka_state

In the folder of configs/studies/franka_state.py it shares that study's imitations and its runs of PPO and STA-PPO.
"""

from configs.studies.franka_state import NUM_DEMOS
from stare_jax.runs.study import Study, Variant

TASKS = ("StackCube-v1", "LiftPegUpright-v1")
NUM_STAGES = 4


def get_study() -> Study:
    """Returns the grid of runs; "without_1" has no signal in the first stage."""
    variants = {}
    for stage in range(NUM_STAGES):
        enabled = tuple(k != stage for k in range(NUM_STAGES))
        variants[f"without_{stage + 1}"] = Variant("sta_ppo", {"stages.enabled": enabled})
    return Study(
        config="configs/franka_state.py:{task},{method}",
        methods=("ppo", "sta_ppo", *variants),
        tasks=TASKS,
        seeds=(0, 1, 2),
        task_changes={task: {"demos.num_demos": NUM_DEMOS[task]} for task in TASKS},
        variants=variants,
    )
