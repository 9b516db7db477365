"""The three loops: resuming is going on, nothing is compiled twice, what goes wrong says where."""

import dataclasses
import json
import re
import weakref

import jax
import numpy as np
import pytest
from toy_task import NUM_ENVS, Writer, demo_batches, demonstrations, fresh, random_pairs

from stare_jax.config import ConfigError, to_dict
from stare_jax.data.arrays import ArraysError
from stare_jax.data.pairs import pair_indices
from stare_jax.data.scores import keep_scores
from stare_jax.envs import toy
from stare_jax.envs.base import SimulatorError
from stare_jax.envs.seeds import VALIDATION_SEEDS, first_seed, phase_key
from stare_jax.logging import Interrupted, check_finite
from stare_jax.models import MLPConfig, openvla_tiny
from stare_jax.rollout import acting
from stare_jax.rollout.prepared import prepare_params
from stare_jax.rollout.validation import Best, ValidationConfig
from stare_jax.state import checkpoint
from stare_jax.state.checkpoint import CheckpointError
from stare_jax.state.optimizer import OptimizerConfig, make_optimizer
from stare_jax.train import ppo_batch, update
from stare_jax.train.loop import checkpoint_directory, start_phase
from stare_jax.train.ppo import PPOConfig, train_ppo
from stare_jax.train.sft import SFTConfig, train_sft
from stare_jax.train.tpo import TPOConfig, train_tpo
from stare_jax.train.tpo_reference import score_pairs

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=3, schedule="linear")
VALUE_FROZEN = dataclasses.replace(OPTIMIZER, freeze=("^value",))
SFT = SFTConfig(num_steps=6, batch_size=32, log_every=1, checkpoint_every=4, optimizer=VALUE_FROZEN)
TPO = TPOConfig(num_epochs=3, batch_size=4, checkpoint_every=4, optimizer=VALUE_FROZEN)
PPO = PPOConfig(
    num_iterations=4, num_episodes=20, num_epochs=2, minibatch_size=256, target_kl=0.05, optimizer=OPTIMIZER
)


@pytest.fixture(scope="module")
def train(policy, params, spec):
    """train(phase, run, env=None, **changes of the config) -> parameters."""
    batches = demo_batches(*demonstrations(NUM_ENVS), size=32)
    pairs = random_pairs(policy, params, 8)

    def call(phase, run, env=None, **changes):
        config = dataclasses.replace({"sft": SFT, "tpo": TPO, "ppo": PPO}[phase], **changes)
        if phase == "sft":
            return train_sft(policy, fresh(params), batches, config, run)
        if phase == "tpo":
            return train_tpo(policy, fresh(params), pairs, spec, config, run)
        return train_ppo(policy, fresh(params), env or toy.ToyPush(NUM_ENVS), spec, config, run)

    return call


PLACE = (VALIDATION_SEEDS, 0)
"""of the seeds of validations of run seed 0"""


class Seeing(toy.ToyPush):
    """Keeps the seeds that it is reset with; moving to the right is a success, which a random policy often has."""

    def __init__(self):
        super().__init__(NUM_ENVS)
        self.seeds = []

    def reset(self, seeds, *, reproducible=False):
        self.seeds += [int(seed) for seed in seeds]
        return super().reset(seeds)

    def _observe(self, measured):
        state = super()._observe(measured)
        return state._replace(signals=state.signals._replace(success=state.signals.tcp_pos[:, 0] > -0.06))

    def send(self, action, reset_seeds=None, **options):
        self.seeds += (reset_seeds or {}).values()
        super().send(action, reset_seeds)


def what_happened(lines):
    """Metrics by step, without those that tell the time."""
    return [
        {name: value for name, value in line.items() if name.split("/")[0] not in ("time", "perf")} for line in lines
    ]


