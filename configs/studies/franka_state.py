"""Figure 4 and table 2 at our size: the methods on the four Franka tasks from the state.

    python launch/study.py --study=configs/studies/franka_state.py --print      the commands, in order
    python launch/study.py --study=configs/studies/franka_state.py --jobs=2     two at a time, each on a core of its own
    python launch/compare.py --study=runs/franka_state --out=results/franka_state

Five seeds on the two hard tasks, three on the others. Every task and method has the numbers of configs/franka_state.py;
the number of demonstrations alone is a task's own, and sets how weak the start is.
"""

from stare_jax.runs.study import Study

NUM_DEMOS = {"StackCube-v1": 50, "LiftPegUpright-v1": 12, "PushCube-v1": 3, "PullCube-v1": 3}
"""Demonstrations of a task, for imitations that succeed about as often as the paper's: in 12, 5, 12 and 31 % of
episodes. The rule: of 3, 6, 12, 25, 50, 100, and of 10 for the last two tasks, the largest number whose start succeeds
in at most 31 % of sampled episodes, which PPO begins to learn from (100 episodes, seed 90; in brackets by the means of
the actions). StackCube: 50 give 30 (49) %, 100 give 44 (83); LiftPegUpright: 12 give 27 (37), 25 give 57 (74);
PushCube: 3 give 25 (23), 10 give 97 (96); PullCube: 3 give 17 (20), 10 give 99 (98)."""


def get_study() -> Study:
    """Returns the grid of runs."""
    return Study(
        config="configs/franka_state.py:{task},{method}",
        methods=(
            "sft",
            "ppo",
            "rl4vla",
            "dense",
            "sta_ppo_paper",
            "sta_ppo",
            "sta_ppo_jump_start",
            "grape",
            "sta_tpo",
            "ipi",
        ),
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
