"""What a phase starts from: that the run's model is the checkpoint's."""

import dataclasses
import json

import pytest

from stare_jax.config import ConfigError
from stare_jax.models import openvla_7b, openvla_state
from stare_jax.weights.load import check_model

DESCRIPTION = {
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "image_sizes": [224, 224],
    "pad_to_multiple_of": 64,
    "text_config": {"vocab_size": 32064},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DESCRIPTION))
    return tmp_path


def test_the_published_model_is_the_preset(folder):
    check_model(folder, openvla_7b())
    rounded = {
        "tvf_normalize_params": [
            {"mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]},
            {"mean": [0.5] * 3, "std": [0.5] * 3},
        ]
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(rounded))
    check_model(folder, openvla_7b())


def test_what_no_shape_tells_is_compared_and_all_of_it_named(folder):
    model = openvla_7b()
    model = dataclasses.replace(
        model,
        llm=dataclasses.replace(model.llm, norm_eps=1e-5),
        dino=dataclasses.replace(model.dino, mean=(0.5, 0.5, 0.5)),
    )
    with pytest.raises(ConfigError) as error:
        check_model(folder, model)
    message = str(error.value)
    assert "model.llm: got LlamaConfig" in message and "norm_eps=1e-05" in message and "norm_eps=1e-06" in message
    assert "model.dino: got ViTConfig" in message and "model.siglip" not in message
    with pytest.raises(ConfigError, match="model.siglip: got None"):
        check_model(folder, openvla_state())
