"""Figure 4 and table 2 at our size: the methods on the four Franka tasks from the state.

    python launch/study.py --study=configs/studies/franka_state.py --print      the commands, in order
    python launch/study.py --study=configs/studies/franka_state.py --jobs=2     two at a time, each on a core of its own
    python launch/compare.py --study=runs/franka_state --out=results/franka_state

Five seeds on the two hard tasks, three on the others. Every task and method has the numbers of configs/franka_state.py;
the number of demonstrations alone is a task's own, and sets how weak the start is.
"""

from stare_jax.runs.study import Study

NUM_DEMOS = {"StackCube-v1": 100, "LiftPegUpright-v1": 50, "PushCube-v1": 25, "PullCube-v1": 25}
"""Demonstrations of a task, for imitations that succeed about as often as the paper's: in 12, 5, 12 and 31 % of
episodes. The rule: of 25, 50, 100 (and 150 for StackCube) the number whose start is nearest to the paper's, between 5
and 31 %, sampled at the temperature of PPO, 100 episodes, seed 90. StackCube: 50 give 0 %, 100 give 6 [3, 13], 150
give 28 [20, 38]; LiftPegUpright: 50 give 8 [4, 15]; PushCube: 25 give 29 [21, 38], 50 give 62; PullCube: 25 give 22
[15, 31], 50 give 64."""


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
