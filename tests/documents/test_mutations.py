"""Every field of every kind of JSON file, replaced by odd values one after another: each is read or refused by name."""

import json
import random

import numpy as np
import openvla_files
import pi05_files
import pytest
from test_lerobot_folder import write as write_lerobot
from test_openvla_documents import PUBLISHED, WHOLE_TEXT
from test_preprocessor import PUBLISHED as PROCESSOR

from stare_jax.config import UserError
from stare_jax.data.norm_stats import compute_statistics, read_norm_stats
from stare_jax.data.pairs import read_pairs
from stare_jax.data.schema import read_manifest
from stare_jax.documents.openvla import read_colours, read_description
from stare_jax.documents.peft import read_adapter
from stare_jax.evaluate.record import load_evaluation, load_results
from stare_jax.logging import read_metrics
from stare_jax.models.stored import named_model
from stare_jax.weights.files import list_file, list_model
from stare_jax.weights.formats import read_norm_stats as read_checkpoint_stats
from stare_jax.weights.openvla import read_config
from stare_jax.weights.pi05_formats import read_config as read_pi05_config
from stare_jax.weights.statistics import read_openvla_stats

ODD = (None, True, -1, 0, 0.5, 10**30, float("nan"), float("inf"), "", "x", [], [[]], {}, {"a": None}, [None] * 3)
"""values that stand in place of every value; a field is also left out, and one that nobody knows is added"""


def mutations(value):
    """Yields copies of a document, each with one change, at any depth."""
    if isinstance(value, dict):
        yield {"unknown": 1} | value
        for name in value:
            yield {other: x for other, x in value.items() if other != name}
            yield from ({**value, name: odd} for odd in (*ODD, *mutations(value[name])))
    elif isinstance(value, list) and value:
        yield value[1:]
        yield [*value, value[0]]
        yield from ([odd, *value[1:]] for odd in (*ODD, *mutations(value[0])))


def openvla(folder):
    (folder / "config.json").write_text(json.dumps(openvla_files.config_json(openvla_files.SMALL, "float32")))
    return folder / "config.json", lambda: (read_config(folder), read_openvla_stats([folder]))


def published_openvla(folder):
    text = PUBLISHED["text_config"] | WHOLE_TEXT | {"layer_types": ["full_attention"]}
    (folder / "config.json").write_text(json.dumps(PUBLISHED | {"text_config": text}))
    return folder / "config.json", lambda: read_description(folder)


def processor(folder):
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder / "preprocessor_config.json", lambda: read_colours(folder, 224)


def adapter(folder):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(openvla_files.adapter_json(2, 4, ["q"])))
    return file, lambda: read_adapter(file)


def own_statistics(folder):
    statistics = compute_statistics(np.eye(3), np.eye(3)[:, :2], num_trajectories=1)
    (folder / "norm_stats.json").write_text(json.dumps({"X": statistics}))
    return folder / "norm_stats.json", lambda: read_norm_stats(folder, action_dim=3, state_dim=2)


def openpi_statistics(folder):
    write_lerobot(folder)
    (folder / "policy_preprocessor.json").unlink()
    (folder / "policy_postprocessor.json").unlink()
    return pi05_files.write_stats(folder, dim=2, state_dim=2), lambda: read_checkpoint_stats(folder)


def lerobot(folder):
    write_lerobot(folder)
    return folder / "config.json", lambda: read_pi05_config(folder)


def lerobot_processor(folder):
    write_lerobot(folder)
    return folder / "policy_preprocessor.json", lambda: read_checkpoint_stats(folder)


def own_model(folder):
    file = pi05_files.write_config(folder / "model.json")
    return file, lambda: named_model(str(file))


def index(folder):
    write_lerobot(folder)
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"model.action_in_proj.weight": "model.safetensors"}}))
    return file, lambda: list_model(folder)


def evaluation(folder):
    (folder / "eval").mkdir()
    info = {"env_id": "X", "stage_names": ["a"], "horizon": 2, "temperature": 0.0, "num_steps": 2, "wall_s": 1.0}
    rows = {name: [True] for name in ("valid", "success_end", "success_once", "grasped", "contacted")}
    rows |= {"seed": [3], "start": [0], "success_at": [1], "stage_reached": [0], "start_hash": ["a"]}
    rows |= {"completed": [[True]], "entered_at": [[0]], "stage_len": [[3]]}
    file = folder / "eval/sft.json"
    file.write_text(json.dumps({"phase": "sft", "settings": {}, "videos": [], "info": info, "episodes": rows}))
    return file, lambda: (load_evaluation(file), load_results(folder))


def manifest(folder):
    part = {"name": "a", "num_records": 1, "num_bytes": 1, "sha256": "0"}
    row = {
        "seed": 1,
        "instruction": "",
        "source": "x",
        "noise_scale": 0.0,
        "success": True,
        "length": 1,
        "attempt": None,
    }
    content = {"format": "stare_jax/dataset", "format_version": 2, "env_id": "X", "control_mode": ""}
    content |= {name: {} for name in ("settings", "filters", "packages", "progress")}
    content |= {"shapes": {"state": [2]}, "shards": [{"frames": part, "episodes": part}], "episodes": [row]}
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder / "manifest.json", lambda: read_manifest(folder)


def pairs(folder):
    (folder / "pairs.json").write_text(
        json.dumps({"pairs": [{"chosen": 0, "rejected": 1, "kind": "success, same start"}]})
    )
    return folder / "pairs.json", lambda: read_pairs(folder)


def metrics(folder):
    line = {"step": 1, "phase": "sft", "wall_time": 1.0, "sft/loss": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return folder / "metrics.jsonl", lambda: read_metrics(folder)


SHARE = 100
"""mutations of each kind of file that are tried every time, of 40 to 800; all of them with the slow tests"""
KINDS = (openvla, published_openvla, processor, adapter, own_statistics, openpi_statistics, lerobot, lerobot_processor)
KINDS += (own_model, index, evaluation, manifest, pairs, metrics)


@pytest.mark.parametrize("share", [SHARE, pytest.param(10**6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_field_is_read_or_refused_by_name_whatever_is_there(tmp_path, kind, share):
    folder = tmp_path / "folder"
    folder.mkdir()
    file, read = kind(folder)
    read()
    document, num_refused, failed = json.loads(file.read_text()), 0, []
    every = list(mutations(document))
    for changed in random.Random(0).sample(every, min(share, len(every))):
        file.write_text(json.dumps(changed))
        try:
            read()
        except UserError:
            num_refused += 1
        except Exception as error:
            failed.append((changed, repr(error)))
    assert not failed, f"{len(failed)}, the first: {failed[0]}"
    assert num_refused > min(share, len(every)) / 5


def test_a_header_of_safetensors_is_read_or_refused_by_name(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    file, num_refused = tmp_path / "model.safetensors", 0
    for changed in mutations(header):
        text = json.dumps(changed).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        try:
            list_file(file)
        except UserError:
            num_refused += 1
    assert num_refused > 40