def test_validation_has_starts_of_its_own_and_changes_nothing_else(train, make_run, capsys):
    plain, validated, first = Seeing(), Seeing(), first_seed(VALIDATION_SEEDS, 0)
    expected = train("ppo", make_run("plain"), plain)
    validation = ValidationConfig(every=2, num_episodes=NUM_ENVS + 2)
    whole = make_run("validated")
    jax.tree.map(np.testing.assert_array_equal, train("ppo", whole, validated, validation=validation), expected)
    of_validation = [seed for seed in validated.seeds if seed >= first]
    assert set(of_validation) == set(range(first, first + NUM_ENVS + 2))
    assert [seed for seed in validated.seeds if seed < first] == plain.seeds
    known = {line["step"]: line for line in whole.writer.lines if "validation/success" in line}
    assert list(known) == [1, 3]  # of the policies that iterations 1 and 3 begin with
    assert capsys.readouterr().out.count(" %)  validated ") == len(known)
    for line in known.values():
        assert 0 <= line["validation/success_end"] <= line["validation/success"] <= 1
    assert known[1]["validation/success"] > 0
    assert sum(whole.writer.column("perf/compilations")[1:]) == 0

    # A validation that is interrupted is done again when the run goes on.
    env = Seeing()
    stopped = make_run("stopped")
    stopped = dataclasses.replace(stopped, should_stop=lambda: env.seeds.count(first) > 1)
    with pytest.raises(Interrupted, match="ppo: stopped and saved after 2 of 4 iterations"):
        train("ppo", stopped, env, validation=validation)
    resumed = make_run("stopped", resume=True)
    jax.tree.map(np.testing.assert_array_equal, train("ppo", resumed, Seeing(), validation=validation), expected)
    assert what_happened(stopped.writer.lines + resumed.writer.lines) == what_happened(whole.writer.lines)


def test_the_best_validated_checkpoint_is_kept_also_when_a_run_goes_on(train, make_run):
    validation = ValidationConfig(every=1, num_episodes=NUM_ENVS, keep_best=True)
    settings, kept = {"validation": validation, "checkpoint_every": 1, "keep_checkpoints": 1}, {}
    whole, env = make_run("whole"), Seeing()
    stopped = dataclasses.replace(make_run("stopped"), should_stop=lambda: env.seeds.count(first_seed(*PLACE)) > 2)
    train("ppo", whole, Seeing(), **settings)
    with pytest.raises(Interrupted):
        train("ppo", stopped, env, **settings)
    train("ppo", make_run("stopped", resume=True), Seeing(), **settings)
    for run in (whole, stopped):
        directory = checkpoint_directory(run, "ppo")
        kept[run.directory.name] = checkpoint.complete_steps(directory), checkpoint.load_counters(directory)
    # A line tells of the policy that its iteration began with; that of the first one is of no checkpoint.
    rates = {line["step"] - 1: line["validation/success"] for line in whole.writer.lines[1:]}
    best = max(rates, key=rates.get)
    steps, counters = kept["whole"]
    assert kept["stopped"] == kept["whole"] and steps == [best, PPO.num_iterations]
    assert counters["best"] == best and counters["best_success"] == rates[best]


def test_the_best_policy_is_kept_of_those_that_are_saved():
    best = Best().after(0, {"validation/success": 0.9}).after(2, {"validation/success": 0.0})
    assert best == Best(2, 0.0) and Best().kept == {}
    for iteration, rate in ((4, 0.5), (6, 0.5), (8, np.nan), (10, 0.4)):
        best = best.after(iteration, {"validation/success": rate})
    assert best.after(11, {}) == Best(4, 0.5)
    for every in (0, 5):
        with pytest.raises(ValueError, match=f"validation.every: got {every}, expected a multiple of checkpoint_every"):
            dataclasses.replace(PPO, validation=ValidationConfig(every=every, keep_best=True), checkpoint_every=2)


