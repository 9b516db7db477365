"""Table 1 at our size: the methods on the four WidowX tasks from the state.

    python launch/study.py --study=configs/studies/widowx_state.py --print      the commands, in order
    python launch/study.py --study=configs/studies/widowx_state.py --jobs=2     two at a time, each on a core of its own
    python launch/compare.py --study=runs/widowx_state --out=results/widowx_state

Three seeds, fewer than the paper's five, because a step of these simulators takes several times as long as one of the
Franka's. The number of demonstrations is the same for every task and was chosen without a measurement.
"""

from configs.widowx_state import TASKS
from stare_jax.runs.study import Study

NUM_DEMOS = 300
"""Demonstrations of a task."""


def get_study() -> Study:
    """Returns the grid of runs."""
    return Study(
        config="configs/widowx_state.py:{task},{method}",
        methods=("sft", "ppo", "rl4vla", "dense", "sta_ppo_paper", "sta_ppo", "grape", "sta_tpo", "ipi"),
        tasks=TASKS,
        seeds=(0, 1, 2),
        changes={"demos.num_demos": NUM_DEMOS},
    )
