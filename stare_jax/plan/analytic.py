"""Operations that a program needs, counted from the sizes of its model, where somebody has counted them."""

from stare_jax.models import OpenVLAConfig, Pi05Config
from stare_jax.plan.openvla_cost import generation_phases, update_flops
from stare_jax.plan.pi05_cost import imitation_flops, sampling_phases
from stare_jax.runs.config import RunConfig


def needed_flops(config: RunConfig, program: str, num_rows: int) -> float | None:
    """Returns the operations of a program on all devices together, without what rematerialisation computes twice.

    Args:
        config: of a run.
        program: "sample" or a phase.
        num_rows: decisions, or rows of a batch.

    Returns:
        None where there is no count: adapters and preference learning of pi0.5, its PPO, imitation of OpenVLA, models
        without a tower of the published form.
    """
    model = config.model
    if isinstance(model, OpenVLAConfig) and model.dino is not None and not model.stem:
        rank = 0 if model.lora is None else model.lora.rank
        if program == "sample":
            return sum(phase.flops for phase in generation_phases(model, num_rows, model.prompt_length, rank=rank))
        if program == "ppo" and model.lora is not None:
            return update_flops(model, num_rows, model.prompt_length, rank)
    if isinstance(model, Pi05Config) and model.cameras and not model.stem and model.lora is None:
        if program == "sample":
            return sum(phase.flops for phase in sampling_phases(model, num_rows, model.num_denoising_steps, 2))
        if program == "sft":
            return imitation_flops(model, num_rows, is_prefix_trained=not model.frozen_patterns)
    return None