@pytest.mark.parametrize(("phase", "stop_after"), [("sft", 3), ("tpo", 4), ("ppo", 2)])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(train, make_run, capsys, phase, stop_after):
    whole = make_run("whole")
    expected = train(phase, whole)
    unit, total = ("iteration", 4) if phase == "ppo" else ("step", 6)
    said = capsys.readouterr().err
    assert said.count("compiling the training step (done once") == 1 and "going on" not in said
    assert said.index("compiling the training step") < said.index(f"{phase}: {total}/{total} {unit}")
    assert sum(whole.writer.column("perf/compilations")[1:]) == 0
    assert {line["phase"] for line in whole.writer.lines} == {phase}

    stopped = make_run("stopped")
    stopped = dataclasses.replace(stopped, should_stop=lambda: len(stopped.writer.lines) >= stop_after - 1)
    if phase == "ppo":  # polled while it collects, too
        stopped = dataclasses.replace(stopped, should_stop=lambda: len(stopped.writer.lines) >= stop_after)
    with pytest.raises(Interrupted, match=f"{phase}: stopped and saved"):
        train(phase, stopped)
    assert checkpoint.complete_steps(checkpoint_directory(stopped, phase))[-1] == stop_after

    resumed = make_run("stopped", resume=True)
    params = train(phase, resumed)
    said = capsys.readouterr().err
    assert f"{phase}: going on at {unit} {stop_after + 1} of {total}\n" in said
    assert f"{phase}: {total}/{total} {unit}" in said
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    lines = stopped.writer.lines + resumed.writer.lines
    assert what_happened(lines) == what_happened(whole.writer.lines)

    # A finished phase has nothing left to do, and a new one does not write over it.
    again = make_run("stopped", resume=True)
    jax.tree.map(np.testing.assert_array_equal, train(phase, again), expected)
    assert again.writer.lines == []
    said = capsys.readouterr().err
    assert "going on" not in said and "compiling the training step" not in said
    with pytest.raises(CheckpointError, match="expected none; resume them or choose another directory"):
        train(phase, make_run("stopped"))


def test_a_phase_goes_on_with_the_model_of_its_checkpoint_only(train, make_run):
    model = json.loads(json.dumps(to_dict(MLPConfig(hidden_dims=(16,), value_dims=(16,), label_width=0.5))))
    train("sft", make_run(model=model), num_steps=2)
    other = make_run(resume=True, model=model | {"label_width": 1.0})
    message = "sft/checkpoints is of another model:\n  model.label_width: got 0.5, expected 1.0"
    with pytest.raises(ConfigError, match=message):
        train("sft", other, num_steps=3)
    with pytest.raises(ConfigError, match="sft/checkpoints: got weights of an MLP, expected those of OpenVLA"):
        train("sft", make_run(resume=True, model=to_dict(openvla_tiny())), num_steps=3)
    assert other.writer.lines == []
    for known in (model, {}):
        train("sft", make_run(resume=True, model=known), num_steps=3)


def test_ppo_that_is_stopped_while_it_collects_collects_again(train, make_run):
    expected = train("ppo", make_run("whole"), num_iterations=2)
    polls = []
    run = make_run("stopped", should_stop=lambda: polls.append(0) or len(polls) == 100)
    with pytest.raises(Interrupted, match="after 1 of 2 iterations"):
        train("ppo", run, num_iterations=2)
    params = train("ppo", make_run("stopped", resume=True), num_iterations=2)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_ppo_that_is_stopped_inside_an_update_finishes_it(train, make_run, monkeypatch):
    expected = train("ppo", make_run("whole"), num_iterations=3)
    calls, jit_step = [], update.jit_step

    def counted(step, state):
        compiled = jit_step(step, state)
        return lambda *inputs: calls.append(0) or compiled(*inputs)

    monkeypatch.setattr(update, "jit_step", counted)
    # The first minibatch of several asks the loop to stop.
    stopped = make_run("stopped", should_stop=lambda: len(calls) > 0)
    with pytest.raises(Interrupted, match="after 1 of 3 iterations"):
        train("ppo", stopped, num_iterations=3)
    assert len(calls) == stopped.writer.column("ppo/num_minibatches")[0] > 1
    params = train("ppo", make_run("stopped", resume=True), num_iterations=3)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_imitation_with_an_average_that_is_made_longer_is_the_longer_one(train, make_run):
    """The state is saved as it is; others take the average."""
    config = {"ema_decay": 0.5, "optimizer": dataclasses.replace(VALUE_FROZEN, schedule="constant")}
    expected = train("sft", make_run("whole"), num_steps=6, **config)
    run = make_run("longer")
    half = train("sft", run, num_steps=3, **config)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(checkpoint_directory(run, "sft"), half), half)
    longer = train("sft", make_run("longer", resume=True), num_steps=6, **config)
    jax.tree.map(np.testing.assert_array_equal, longer, expected)
    without = train("sft", make_run("without"), num_steps=6, **(config | {"ema_decay": None}))
    assert (without["logits"]["kernel"] != expected["logits"]["kernel"]).any()


