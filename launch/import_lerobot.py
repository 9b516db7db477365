"""Imports a LeRobotDataset v3.0: demonstrations, and what people said of them, success and stages.

    python launch/import_lerobot.py --data=~/lerobot/cups --out=data/cups --gripper=0:100
    python launch/import_lerobot.py --data=~/lerobot/cups --out=data/staged --camera=observation.images.front=front \\
        --stages='reach; grasp=Grasp the cup|Take the cup; carry=Move to the shelf; place=Release it'

The result is a data set (stare_jax/data/schema.py) with its statistics, norm_stats.json, and a picture of some
episodes, episodes.png. Ctrl-C or SIGTERM stops; the same command goes on, and with a larger limit adds to what is
there. `--config.demos_from=OUT --config.demos_of=NAME` imitates it, and `--config.pairs_from=OUT` learns preferences
from its outcomes and stages; see docs/lerobot.md.
"""

import argparse
import sys
from collections.abc import Sequence

import command
from import_rlds import parse_gripper, report

from stare_jax.config import user_input
from stare_jax.data.import_lerobot import LeRobotImportConfig, import_lerobot
from stare_jax.data.lerobot_source import open_lerobot
from stare_jax.logging import Interruption

DEFAULT = LeRobotImportConfig()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=command.path, required=True, metavar="DIR", help="what to read")
    add("--out", type=command.path, required=True, metavar="DIR", help="where the data set goes")
    add("--name", help="of the data set from here on (default: the folder's)")
    add("--limit", type=int, metavar="N", help="episodes to read at most")
    add("--image-size", type=int, default=DEFAULT.image_size, metavar="PIXELS", help="0 keeps them (default: 224)")
    add("--skip-broken", action="store_true", help="leave out and count episodes that are broken, instead of an error")
    keys = parser.add_argument_group("features").add_argument
    keys(
        "--camera",
        action="append",
        default=[],
        metavar="FEATURE[=NAME]",
        help="a camera, and its name from here on; several of these for several (default: all)",
    )
    keys("--state-key", default=DEFAULT.state, metavar="FEATURE", help="(default: %(default)s, where it is there)")
    keys("--action-key", default=DEFAULT.action, metavar="FEATURE", help="(default: %(default)s)")
    keys(
        "--gripper",
        type=parse_gripper,
        metavar="CLOSED:OPEN",
        help="what the action's last number is where the gripper is closed and open (default: an ordinary number)",
    )
    said = parser.add_argument_group("what people said of the episodes").add_argument
    said(
        "--success-key", default=DEFAULT.success, metavar="NAME", help="of frames or of episodes (default: %(default)s)"
    )
    said("--success-return", type=float, metavar="SUM", help="of rewards, from which on an episode is a success")
    said("--reward-key", default=DEFAULT.reward, metavar="FEATURE", help="(default: %(default)s)")
    said("--stages", default="", metavar="NAMES", help="of the stages in order, 'reach; grasp=Grasp it|Take it; place'")
    said("--stage-key", default=DEFAULT.stage, metavar="FEATURE", help="stage of a frame (default: %(default)s)")
    said("--cost-key", default=DEFAULT.cost, metavar="FEATURE", help="cost of that stage (default: %(default)s)")
    return parser.parse_args(argv)


def import_dataset(arguments: argparse.Namespace) -> None:
    """Imports, or goes on importing, a data set and reports on it."""
    pairs = [text.partition("=") for text in arguments.camera]
    with user_input():
        config = LeRobotImportConfig(
            cameras=tuple(key for key, _, _ in pairs),
            names=tuple(name or key.removeprefix("observation.images.") for key, _, name in pairs),
            state=arguments.state_key,
            action=arguments.action_key,
            gripper=arguments.gripper,
            image_size=arguments.image_size,
            stages=arguments.stages,
            stage=arguments.stage_key,
            cost=arguments.cost_key,
            success=arguments.success_key,
            reward=arguments.reward_key,
            success_return=arguments.success_return,
            limit=arguments.limit,
            skip_broken=arguments.skip_broken,
        )
    source = open_lerobot(arguments.data)
    with Interruption() as interruption:
        dataset = import_lerobot(
            source,
            arguments.out,
            config,
            name=arguments.name or source.name,
            should_stop=lambda: interruption.requested,
        )
    report(dataset)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return command.run(lambda: import_dataset(arguments), go_on=command.repeat_command(argv))


if __name__ == "__main__":
    sys.exit(main())
