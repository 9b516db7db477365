"""The model of a run and that of the folder it starts from."""

import jax.numpy as jnp
import pytest

from stare_jax.config import ConfigError, to_dict
from stare_jax.models import openvla_7b, openvla_tiny
from stare_jax.models.normalize import identity_stats
from stare_jax.state.checkpoint import save_params
from stare_jax.weights.load import check_source


def save(folder, model):
    save_params(folder / "checkpoints", 0, {"a": jnp.zeros(1)}, model=model, norm_stats=identity_stats(7, 0))
    return folder


def test_a_checkpoint_without_its_configuration_is_compared_by_shapes_and_that_is_said(tmp_path, capsys):
    check_source(save(tmp_path / "old", {}), openvla_7b(), name="runs/old/sft")
    assert "runs/old/sft: its configuration is not in it" in "".join(capsys.readouterr())


def test_a_checkpoint_of_another_model_is_named_as_it_is_asked_for(tmp_path):
    source = save(tmp_path / "sft", to_dict(openvla_tiny()))
    check_source(source, openvla_tiny())
    for names, first in (({}, str(source)), ({"name": "config.init_from: x"}, "config.init_from: x")):
        with pytest.raises(ConfigError) as error:
            check_source(source, openvla_tiny(camera="hand_camera"), **names)
        assert str(error.value).splitlines()[0] == f"{first} is of another model:"
