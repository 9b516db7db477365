"""What the recipes on all eight tasks share: which model, what of it is trained, and the numbers."""

import dataclasses

from stare_jax.models import PI05_EXPERTS, PI05_PALIGEMMA, LoRAConfig, openvla_7b, pi05_base

WORDS = ("pi05", "full", "lora")
"""pi0.5 in place of OpenVLA-7B; all weights are trained; adapters are, which OpenVLA has without the word, while pi0.5
trains its action expert alone."""


def make_model(words, *, camera):
    """Returns the model with what is trained of it: in float32, beside bfloat16."""
    if {"full", "lora"} <= words:
        raise ValueError("variant: got full and lora, expected one of them")
    if "pi05" in words:
        # The numbers of pi_RL on ManiSkill (RLinf): Flow-Noise, 4 steps, 5 of 8 actions.
        model = pi05_base(cameras=(camera,), noise="learned", num_denoising_steps=4, window=8, chunk=5)
        frozen = () if words & {"full", "lora"} else (PI05_PALIGEMMA,)
        lora = LoRAConfig(rank=32, alpha=32.0, targets=PI05_EXPERTS) if "lora" in words else None
        return dataclasses.replace(model, frozen_patterns=frozen, lora=lora)
    model = openvla_7b(camera=camera)
    if "full" in words:
        return dataclasses.replace(model, execution=dataclasses.replace(model.execution, param_dtype="float32"))
    return dataclasses.replace(model, lora=LoRAConfig())


def set_recipe(config):
    """Sets the numbers of appendix B and C.2; where the paper is silent RL4VLA's, or openpi's and RLinf's for pi0.5."""
    config.demos.num_demos = 100
    config.pairs.num_pairs = 50
    config.tpo.num_epochs = 5
    config.tpo.batch_size = 8
    config.tpo.microbatch_size = 16
    config.tpo.optimizer.learning_rate = 2e-5
    config.ppo.num_iterations = 400
    config.evaluation.num_episodes = 300
    config.mesh.fsdp = 8
    config.mesh.data = -1
    (set_flow if "noise" in config.model else set_tokens)(config)
    return config


def set_tokens(config):
    """OpenVLA."""
    config.sft.num_steps = 30_000
    config.sft.batch_size = 64
    config.sft.optimizer.learning_rate = 1e-5
    config.ppo.num_episodes = 128
    config.ppo.minibatch_size = 160
    config.ppo.microbatch_size = 8
    config.ppo.optimizer.learning_rate = 1e-4
    config.ppo.optimizer.value_learning_rate = 3e-3


def set_flow(config):
    """pi0.5."""
    for section in ("sft", "tpo", "ppo"):
        config[section].optimizer.b2 = 0.95
    config.sft.num_steps = 5000
    config.sft.batch_size = 256
    config.sft.microbatch_size = 64
    config.sft.ema_decay = 0.999
    config.sft.optimizer.learning_rate = 2.5e-5
    config.sft.optimizer.warmup_steps = 1000
    config.sft.optimizer.schedule = "cosine"  # down to zero; openpi ends at a tenth
    config.sft.optimizer.weight_decay = 1e-10
    config.ppo.num_episodes = 320
    config.ppo.num_epochs = 5
    # One minibatch of all decisions there can be, as 320 episodes of 80 actions are in RLinf.
    config.ppo.minibatch_size = config.ppo.num_episodes * -(-config.env.horizon // config.model.chunk)
    config.ppo.microbatch_size = 64
    config.ppo.entropy_coef = 0.005
    config.ppo.kl_coef = 0.0  # measured
    config.ppo.value_clip_eps = 0.2
    config.ppo.huber_delta = 10.0
    config.ppo.optimizer.learning_rate = 7.91e-6
    config.ppo.optimizer.value_learning_rate = 1.55e-4
    config.ppo.optimizer.max_grad_norm = 1.0
