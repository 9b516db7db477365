"""Lengths of prompts: the shortest of a few that holds all that a policy will read, with the same numbers as longer."""

import dataclasses

import pytest

from stare_jax.envs import EnvConfig
from stare_jax.models import MLPConfig, openvla_state, openvla_tiny, pi05_tiny
from stare_jax.models.blank import blank_policy
from stare_jax.models.openvla import prompt
from stare_jax.models.prompts import PROMPT_LENGTHS, count_tokens, with_short_prompts
from stare_jax.models.tokenizer import Tokenizer, is_here
from stare_jax.runs.fit import check_policy

PUSH = "push the blue cube to the target"  # 7 words, and BOS; OpenVLA's last token is the lone space
LONG = f"{PUSH} and then lift the peg upright and hold it"


@pytest.mark.parametrize(
    ("model", "instructions", "num_tokens", "length"),
    [
        (openvla_tiny(prompt_length=200), [PUSH], 9, 16),
        (openvla_tiny(prompt_length=200), [PUSH, LONG], 18, 32),  # the longest counts
        (pi05_tiny(prompt_length=200), [LONG], 17, 32),
        (pi05_tiny(state_dim=9, prompt_length=200), [PUSH], 8 + 9 * 3, 48),  # below the data: " -" and "1"
        (openvla_tiny(state_dim=9, prompt_length=200), [PUSH], 9 + 9, 32),  # OpenVLA's states are clipped
        (openvla_tiny(prompt_length=20), [LONG], 18, 20),  # never longer than it was
        (openvla_tiny(), [PUSH], 9, 12),
        (openvla_state(prompt_template="", prompt_length=3), [PUSH], 2, 3),
        (openvla_tiny(prompt_length=300), ["x" * 220], 223, 300),
        (openvla_tiny(prompt_length=200), [], 0, 200),  # nothing is known of what it will read
    ],
)
def test_the_shortest_length_that_holds_all_instructions(model, instructions, num_tokens, length):
    assert count_tokens(blank_policy(model), instructions) == num_tokens
    assert with_short_prompts(model, instructions) == dataclasses.replace(model, prompt_length=length)
    assert length in (*PROMPT_LENGTHS, model.prompt_length)


def test_a_policy_without_text_and_one_that_does_not_fit():
    assert with_short_prompts(MLPConfig(), [PUSH]) == MLPConfig()
    with pytest.raises(ValueError, match=f"prompt_length: got 12, expected at least 18 for '{LONG}'"):
        with_short_prompts(openvla_tiny(), [LONG])


def test_numbers_of_three_digits_are_counted_where_each_digit_is_a_token(monkeypatch):
    """As in the vocabularies of Gemma and Llama: "-1" is two tokens, "255" three."""
    digits = Tokenizer(lambda text: [9 for part in text for _ in part], 1, 0, 3, 10)
    monkeypatch.setattr(prompt, "make_tokenizer", lambda name: digits)
    model = openvla_tiny(state_dim=3, prompt_template="{instruction}{state}", prompt_length=200)
    # BOS, two of text, three numbers, the spaces between them, the answer.
    assert count_tokens(blank_policy(model), ["go"]) == 1 + 2 + 3 * 3 + 2 + 1
    env, enough = EnvConfig(use_state="tcp"), 1 + len(PUSH) + 3 * 3 + 2 + 1
    check_policy(blank_policy(dataclasses.replace(model, prompt_length=enough)), env, name="the policy")
    with pytest.raises(ValueError, match=f"prompt_length: got {enough - 1}, expected at least {enough}"):
        check_policy(blank_policy(dataclasses.replace(model, prompt_length=enough - 1)), env, name="the policy")


def test_a_tokenizer_is_here_without_a_download(tmp_path):
    assert is_here("words") and is_here(str(tmp_path))
    assert (
        not is_here("nobody/nothing")
        and not is_here("")
        and not is_here(str(tmp_path / "absent"))
        and not is_here("a/b/c")
    )


@pytest.mark.parametrize(
    ("cached", "expected"),
    [({"tokenizer.json": "x", "tokenizer_config.json": "y"}, True), ({"tokenizer.json": "x"}, False), ({}, False)],
)
def test_a_download_that_broke_off_is_not_here(monkeypatch, cached, expected):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: cached.get(file))
    assert is_here("somebody/something") == expected
