"""Figure 4 and table 2 at our size: the methods on the four Franka tasks from the state.

    python launch/study.py --study=configs/studies/franka_state.py --print      the commands, in order
    python launch/study.py --study=configs/studies/franka_state.py --jobs=2     two at a time, each on a core of its own
    python launch/compare.py --study=runs/franka_state --out=results/franka_state

Five seeds on the two hard tasks, three on the others. Every task and method has the numbers of configs/franka_state.py;
the number of demonstrations alone is a task's own, and sets how weak the start is.
"""

from stare_jax.runs.study import Study

NUM_DEMOS = {"StackCube-v1": 25, "LiftPegUpright-v1": 6, "PushCube-v1": 3, "PullCube-v1": 3}
"""Demonstrations of a task, for imitations that succeed about as often as the paper's: in 12, 5, 12 and 31 % of
episodes. The rule: of 3, 6, 12, 25, 50, and of 10 for the last two tasks, the largest number whose start succeeds in at
most 31 %, by the means of its actions, 100 episodes, seed 90. StackCube: 25 give 8 [4, 15] %, 50 give 49 [39, 59];
LiftPegUpright: 6 give 7 [3, 14], 12 give 37 [28, 47]; PushCube: 3 give 23 [16, 32], 10 give 96 [90, 98]; PullCube: 3
give 20 [13, 29], 10 give 98 [93, 99]."""


def get_study() -> Study:
    """Returns the grid of runs."""
    return Study(
        config="configs/franka_state.py:{task},{method}",
        methods=("sft", "ppo", "rl4vla", "dense", "sta_ppo_paper", "sta_ppo", "grape", "sta_tpo", "ipi"),
        tasks=tuple(NUM_DEMOS),
        seeds={
            "StackCube-v1": (0, 1, 2, 3, 4),
            "LiftPegUpright-v1": (0, 1, 2, 3, 4),
            "PushCube-v1": (0, 1, 2),
            "PullCube-v1": (0, 1, 2),
        },
        task_changes={task: {"demos.num_demos": number} for task, number in NUM_DEMOS.items()},
        # RL4VLA's reward pays for a grasp, which nobody makes of a cube that is pushed.
        without=(("PushCube-v1", "rl4vla"), ("PullCube-v1", "rl4vla")),
    )