@pytest.mark.parametrize("phase", ["sft", "tpo", "ppo"])
def test_a_phase_takes_the_memory_of_the_parameters_that_it_starts_from(phase, policy, params, spec, make_run):
    start = fresh(params)
    if phase == "sft":
        batches = demo_batches(*demonstrations(2), size=32)
        train_sft(policy, start, batches, dataclasses.replace(SFT, num_steps=1), make_run())
    elif phase == "tpo":
        pairs = random_pairs(policy, params, 4)
        train_tpo(policy, start, pairs, spec, dataclasses.replace(TPO, num_epochs=1), make_run())
    else:
        train_ppo(policy, start, toy.ToyPush(NUM_ENVS), spec, dataclasses.replace(PPO, num_iterations=1), make_run())
    trained = {name: start[name] for name in start if phase == "ppo" or not name.startswith("value")}
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trained))


def test_a_phase_that_goes_on_frees_the_parameters_it_started_from_before_it_loads_its_own(
    train, policy, params, make_run
):
    train("sft", make_run(), num_steps=1)
    start = fresh(params)
    run = make_run(resume=True)
    state, _ = start_phase("sft", run, policy, start, make_optimizer(VALUE_FROZEN, num_steps=1), VALUE_FROZEN)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start)) and int(state.step) == 1


def test_checkpoints_carry_the_models_configuration_and_refuse_other_statistics(train, make_run):
    run = make_run(model={"kind": "mlp", "label_width": 0.5})
    for phase in ("sft", "tpo", "ppo"):
        train(phase, run, **({"num_iterations": 1} if phase == "ppo" else {}))
        assert checkpoint.load_model(checkpoint_directory(run, phase)) == {"kind": "mlp", "label_width": 0.5}
    wider = toy.norm_stats()._replace(action_q99=3 * toy.norm_stats().action_q99)
    with pytest.raises(CheckpointError, match=r"norm_stats.action_q99: got \[3.0, 3.0\], expected \[1.0, 1.0\]"):
        train("sft", dataclasses.replace(make_run(resume=True), norm_stats=wider), num_steps=8)


def test_a_reference_that_scores_can_be_stopped(policy, params, spec):
    pairs, polls = random_pairs(policy, params, 3), []
    with pytest.raises(Interrupted, match="stopped while the reference scored pairs"):
        score_pairs(policy, params, pairs, spec, batch_size=16, should_stop=lambda: polls.append(0) or len(polls) == 3)
    assert len(polls) == 3


def test_the_step_of_a_loss_that_is_not_finite_leaves_out_minibatches_that_were_refused():
    good = {"ppo/loss": 1.0, "grad/norm": 1.0, "ppo/stopped": 0.0}
    updates = [good, good | {"ppo/stopped": 1.0}, good]
    assert check_finite(updates, phase="ppo", num_steps=10) == 12
    with pytest.raises(FloatingPointError, match="ppo: grad/norm of step 13 is nan"):
        check_finite([*updates, good | {"grad/norm": float("nan")}], phase="ppo", num_steps=10)


def test_phases_share_no_random_numbers():
    keys = {tuple(jax.random.key_data(phase_key(0, name)).tolist()) for name in ("sft", "tpo", "ppo", "pairs", "init")}
    first_keys = {tuple(jax.random.key_data(jax.random.key(n)).tolist()) for n in range(100)}
    assert len(keys) == 5 and not keys & first_keys


