"""Kinds of files that the library reads: how they are written, how they are read, and what may be another value.

The rules are of the formats, not of the code: a field that may be left out, a name that is free, a signed number.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import openvla_files
import pi05_files
import toy_run
from made_runs import save_rate
from made_trajectories import make_trajectory
from mutations import NOTHING, parse
from test_lerobot_folder import MODES
from test_lerobot_folder import write as write_lerobot
from test_openvla_documents import PUBLISHED, WHOLE_TEXT
from test_preprocessor import PUBLISHED as PROCESSOR
from trials import Kind, anything, at, either, empty, flag, list_of, missing, null, number, optional, plain, text

from stare_jax.config import from_dict, to_dict
from stare_jax.data.norm_stats import compute_statistics, read_norm_stats
from stare_jax.data.pairs import read_pairs
from stare_jax.data.reader import Dataset
from stare_jax.data.scores import keep_scores
from stare_jax.data.writer import DatasetWriter
from stare_jax.documents.openvla import read_colours, read_description
from stare_jax.documents.peft import read_adapter
from stare_jax.evaluate.films import Film
from stare_jax.evaluate.parts import PartsDone, load_parts, save_parts
from stare_jax.evaluate.record import load_evaluation, load_results
from stare_jax.logging import last_lines, read_metrics, write_config
from stare_jax.models.stored import named_model
from stare_jax.runs.config import RunConfig
from stare_jax.runs.directory import read_record, record_phase
from stare_jax.runs.jobs import is_finished, read_attempt
from stare_jax.runs.load import load_config
from stare_jax.runs.progress import seconds_of_kinds
from stare_jax.runs.start import read_statistics, write_statistics
from stare_jax.runs.study import Job, plan_study
from stare_jax.types import NormStats
from stare_jax.weights.files import Spec, check_tensors, list_file, list_model, read, write_file
from stare_jax.weights.formats import read_norm_stats as read_checkpoint_stats
from stare_jax.weights.openvla import read_config
from stare_jax.weights.pi05_formats import read_config as read_pi05_config
from stare_jax.weights.statistics import read_openvla_stats


def put(folder, name, content):
    """Writes a JSON file and returns it."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


# ----------------------------------------------------------------------------------------------- checkpoints of others

FEATURES = ("STATE", "VISUAL", "ENV", "ACTION", "REWARD", "LANGUAGE")
"""lerobot's types of inputs and outputs"""
QUANTILES = r"(q01|q99|min|max|mean|std)\[\d+\]"
WHOLE_OPENVLA = PUBLISHED | {
    "text_config": PUBLISHED["text_config"] | WHOLE_TEXT | {"layer_types": ["full_attention"] * 2}
}


def write_published(folder):
    put(folder, "config.json", WHOLE_OPENVLA)
    put(folder, "generation_config.json", {"bos_token_id": 1, "num_beams": 1, "repetition_penalty": 1.0})


def write_openpi(folder):
    write_lerobot(folder)
    (folder / "policy_preprocessor.json").unlink()
    (folder / "policy_postprocessor.json").unlink()
    pi05_files.write_stats(folder, dim=2, state_dim=2)


def write_index(folder):
    write_lerobot(folder)
    put(
        folder,
        "model.safetensors.index.json",
        {"weight_map": {"model.action_in_proj.weight": "model.safetensors"}},
    )


SPECS = {"a": Spec("float32", (2, 3)), "b": Spec("bfloat16", (4,)), "c": Spec("float32", (2, 3))}


def write_tensors(folder):
    values = {
        name: np.arange(6).reshape(spec.shape) if spec.dtype == "float32" else np.ones(4)
        for name, spec in SPECS.items()
    }
    write_file(folder / "x.safetensors", SPECS, ((n, x.astype(_dtype(SPECS[n]))) for n, x in values.items()))


def _dtype(spec):

    return jnp.dtype(spec.dtype)


def read_tensors(folder):
    tensors = list_file(folder / "x.safetensors")
    check_tensors(folder / "x.safetensors", tensors, SPECS)
    return {name: np.array(read(stored)) for name, stored in tensors.items()}


def has_same_header(old, new):
    """Says whether only numbers of tensors differ, which the format has no checksums of, or tensors are exchanged."""
    if len(old) != len(new) and len(old) - 8 - _header(old) != len(new) - 8 - _header(new):
        return False
    try:
        entries = [parse(content[8 : 8 + _header(content)]) for content in (old, new)]
    except ValueError:
        return False
    tensors = [[str(entry) for name, entry in x.items() if name != "__metadata__"] for x in entries]
    return sorted(tensors[0]) == sorted(tensors[1])


