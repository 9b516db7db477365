"""Prompts: layout, templates, the built-in vocabulary, and a Hugging Face tokenizer built on the spot."""

import numpy as np
import pytest

from stare_jax import stages
from stare_jax.models.tokenizer import (
    OPENVLA_STATE_TEMPLATE,
    OPENVLA_TEMPLATE,
    bin_state,
    encode_prompt,
    format_prompt,
    make_tokenizer,
    word_tokenizer,
)


def test_prompt_is_openvlas():
    prompt = format_prompt(OPENVLA_TEMPLATE, "Put Carrot on Plate ", ())
    assert prompt == "In: What action should the robot take to put carrot on plate?\nOut:"
    assert "State: 3 255;" in format_prompt(OPENVLA_STATE_TEMPLATE, "go", np.array([3, 255]))


def test_layout_is_bos_padding_text_answer():
    words = word_tokenizer()
    text = words.encode("push the cube")
    tokens, mask = encode_prompt(words, "push the cube", length=7)
    np.testing.assert_array_equal(tokens, [words.bos_id, words.pad_id, words.pad_id, *text, words.answer_id])
    np.testing.assert_array_equal(mask, [True, False, False, True, True, True, True])
    with pytest.raises(ValueError, match="prompt_length: got 4, expected at least 5 for 'push the cube'"):
        encode_prompt(words, "push the cube", length=4)


@pytest.mark.parametrize("env_id", stages.TASKS)
def test_every_task_is_told_in_whole_words_that_fit_the_tiny_preset(env_id):
    instruction = stages.get_task(env_id).instruction
    ids = word_tokenizer().encode(instruction)
    assert len(ids) == len(instruction.split())
    assert len(ids) + 2 <= 12


def test_word_tokenizer_keeps_different_texts_apart():
    words = word_tokenizer()
    texts = ["push", "pull", "0", "255", "256", "ab cd", "abcd", "zzz", "über", "?", "12 3", "1 23", "a_b"]
    assert len({tuple(words.encode(text)) for text in texts}) == len(texts)
    assert words.encode("PUSH  the\ncube") == words.encode("push the cube")
    assert max(max(words.encode(text)) for text in texts) < words.vocab_size
    assert len(words.encode("255")) == 1 and len(words.encode("256")) == 4  # a space and three bytes


def test_state_bins_are_256_equal_ones():
    state = np.float32([-1.0, -0.999, -1 + 2 / 256, 0.0, 0.999, 1.0])
    np.testing.assert_array_equal(bin_state(state), [0, 0, 1, 128, 255, 255])


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    """A word-level tokenizer saved in Hugging Face's format, with or without the token that OpenVLA needs."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def make(*extra):
        words = ["<unk>", "<s>", "</s>", "push", "cube", *extra]
        vocabulary = {word: i for i, word in enumerate(words)}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        folder = tmp_path_factory.mktemp("tokenizer")
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(folder)
        return str(folder)

    return make


def test_hugging_face_tokenizer(checkpoint_folder):
    tokenizer = make_tokenizer(checkpoint_folder("▁"))
    tokens, mask = encode_prompt(tokenizer, "push cube", length=6)
    np.testing.assert_array_equal(tokens, [1, 1, 1, 3, 4, 5])
    np.testing.assert_array_equal(mask, [True, False, False, True, True, True])
    # A prompt that already ends in the lone space gets no second one.
    np.testing.assert_array_equal(encode_prompt(tokenizer, "push ▁", length=3)[0], [1, 3, 5])


def test_hugging_face_tokenizer_without_the_lone_space_is_refused(checkpoint_folder):
    with pytest.raises(ValueError, match="got no token '▁', expected a Llama vocabulary"):
        make_tokenizer(checkpoint_folder())