def test_ppo_on_batches_of_steps_uses_each_seed_once_and_goes_on_where_it_was_stopped(train, make_run):
    size, env, whole = {"num_steps": 500, "num_iterations": 3}, Seeing(), make_run("whole")
    expected = train("ppo", whole, env, **size)
    assert whole.writer.column("env/steps") == [500, 1000, 1500]
    np.testing.assert_allclose(whole.writer.column("ppo/lr_scale"), [1, 2 / 3, 1 / 3], rtol=1e-6)
    assert sum(whole.writer.column("perf/compilations")[1:]) == 0
    assert len(set(env.seeds)) == len(env.seeds) == max(env.seeds) - min(env.seeds) + 1
    # How many episodes make up a batch varies, and nothing is compiled for it.
    used = np.array(whole.writer.column("env/num_episodes")) + whole.writer.column("env/num_cut")
    assert len(set(used)) > 1 and used.sum() <= len(env.seeds)

    polls, writer = [], Writer()

    def should_stop():
        polls.append(len(writer.lines))
        return polls.count(2) == 10

    run = make_run("stopped", writer=writer, should_stop=should_stop)
    first, second = Seeing(), Seeing()
    with pytest.raises(Interrupted, match="after 2 of 3 iterations"):
        train("ppo", run, first, **size)
    resumed = make_run("stopped", resume=True)
    params = train("ppo", resumed, second, **size)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert what_happened(run.writer.lines + resumed.writer.lines) == what_happened(whole.writer.lines)
    assert second.seeds == env.seeds[-len(second.seeds) :]


def test_ppo_without_a_critic_plays_each_start_as_often_as_a_group_is_large(train, make_run, params):
    env, run = Seeing(), make_run()
    groups = {"advantage": "rloo", "group_size": 4, "num_iterations": 2}
    trained = train("ppo", run, env, **groups)
    starts = np.arange(10).repeat(4) + env.seeds[0]
    assert sorted(env.seeds) == starts.tolist()  # of two iterations
    assert checkpoint.load_counters(checkpoint_directory(run, "ppo"))["seeds"] == 10
    jax.tree.map(np.testing.assert_array_equal, trained["value_head"], params["value_head"])
    assert (trained["trunk_0"]["kernel"] != params["trunk_0"]["kernel"]).any()
    assert sum(run.writer.column("perf/compilations")[1:]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 7}, "group_size: got 7, expected a divisor of num_episodes = 20, or 1 with num_steps"),
        ({"group_size": 4, "num_steps": 99}, "group_size: got 4, expected a divisor of num_episodes = 20, or 1 with"),
        ({"advantage": "grpo"}, r"group_size: got 1, expected at least 2 without a critic \(advantage = 'grpo'\)"),
        (
            {"advantage": "rloo", "group_size": 4, "time_limit": "bootstrap"},
            "time_limit: got 'bootstrap', expected 'te",
        ),
        ({"advantage": "rloo", "group_size": 4, "value_warmup_iterations": 1}, "value_warmup_iterations: got 1, exp"),
    ],
)
def test_groups_that_cannot_be_compared_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PPO, **changes)


def test_a_configuration_without_a_critic_freezes_it_once():
    config = dataclasses.replace(PPO, advantage="grpo", group_size=2)
    assert config.optimizer.freeze == ("^value",) and dataclasses.replace(config, seed=1).optimizer == config.optimizer


def test_what_is_prepared_for_the_rollout_is_freed_before_the_updates(policy, params, spec, make_run, monkeypatch):
    made, alive = [], []

    def noting(policy, params):
        prepared = prepare_params(policy, params)
        made.append(weakref.ref(jax.tree.leaves(prepared)[0]))
        return prepared

    def rescore(params, batch, mesh):  # the first thing after the rollout
        alive.append(made[-1]())
        return batch

    monkeypatch.setattr(acting, "prepare_params", noting)
    monkeypatch.setattr(ppo_batch, "make_rescore", lambda *_: rescore)
    copying = policy._replace(prepare=lambda params: jax.tree.map(lambda x: x + 0, params))
    config = dataclasses.replace(PPO, num_iterations=2, rescore=True)
    train_ppo(copying, fresh(params), toy.ToyPush(NUM_ENVS), spec, config, make_run())
    assert len(made) == 2 and alive == [None, None]