def _header(content):
    return int.from_bytes(content[:8], "little")


TEXT_FIELDS = {r"text_config\.\w+": optional, r"tiny_timm_overrides.*": optional, "text_config": empty}
OTHERS = (
    Kind(
        "config.json of a small OpenVLA",
        lambda folder: put(folder, "config.json", openvla_files.config_json(openvla_files.SMALL, "float32")),
        lambda folder: (read_config(folder), read_openvla_stats([folder])),
        rules=TEXT_FIELDS
        | {
            rf"norm_stats\.robot\.action\.{QUANTILES}": number,
            r"norm_stats\.robot\.action\.mask\[\d\]": flag,
            r"norm_stats\.robot(\.action\.mask)?": missing,
            "tiny_timm_overrides.*": either(optional, empty),
            r"text_config\.num_key_value_heads": optional,
        },
    ),
    Kind(
        "config.json of the published OpenVLA",
        write_published,
        read_description,
        rules=TEXT_FIELDS
        | {
            r"arch_specifier|llm_backbone_id|model_type|n_action_bins|use_fused_vision_backbone": optional,
            r"timm_override_act_layers": either(optional, list_of(null)),
            r"text_config\.layer_types": either(optional, list_of(lambda word: word == "full_attention")),
            r"text_config\.(rope_parameters|rope_scaling)(\.\w+)?": either(optional, empty),
            r"torch_dtype": either(optional, lambda word: word in ("bfloat16", "float16", "float32")),
        },
        may_miss=("generation_config.json",),
    ),
    Kind(
        "image processor",
        lambda folder: put(folder, "preprocessor_config.json", PROCESSOR),
        lambda folder: read_colours(folder, 224),
        rules={
            r"(tvf_normalize_params\[\d\]\.mean|means\[\d\])\[\d\]": number,
            r"tvf_normalize_params": optional,
        },
        may_miss=("preprocessor_config.json",),
    ),
    Kind(
        "adapter",
        lambda folder: put(folder, "adapter_config.json", openvla_files.adapter_json(2, 4, ["q"])),
        lambda folder: read_adapter(folder / "adapter_config.json"),
        rules={"init_lora_weights": either(optional, flag)},
    ),
    Kind(
        "statistics of openpi",
        write_openpi,
        read_checkpoint_stats,
        "norm_stats.json",
        rules={
            rf"norm_stats\.(state|actions)\.{QUANTILES}": number,
            r"norm_stats\.state": missing,
            r"norm_stats\.(state|actions)\.q\d\d": list_of(number),
        },
        may_miss=("norm_stats.json",),
    ),
    Kind(
        "config.json of lerobot",
        write_lerobot,
        read_pi05_config,
        "config.json",
        rules={
            r"input_features\.observation\.images\.\w+": missing,
            # What is missing is lerobot's own default, as for lerobot; the last two are not read here.
            r"(chunk_size|n_action_steps|num_inference_steps|max_action_dim|image_resolution|input_features)": optional,
            r"(max_state_dim|time_sampling_beta_alpha)": missing,
            r"input_features": empty,
            r"input_features\..*\.type": lambda word: word in FEATURES,
        },
    ),
    Kind(
        "processors of lerobot",
        write_lerobot,
        read_checkpoint_stats,
        "policy_*",
        rules={
            r"steps\[\d\]\.config(\.features\..*|\.\w+)?": either(missing, empty),
            r"steps\[\d\]\.config\.features\..*\.type": lambda word: word in FEATURES,
            r"steps\[\d\]\.config\.norm_map\.\w+": either(missing, lambda word: word in MODES),
        },
        is_lawful=has_same_header,
        may_miss=("policy_preprocessor.json", "policy_postprocessor.json"),
    ),
    Kind("index of tensors", write_index, list_model, "*.index.json", may_miss=("model.safetensors.index.json",)),
    Kind("safetensors", write_tensors, read_tensors, "*.safetensors", is_lawful=has_same_header),
)

# -------------------------------------------------------------------------------------------------------- our data sets


def write_data_set(folder):
    with DatasetWriter(folder, env_id="X", control_mode="m", settings={"seed": 1}, episodes_per_shard=2) as writer:
        for seed in range(3):
            episode = make_trajectory(seed, length=seed + 1, num_tokens=2)
            writer.append(episode, instruction="push", seed=seed, source="expert", attempt=seed)
        writer.flush(progress={"num_attempts": 3, "num_steps": 6, "num_dropped": 0})


