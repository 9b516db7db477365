"""What the reader of the pages has already, small and in its real format: weights, recordings, runs.

python tests/docs/given.py NAME        writes one of `MAKERS` into the working directory, or is one of `SERVERS`
"""

import contextlib
import dataclasses
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    _TESTS = Path(__file__).resolve().parents[1]
    sys.path += [str(path) for path in sorted(_TESTS.iterdir()) if path.is_dir()]
    sys.path[:0] = [str(_TESTS.parent / "launch")]


def openvla(folder: Path) -> None:
    import openvla_files

    tensors = openvla_files.random_normal(openvla_files.checkpoint_shapes(openvla_files.SMALL), "bfloat16")
    statistics = {"bridge_orig": openvla_files.ACTION}
    openvla_files.write(
        folder, tensors, openvla_files.config_json(openvla_files.SMALL, "bfloat16", norm_stats=statistics)
    )


def _pi05_tree(without: tuple[str, ...] = ()) -> dict:
    import openvla_files
    import pi05_files

    shapes = pi05_files.tree_shapes(pi05_files.SMALL)
    return openvla_files.random_normal({name: shape for name, shape in shapes.items() if name not in without})


def openpi(folder: Path) -> None:
    import pi05_files

    pi05_files.write_openpi(folder, _pi05_tree())
    pi05_files.write_stats(folder)


def lerobot_pi05(folder: Path) -> None:
    import pi05_files

    pi05_files.write_port(folder, pi05_files.to_port(_pi05_tree()), prefix="model.")
    pi05_files.write_stats(folder)


def paligemma(file: Path) -> None:
    import numpy as np
    from test_convert_pi05 import EXPERT

    np.savez(file, **{f"params/{n.removeprefix('PaliGemma/')}": x for n, x in _pi05_tree(tuple(EXPERT)).items()})


def pi05_json(file: Path) -> None:
    import pi05_files

    pi05_files.write_config(file)


def pi05_run(folder: Path) -> None:
    import jax
    import test_pi05_runs

    from stare_jax.models import make_policy

    config = test_pi05_runs.model_config()
    params = jax.jit(make_policy(config, test_pi05_runs.STATS).init)(jax.random.key(0))
    test_pi05_runs.save_run(folder, config, test_pi05_runs.flat(params))


def widowx_run(folder: Path) -> None:
    """A policy of the size of the quickstart's, with the simulated WidowX's camera."""
    import jax
    import test_export_run

    from stare_jax.models import make_policy, openvla_tiny
    from stare_jax.runs.config import RunConfig
    from stare_jax.stages import get_task

    model = openvla_tiny(camera="3rd_view_camera", prompt_length=32)
    env = dataclasses.replace(test_export_run.ENV, image_size=64)
    config = RunConfig(env, model, get_task(env.env_id).params)
    params = jax.jit(make_policy(model, test_export_run.STATS).init)(jax.random.key(0))
    test_export_run.save_run(folder, config, params)


def rlds(folder: Path) -> None:
    import rlds_builder

    rlds_builder.build(folder.parents[1])


def cups(folder: Path) -> None:
    """A LeRobotDataset whose gripper moves between 0 and 100 and whose subtasks are a person's words."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from lerobot_made import picture
    from made_trajectories import make_trajectory

    from stare_jax.data.export_lerobot import ExportConfig, export_lerobot
    from stare_jax.data.reader import Dataset
    from stare_jax.data.writer import DatasetWriter
    from stare_jax.stages import get_task

    spec, store = get_task("StackCube-v1"), folder.with_name("store")
    with DatasetWriter(store, env_id=spec.env_id) as writer:
        for i in range(4):
            episode = make_trajectory(i, length=6, horizon=6, success=i % 2 == 0, contact_at=2)
            action = episode.action
            action[:, -1] = np.where(np.arange(6) < 3, 100.0, 0.0)
            images = {"front": np.stack([picture(48, 64, i, t) for t in range(7)])}
            observation = episode.observation._replace(images=images)
            episode = episode._replace(observation=observation, action=action)
            writer.append(episode, instruction="stack the cups", seed=i // 2, source="me")
    export_lerobot(Dataset(store), folder, spec, ExportConfig(fps=10))
    shutil.rmtree(store)
    file = folder / "meta" / "subtasks.parquet"
    table, words = pq.read_table(file), dict(zip(spec.stage_names, ("reach", *WORDS), strict=True))
    rows = [{k: words.get(v, v) if isinstance(v, str) else v for k, v in row.items()} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)


WORDS = ("Grasp the cup", "Move to the shelf", "Release it")


def curves(folder: Path) -> None:
    import made_runs

    made_runs.make_run(folder, rise=3, seed=int(folder.name[-1]))


def peer(file: Path) -> None:
    shutil.copyfile("benchmarks/pi05_naive.py", file)


def quickstart_run(folder: Path) -> None:
    shutil.copytree("runs/quickstart", folder)


def imitation_of_study(folder: Path) -> None:
    shutil.copytree("runs/franka_state/StackCube-v1/sft/seed_0", folder)


MAKERS = {
    "given/openvla-7b": openvla,
    "given/pi05_base": openpi,
    "given/lerobot_pi05": lerobot_pi05,
    "given/pt_224.npz": paligemma,
    "given/pi05.json": pi05_json,
    "given/bridge_dataset/1.0.0": rlds,
    "home/lerobot/cups": cups,
    "my_openpi.py": peer,
    "runs/pi05_ppo": pi05_run,
    "runs/widowx": widowx_run,
    "runs/sta_0": curves,
    "runs/sta_1": curves,
    "runs/ppo_0": curves,
    "runs/ppo_1": curves,
    "runs/study": quickstart_run,
    "runs/on_gpu": quickstart_run,
    "runs/x": imitation_of_study,
}
"""Path in the copy of the repository -> what writes it."""


def openvla_server() -> None:
    """OpenVLA's own protocol, for the task that the pages ask it about; the address is printed."""
    import convention_server
    import numpy as np

    convention_server.PROMPT = "put the spoon on the towel"
    convention_server.decide(np.zeros((1, convention_server.SIZE, convention_server.SIZE, 3), np.uint8))
    server, address = convention_server.serve_rest(convention_server.openvla)
    print(address, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


SERVERS = {"openvla_server": openvla_server}

if __name__ == "__main__":
    if sys.argv[1] in SERVERS:
        SERVERS[sys.argv[1]]()
    else:
        _place = Path(sys.argv[1])
        _place.parent.mkdir(parents=True, exist_ok=True)
        MAKERS[sys.argv[1]](_place)