def test_a_run_plays_no_episode_of_another_run(train, make_run, monkeypatch):
    monkeypatch.setattr("stare_jax.envs.seeds.SLOT_SIZE", 30)
    with pytest.raises(ConfigError, match="seed: got episodes 20 to 40 of run seed 0, expected at most 30 of one run"):
        train("ppo", make_run(), num_iterations=2)


def test_ppo_reports_what_a_user_looks_for(train, make_run, capsys):
    run = make_run()
    params = train("ppo", run, num_iterations=2, value_warmup_iterations=1, checkpoint_every=1, keep_checkpoints=2)
    first, second = run.writer.lines
    names = {"env/success", "env/num_episodes", "env/steps", "env/return_shaped", "env/completed_reach"}
    names |= {"ppo/approx_kl", "ppo/clip_frac", "ppo/explained_variance", "ppo/entropy", "grad/norm"}
    names |= {"ppo/advantage_std", "ppo/return_mean", "ppo/value_mean", "shaping/within_reach", "shaping/at_success"}
    names |= {"ppo/kl_last", "ppo/epochs"}
    names |= {"time/env_s", "time/policy_s", "time/update_s", "time/other_s", "perf/env_steps_per_s"}
    assert names <= set(first)
    # While the value head warms up the policy stays where it is: every ratio is 1.
    assert first["ppo/clip_frac"] == 0 and first["ppo/approx_kl"] < 1e-8 < second["ppo/approx_kl"]
    assert first["env/num_episodes"] == 20 and second["env/steps"] > first["env/steps"]
    line = capsys.readouterr().out.splitlines()[0]
    for words in ("ppo 1/2", "success ", "/20", "kl ", "clip ", "ev ", "entropy ", "simulator ", "policy ", "update "):
        assert words in line
    directory = checkpoint_directory(run, "ppo")
    assert checkpoint.load_counters(directory) == {"iteration": 2, "env_steps": second["env/steps"], "seeds": 40}
    saved = [checkpoint.load_params(directory, params, step=step) for step in (1, 2)]
    assert (saved[0]["trunk_0"]["kernel"] != saved[1]["trunk_0"]["kernel"]).any()
    (directory / "2" / "checksums.json").unlink()
    file = directory / "2" / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace('"seeds": 40', '"seeds": -40'))
    with pytest.raises(ConfigError, match="counters.seeds: got -40, expected greater than or equal to 0"):
        train("ppo", dataclasses.replace(run, resume=True), num_iterations=3, value_warmup_iterations=1)


@pytest.mark.parametrize(("phase", "num_steps"), [("sft", 6), ("tpo", 6)])
def test_imitation_and_preference_end_with_where_the_time_went(train, make_run, capsys, phase, num_steps):
    train(phase, make_run())
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{phase}: {num_steps} steps \| update \d+ %  data \d+ %  other \d+ %", line)


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(policy, params, make_run):
    observation, action = demonstrations(2)

    def batches(start_step):
        found = demo_batches(observation, action, size=32)(start_step)
        for step, (seen, acted, valid) in enumerate(found, start_step + 1):
            yield seen, np.where(step < 3, acted, np.float32("nan")), valid

    with pytest.raises(
        FloatingPointError, match=r"sft: sft/loss of step 3 is nan, on host \S+; not finite since: \w+/"
    ):
        train_sft(policy, fresh(params), batches, dataclasses.replace(SFT, log_every=5), make_run())


