"""One policy for the four Franka tasks, a row of table 2 beside the policies of one task each.

    python launch/study.py --study=configs/studies/franka_together.py --workdir=runs/franka_state --jobs=2
    python launch/compare.py --study=runs/franka_state --out=results/franka_state

In the folder of configs/studies/franka_state.py its results are rows of that study's tables, "ipi, all" beside "ipi".
Every task has as many pairs and steps as a policy of one task has, and the mean number of demonstrations.
"""

from configs.studies.franka_state import NUM_DEMOS
from stare_jax.runs.study import Study

NUM_TASKS = len(NUM_DEMOS)


def get_study() -> Study:
    """Returns the grid of runs."""
    return Study(
        config="configs/franka_state.py:{task},{method}",
        methods=("sft", "sta_tpo", "ipi"),
        tasks=("all",),
        seeds=(0, 1, 2),
        changes={
            "demos.num_demos": sum(NUM_DEMOS.values()) // NUM_TASKS,
            "sft.num_steps": 3000 * NUM_TASKS,
            "ppo.num_episodes": 96 * NUM_TASKS,
        },
    )
