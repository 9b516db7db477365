"""STA-TPO on recordings that nobody can simulate: a data set of this library with its signals taken out, by lerobot's
format, with the stages as its annotations."""

import dataclasses

import jax
import lerobot_made
import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_made import SPEC

from stare_jax.config import ConfigError
from stare_jax.data.export_lerobot import ExportConfig, export_lerobot
from stare_jax.data.import_lerobot import LeRobotImportConfig, import_lerobot
from stare_jax.data.lerobot_source import open_lerobot
from stare_jax.data.pairs import dataset_outcomes, load_pairs, make_pairs, read_pairs
from stare_jax.envs import EnvConfig
from stare_jax.evaluate.protocol import EvalConfig
from stare_jax.logging import read_metrics
from stare_jax.models import MLPConfig, openvla_tiny, pi05_tiny
from stare_jax.runs.config import RunConfig
from stare_jax.runs.ipi import run_ipi
from stare_jax.stages import action_stages, annotated_stages
from stare_jax.state.optimizer import OptimizerConfig
from stare_jax.train.sft import SFTConfig
from stare_jax.train.tpo import TPOConfig

LENGTHS = (4, 3, 5, 4, 3, 5)
STAGES = "; ".join(SPEC.stage_names)
ENV = EnvConfig(SPEC.env_id, image_size=0, horizon=4)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    return lerobot_made.write(tmp_path_factory.mktemp("store"), lengths=LENGTHS, words=("push it",))


@pytest.fixture(scope="module")
def exported(simulated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lerobot") / "cups"
    export_lerobot(simulated, folder, SPEC, ExportConfig(fps=10, images="image"))
    return folder


@pytest.fixture(scope="module")
def recorded(exported, tmp_path_factory):
    """The same episodes without signals, seeds told, and all costs."""
    config = LeRobotImportConfig(image_size=0, stages=STAGES)
    return import_lerobot(open_lerobot(exported), tmp_path_factory.mktemp("cups"), config, name="cups")


@pytest.fixture(scope="module")
def labelled(exported, tmp_path_factory):
    """The same as people have it who annotate names and outcomes by hand: no costs, no seeds, no more."""
    folder = tmp_path_factory.mktemp("by_hand") / "set"
    folder.mkdir()
    for path in exported.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(exported)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (path,) = folder.glob("meta/episodes/*/*.parquet")
    pq.write_table(pq.read_table(path).drop(["num_stages_completed", "stage_costs", "seed"]), path)
    config = LeRobotImportConfig(image_size=0, stages=STAGES, cost="")
    return import_lerobot(open_lerobot(folder), tmp_path_factory.mktemp("labelled"), config, name="cups")


def make_config(directory, model=None, **changes):
    adam = OptimizerConfig(learning_rate=3e-2)
    return RunConfig(
        env=ENV,
        model=model or MLPConfig(state_dim=4, action_dim=7, hidden_dims=(16,), value_dims=(16,)),
        stages=ENV.spec.params,
        demos_from=str(directory),
        demos_of="cups",
        pairs_from=str(directory),
        evaluation=EvalConfig(num_episodes=0),
        **{
            "phases": ("sft", "tpo"),
            "sft": SFTConfig(num_steps=2, batch_size=4, log_every=1, optimizer=adam),
            "tpo": TPOConfig(num_epochs=30, batch_size=2, optimizer=adam),
            **changes,
        },
    )


def test_annotations_are_what_signals_would_give(simulated, recorded):
    pairs = make_pairs(dataset_outcomes(recorded, ()), num_pairs=9)
    assert pairs == make_pairs(dataset_outcomes(simulated, SPEC), num_pairs=9) and pairs
    given, measured = (load_pairs(one, pairs, horizon=6) for one in (recorded, simulated))
    for side in ("chosen", "rejected"):
        ours, theirs = getattr(given, side), getattr(measured, side)
        got = jax.jit(jax.vmap(annotated_stages))(ours.stages, ours.valid)
        expected = jax.jit(jax.vmap(lambda *episode: action_stages(*episode, spec=SPEC)))(theirs.signals, theirs.valid)
        np.testing.assert_array_equal(got.mask, expected.mask)
        np.testing.assert_array_equal(got.completed, expected.completed)
        np.testing.assert_allclose(got.cost, expected.cost, rtol=1e-6)


def test_recordings_without_seeds_begin_each_on_their_own(labelled):
    outcomes = dataset_outcomes(labelled, ())
    assert len({outcome.seed for outcome in outcomes}) == len(LENGTHS)
    assert {pair.kind for pair in make_pairs(outcomes, num_pairs=9)} <= {"success, other start", "stage, other start"}


def test_a_run_learns_the_preferences_of_recordings(recorded, tmp_path):
    run_ipi(make_config(recorded.directory), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if line["phase"] == "tpo"]
    assert lines[-1]["tpo/margin"] > 0.5 > abs(lines[0]["tpo/margin"])
    assert any(line["tpo/cost_margin"] != 0 for line in lines)
    assert read_pairs(tmp_path / "run" / "tpo" / "pairs", recorded.fingerprint)


def test_without_costs_their_terms_are_off(labelled, tmp_path, capsys):
    run_ipi(make_config(labelled.directory, phases=("tpo",)), tmp_path)
    lines = [line for line in read_metrics(tmp_path) if line["phase"] == "tpo"]
    assert all(line["tpo/cost_margin"] == 0 for line in lines)
    assert any(line["tpo/count_stage_0"] for line in lines) and lines[-1]["tpo/margin"] > 0.5
    assert "have no costs of stages: tpo.cost_coef is of no effect" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "augment"),
    [
        pytest.param(openvla_tiny(camera="wrist", prompt_length=48), "openvla", id="openvla"),
        pytest.param(pi05_tiny(cameras=("wrist",), prompt_length=48, preference="flow"), "openpi", id="pi05"),
    ],
)
def test_an_image_policy_learns_from_recordings_with_changed_images(recorded, tmp_path, model, augment):
    sft = SFTConfig(num_steps=2, batch_size=4, log_every=1, augment=augment)
    config = make_config(recorded.directory, model, sft=sft, tpo=TPOConfig(num_epochs=1, batch_size=2))
    run_ipi(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    losses = [line["sft/loss"] for line in lines if line["phase"] == "sft"]
    assert len(losses) == 2 and any(np.isfinite(line.get("tpo/loss", np.nan)) for line in lines)
    plain = dataclasses.replace(config, phases=("sft",), pairs_from="", sft=dataclasses.replace(sft, augment="none"))
    run_ipi(plain, tmp_path / "plain")
    others = [line["sft/loss"] for line in read_metrics(tmp_path / "plain") if line["phase"] == "sft"]
    assert losses[-1] != others[-1], (losses, others)  # pi0.5's gates begin at 0: its first loss sees nothing.


def test_what_is_not_for_a_run_is_refused(recorded, simulated, tmp_path):
    config = make_config(recorded.directory)
    wrong = dataclasses.replace(config, pairs_from=str(simulated.directory))
    with pytest.raises(ConfigError, match="got a data set without annotated stages, expected one that was imported"):
        run_ipi(wrong, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"got phases \('sft',\), expected 'tpo' among them"):
        run_ipi(dataclasses.replace(config, phases=("sft",)), tmp_path / "run")
    model = dataclasses.replace(config.model, action_dim=3)
    with pytest.raises(ConfigError, match=r"action: got \[7\], expected \[3\]"):
        run_ipi(dataclasses.replace(config, model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()