def test_a_state_that_is_not_finite_is_not_saved_and_named(policy, params, make_run):
    run = make_run()
    params = fresh(params)
    params["trunk_0"]["kernel"] = params["trunk_0"]["kernel"].at[0, 0].set(np.nan)
    with pytest.raises(
        FloatingPointError, match=r"sft: after step 0, on host \S+: got values in trainable/trunk_0/ker"
    ):
        train_sft(policy, params, None, SFT, run)
    start = jax.jit(policy.init)(jax.random.key(0))
    state, _ = start_phase("sft", run, policy, start, make_optimizer(VALUE_FROZEN, num_steps=1), VALUE_FROZEN)
    moments = jax.tree.map(lambda x: x + np.float32("inf") if x.dtype == np.float32 else x, state.opt_state)
    message = r"sft: after step 0, .* in opt_state/.* and \d+ more that are"
    with (
        checkpoint.Checkpoints(checkpoint_directory(run, "sft")) as checkpoints,
        pytest.raises(FloatingPointError, match=message),
    ):
        state = state.replace(opt_state=moments)
        checkpoints.save(1, state, norm_stats=run.norm_stats, model={}, counters={})
    assert checkpoint.complete_steps(checkpoint_directory(run, "sft")) == []


def test_scores_of_a_reference_are_computed_once(policy, params, spec, tmp_path):
    pairs, calls = random_pairs(policy, params, 3), []
    counted = policy._replace(log_prob=lambda *arguments: calls.append(0) or policy.log_prob(*arguments))

    def score(source, pairs=pairs):
        calls.clear()
        scored = score_pairs(counted, params, pairs, spec, batch_size=16, keep=keep_scores(tmp_path, source))
        return scored, len(calls)

    first, num_calls = score("sft/4/aaaa, start")
    again, num_again = score("sft/4/aaaa, start")
    assert num_calls > 0 and num_again == 0
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert score("sft/4/bbbb, start")[1] > 0  # other parameters
    other = jax.tree.map(lambda x: x[::-1], pairs)
    assert score("sft/4/bbbb, start", other)[1] > 0
    assert score("")[1] > 0
    (tmp_path / "tpo/reference/rejected.npz").write_bytes(b"")
    with pytest.raises(
        ArraysError, match="rejected.npz: cannot be read .*, expected scores of a reference policy; delete"
    ):
        score("sft/4/bbbb, start", other)


def test_ppo_without_a_surviving_episode_is_an_error(policy, params, spec, make_run):
    class Dying(toy.ToyPush):
        def send(self, action, reset_seeds=None, **options):
            # A simulator that was lost comes back when it is reset, and is lost again in its first step.
            self.alive = np.isin(np.arange(self.num_envs), list(reset_seeds or ()))
            super().send(action, reset_seeds)

        def receive(self):
            return super().receive()._replace(alive=self.alive)

    with pytest.raises(SimulatorError, match="iteration 1 lost all 20 episodes"):
        train_ppo(policy, fresh(params), Dying(NUM_ENVS), spec, PPO, make_run())


def test_pairs_are_seen_equally_often_in_an_order_that_the_step_knows():
    steps = [pair_indices(step, num_pairs=6, batch_size=4, seed=1) for step in range(6)]
    # 6 steps of 4 are 4 epochs of 6.
    np.testing.assert_array_equal(np.bincount(np.concatenate(steps)), [4] * 6)
    epochs = np.concatenate(steps).reshape(4, 6)
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1
    np.testing.assert_array_equal(pair_indices(3, num_pairs=6, batch_size=4, seed=1), steps[3])


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (SFTConfig, "num_steps", 0),
        (SFTConfig, "microbatch_size", 7),
        (TPOConfig, "beta", 0.0),
        (TPOConfig, "cost_coef", -1.0),
        (TPOConfig, "variant", "dpo"),
        (TPOConfig, "margin", "none"),
        (PPOConfig, "gamma", 1.5),
        (PPOConfig, "clip_eps", 0.0),
        (PPOConfig, "target_kl", -0.1),
        (PPOConfig, "time_limit", "ignore"),
        (PPOConfig, "terminal_potential", "none"),
        (PPOConfig, "microbatch_size", 33),
        (PPOConfig, "num_episodes", 0),
        (PPOConfig, "num_steps", 0),
        (PPOConfig, "ratio", "sum"),
        (PPOConfig, "advantage", "group"),
        (PPOConfig, "rescore", "auto"),
    ],
)
def test_configs_name_the_field_they_refuse(config, field, value):
    with pytest.raises(ValueError, match=f"{field}: got {value!r}, expected"):
        config(**{field: value})