def read_data_set(folder):
    dataset = Dataset(folder)
    episodes = [dataset.episode(i) for i in range(dataset.num_episodes)]
    return dataset.manifest, dataset.fingerprint, episodes


def go_on_writing(folder):
    """Reads a data set as a writer that goes on with it does, which makes room for what it is going to write."""
    settings = {"env_id": "X", "control_mode": "m", "settings": {"seed": 1}}
    with DatasetWriter(folder, **settings) as writer:
        return len(writer.manifest.shards), writer.manifest.progress


MANIFEST = {
    r"(env_id|control_mode|episodes\[\d\]\.(instruction|source))": text,
    r"(settings|filters|packages)(\..*)?": anything,
    r"progress(\.\w+)?": either(missing, empty),
    r"episodes\[\d\]\.seed": null,
    r"episodes\[\d\]\.success": either(null, flag),
    r"episodes\[\d\]\.attempt": optional,
    r"shapes\.decision/bins(\[\d\])?": anything,
    r"format_version": lambda version: version == 1,
}


def write_own_statistics(folder):
    put(folder, "norm_stats.json", {"X": compute_statistics(np.eye(3), np.eye(3)[:, :2], num_trajectories=1)})


def write_pairs(folder):
    pairs = [{"chosen": i, "rejected": 3 - i, "kind": "success, same start"} for i in range(3)]
    put(folder, "pairs.json", {"pairs": pairs})


STATISTICS = {
    rf"(X\.)?(action|proprio)\.{QUANTILES}": number,
    r"X\.action\.mask\[\d\]|action_mask\[\d\]": flag,
    r"X(\.(action|proprio)\.(mask|min|max))?": missing,
    r"(action|state)_q\d\d\[\d\]": number,
}
DATA = (
    Kind("manifest", write_data_set, read_data_set, "manifest.json", rules=MANIFEST),
    Kind("shards", write_data_set, read_data_set, "*.array_record"),
    Kind("data set that grows", write_data_set, go_on_writing, rules=MANIFEST),
    Kind(
        "statistics of a data set",
        write_own_statistics,
        lambda folder: read_norm_stats(folder, action_dim=3, state_dim=2),
        rules=STATISTICS,
    ),
    Kind(
        "preference pairs",
        write_pairs,
        read_pairs,
        rules={
            "pairs": list_of(lambda pair: isinstance(pair, dict) and set(pair) >= {"chosen", "rejected", "kind"}),
        },
    ),
)

# --------------------------------------------------------------------------------------------------------------- runs


def taken(path, value, result):
    """Says whether a result has the value that a file has, or one of its own where the file has none."""
    return value is NOTHING or _includes(_loose(at(result, path)), _loose(plain(value)))


def _includes(got, fields):
    """A section has the fields that are given, and the others."""
    if isinstance(got, dict) and isinstance(fields, dict):
        return all(name in got and _includes(got[name], value) for name, value in fields.items())
    return got == fields


def _loose(value):
    """Whole numbers are written for others, too."""
    if isinstance(value, dict):
        return {name: _loose(item) for name, item in value.items()}
    if isinstance(value, list):
        return list(map(_loose, value))
    return plain(float(value)) if type(value) is int else value


def taken_by_a_run(path, value, result):
    """The same, where null stands for the task's own number."""
    return taken(path, value, result) or value is None and path.startswith("stages")


def write_record(folder):
    record = record_phase(toy_run.make_config(), "sft", start="random", data={"demos": "abc", "num_episodes": 4})
    put(folder, "sft/record.json", record._asdict())


def write_run_statistics(folder):
    low = np.float32([-1, 0])
    write_statistics(folder, NormStats(low, low + 1, np.array([True, False]), low[:1], low[:1] + 2))


