"""Tokenizers: that of a checkpoint, in Hugging Face's format, and a small one that needs no files."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stare_jax.models.bins import NUM_STATE_BINS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "vocab.json", "merges.txt", "spiece.model")
"""files of a checkpoint's folder that its tokenizer may have."""
_WORDS = """
a an and apart arm at away back banana basket behind below beside block blue bottom bowl box brown can carrot center
cloth close corner cube cup down drawer drop edge eggplant end first forward front from goal grasp gray green grip
gripper hold in inside into it its lay left lift line lower mark middle move next object off on onto open orange out
over peg pick place plate press pull purple push put raise reach red region release right robot roll rotate second set
side slide small spoon stack stand state sticky stop table take target task tcp the then to top touch toward towel
tower turn under until up upright vertical white with yellow
"""


class Tokenizer(NamedTuple):
    """The parts of a tokenizer that prompts are built with."""

    encode: Callable[[str], list[int]]
    """text -> ids, without any special token."""
    bos_id: int
    pad_id: int
    answer_id: int
    """the lone space that stands between the prompt and the first action token; 29871 for Llama."""
    vocab_size: int
    """ids of text are below this."""


def word_tokenizer() -> Tokenizer:
    """Returns a tokenizer of lower-case words, the integers below 256, and bytes for all other text.

    A word outside the vocabulary becomes a space and its UTF-8 bytes, so different words never share their ids.
    """
    specials = 4  # padding, BOS, EOS, answer
    first_number = specials + 256
    vocabulary = {str(n): first_number + n for n in range(NUM_STATE_BINS)}
    for word in _WORDS.split():
        vocabulary[word] = specials + 256 + len(vocabulary)

    def encode(text: str) -> list[int]:
        ids = []
        for word in re.findall(r"[^\W_]+|[^\w\s]|_", text.lower()):
            known = vocabulary.get(word)
            ids.extend([known] if known is not None else [specials + byte for byte in f" {word}".encode()])
        return ids

    return Tokenizer(encode, bos_id=1, pad_id=0, answer_id=3, vocab_size=first_number + len(vocabulary))


def huggingface_tokenizer(folder: str) -> Tokenizer:
    """Returns the tokenizer in a checkpoint folder's tokenizer.json and tokenizer_config.json.

    Raises:
        ValueError: the folder has no tokenizer, or its vocabulary has no lone space ("▁"), which precedes the actions.
    """
    # Not AutoTokenizer, which goes by config.json and asks on the terminal whether to run the code that comes with it.
    from transformers import PreTrainedTokenizerFast

    if Path(folder).is_dir() and not (Path(folder) / "tokenizer.json").exists():
        raise ValueError(f"tokenizer: got {folder!r} without a tokenizer.json, expected a checkpoint's folder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    answer_id = tokenizer.convert_tokens_to_ids("▁")
    if answer_id is None or answer_id == tokenizer.unk_token_id:
        raise ValueError(
            f"tokenizer {folder!r}: got no token '▁', expected a SentencePiece vocabulary such as Llama's or Gemma's"
        )
    # Padding is masked out, so a tokenizer without a padding token may as well repeat BOS.
    pad_id = tokenizer.bos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    return Tokenizer(encode, tokenizer.bos_token_id, pad_id, answer_id, len(tokenizer))


def make_tokenizer(name: str) -> Tokenizer:
    """Returns the built-in tokenizer for "words", else that of the checkpoint folder `name`."""
    return word_tokenizer() if name == "words" else huggingface_tokenizer(name)