def write_metrics(folder):
    lines = [
        {"step": step, "phase": phase, "wall_time": 1.5, "sft/loss": 0.5 / step, "env/success": None}
        for step, phase in ((1, "sft"), (2, "sft"), (1, "ppo"), (2, "ppo"))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(folder):
    lines = read_metrics(folder)
    return lines, last_lines(lines, "ppo")


def are_lines(old, new):
    """Says whether all whole lines are metrics, as the format has them; a last one may be torn."""
    try:
        lines = [parse(line) for line in new.split(b"\n")[:-1] if line.strip()]
    except ValueError:
        return False
    return all(
        isinstance(line, dict)
        and type(line.get("step")) is int
        and line["step"] >= 0
        and isinstance(line.get("phase"), str)
        and all(x is None or number(x) for name, x in line.items() if name != "phase")
        for line in lines
    )


def read_evaluation(folder):
    results = load_results(folder)
    return load_evaluation(folder / "eval/sft.json"), [(result.phase, result.summary) for result in results]


IDENTITY = {"seeds": [1, 2]}


def write_parts(folder):
    save_rate(folder, "sft", 1, 2)
    episodes = load_evaluation(folder / "eval/sft.json").episodes
    film = Film(0, make_trajectory(1).signals, np.ones(6, bool), np.zeros((6, 4, 4, 3), np.uint8))
    save_parts(
        folder / "eval/sft.partial", IDENTITY, PartsDone(1, episodes, np.zeros((2, 22), np.float32), 9, 1.5, (film,))
    )


def read_scores(folder):
    """Scores that are not there are computed again."""
    return keep_scores(folder, "sft/4/aaaa")("chosen", np.arange(3), lambda: np.float32([[1, 2], [3, 4], [5, 6]]))


JOB = Job("task/ppo/seed_0", ("--config=x.py", "--config.seed=0"), (), "ppo")


def write_attempt(folder):
    fields = {"arguments": JOB.arguments, "slot": 0, "pid": 12, "started": 1.5, "done_before": 0.2}
    put(folder, f"{JOB.name}.json", fields | {"seconds": 80.0, "exit_code": 0})


def read_job(folder):
    return read_attempt(folder, JOB), is_finished(folder, JOB), seconds_of_kinds(folder, [JOB])


def write_python(name):
    source = Path(__file__).resolve().parents[2] / name
    return lambda folder: (folder / "mine.py").write_text(source.read_text())


def read_configuration(folder):
    from configuration import load_configuration

    values = load_configuration(str(folder / "mine.py"))
    return to_dict(from_dict(RunConfig, {name: value for name, value in values.items() if name != "name"}))


def read_study(folder):
    from study import load_study

    from configs.methods import METHODS

    return plan_study(load_study(folder / "mine.py"), METHODS, "runs/x")


RUNS = (
    Kind(
        "config.json of a run",
        lambda folder: write_config(folder, to_dict(toy_run.make_config())),
        lambda folder: to_dict(load_config(folder)),
        is_taken=taken_by_a_run,
    ),
    Kind(
        "config.json of a model",
        lambda folder: pi05_files.write_config(folder / "model.json"),
        lambda folder: to_dict(named_model(str(folder / "model.json"))),
        is_taken=taken,
    ),
    Kind("record of a phase", write_record, lambda folder: read_record(folder / "sft"), is_taken=taken),
    Kind("statistics of a run", write_run_statistics, read_statistics, rules=STATISTICS, may_miss=("norm_stats.json",)),
    Kind("metrics", write_metrics, read_lines, "*.jsonl", is_lawful=are_lines, may_miss=("metrics.jsonl",)),
    Kind(
        "evaluation",
        lambda folder: save_rate(folder, "sft", 1, 3),
        read_evaluation,
        rules={
            r"info\.(env_id|stage_names\[\d\]|backend|jitter|checkpoint)": either(text, missing),
            r"episodes\.(valid|success_end|success_once|grasped|contacted|completed)\[\d\](\[\d\])?": flag,
            r"episodes\.(start_hash|task)(\[\d\])?": either(missing, empty, text),
        },
    ),
    Kind(
        "parts of an evaluation",
        write_parts,
        lambda folder: load_parts(folder / "eval/sft.partial", IDENTITY),
        "*.npz",
        may_miss=("episodes.npz",),
    ),
    Kind(
        "job of a study",
        write_attempt,
        read_job,
        rules={
            r"arguments(\[\d\])?": either(text, list_of(text)),
            r"started": number,
            r"exit_code": number,
            r"done_before": missing,
        },
        may_miss=("seed_0.json",),
    ),
    Kind(
        "configuration in Python",
        write_python("configs/study_pushcube_state.py"),
        read_configuration,
        "*.py",
        is_lawful=lambda old, new: True,
    ),
    Kind(
        "study in Python",
        write_python("configs/studies/franka_state.py"),
        read_study,
        "*.py",
        is_lawful=lambda old, new: True,
    ),
    Kind("scores of a reference", read_scores, read_scores, "*.npz", may_miss=("chosen.npz",)),
)
