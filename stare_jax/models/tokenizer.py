"""Tokenizers: that of a checkpoint, in Hugging Face's format, and a small one that needs no files."""

import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from stare_jax.config import ConfigError
from stare_jax.documents import refuse_dangling, refuse_pointer
from stare_jax.models.bins import NUM_STATE_BINS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "vocab.json", "merges.txt", "spiece.model")
"""files of a checkpoint's folder that its tokenizer may have."""
NETWORK_TIMEOUT_S = 10.0
"""seconds that a tokenizer's server may take to answer at all, before anything is downloaded from it"""
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
    """text -> ids, without any special token; raises ValueError for a text that has the name of one in it."""
    bos_id: int
    pad_id: int
    answer_id: int
    """the lone space that stands between the prompt and the first action token; 29871 for Llama."""
    vocab_size: int
    """ids of text are below this."""


def check_template(template: str) -> None:
    """Checks that a prompt can be made of a template.

    Raises:
        ValueError: its braces do not match, or it asks for something else than `{instruction}` and `{state}`.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"prompt_template: got {template!r}, expected braces that match: {error}") from error
    if any(name not in (None, "instruction", "state") or form or how for _, name, form, how in parts):
        raise ValueError(f"prompt_template: got {template!r}, expected no fields but {{instruction}} and {{state}}")


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
    """Returns the tokenizer in tokenizer.json and tokenizer_config.json of a checkpoint's folder.

    Args:
        folder: the folder, or the name of a repository on huggingface.co, whose files are downloaded once.

    Raises:
        ConfigError: the folder has no tokenizer, or a damaged one, or the repository cannot be downloaded; the
            vocabulary has no lone space ("▁"), which precedes the actions, or no token that begins a text.
    """
    path = Path(folder)
    if not folder or (path.is_absolute() and not path.is_dir()):
        raise ConfigError(f"model.tokenizer: got {folder!r}, expected a folder of a checkpoint; there is none")
    if path.is_dir() and not (path / "tokenizer.json").exists():
        raise ConfigError(f"model.tokenizer: got {folder!r} without a tokenizer.json, expected a checkpoint's folder")
    tokenizer = _load_files(folder)
    answer_id = tokenizer.convert_tokens_to_ids("▁")
    if answer_id is None or answer_id == tokenizer.unk_token_id:
        raise ConfigError(
            f"model.tokenizer: {folder!r}: got no token '▁', expected a SentencePiece vocabulary such as Llama's or "
            "Gemma's"
        )
    if tokenizer.bos_token_id is None:
        raise ConfigError(f"model.tokenizer: got {folder!r} without a token that begins a text, expected one")
    # Padding is masked out, so a tokenizer without a padding token may as well repeat BOS.
    pad_id = tokenizer.bos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    special = [token for token in tokenizer.all_special_tokens if token]

    def encode(text: str) -> list[int]:
        # Encoded, "</s>" in an instruction would end the prompt there; openpi's tokenizer takes it for five characters.
        if found := next((token for token in special if token in text), None):
            raise ValueError(f"prompt: got {found!r} in {text!r}, expected a text without the tokenizer's own tokens")
        return tokenizer.encode(text, add_special_tokens=False)

    return Tokenizer(encode, tokenizer.bos_token_id, pad_id, answer_id, len(tokenizer))


def _load_files(name: str) -> Any:
    """Returns a tokenizer of transformers, from a folder, from the copy of an earlier download, or from the network."""
    # Not AutoTokenizer, which goes by config.json and asks on the terminal whether to run the code that comes with it.
    from transformers import PreTrainedTokenizerFast

    if Path(name).is_dir():
        refuse_dangling(Path(name))
        for file in TOKENIZER_FILES:
            refuse_pointer(Path(name) / file)
        try:
            return PreTrainedTokenizerFast.from_pretrained(name)
        except Exception as error:  # of whatever kind the damage makes the reader raise, in Rust as in Python
            reason = f"{type(error).__name__}: {_in_short(error)}"
            raise ConfigError(f"model.tokenizer: got {name!r}, whose files are no tokenizer ({reason})") from error
    try:
        if _is_downloaded(name):
            return PreTrainedTokenizerFast.from_pretrained(name, local_files_only=True)
        _require_network(name)
        return PreTrainedTokenizerFast.from_pretrained(name)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # no such name, no such files, or files that are no tokenizer
        raise _not_downloaded(name, error) from error


def _require_network(name: str) -> None:
    """Raises ConfigError where the server of a repository does not answer at all.

    A download by itself would try every file again and again, for minutes.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import get_session

    try:
        get_session().head(hf_hub_url(name, "tokenizer.json"), timeout=NETWORK_TIMEOUT_S)
    except Exception as error:  # of requests or of httpx, whichever the installed version uses; they share no class
        raise _not_downloaded(name, error) from error


def _not_downloaded(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"model.tokenizer: got {name!r}, which is no folder here, and its tokenizer.json cannot be downloaded from "
        f"Hugging Face ({_in_short(error)}); expected the folder of a checkpoint that has one: "
        "--config.model.tokenizer=FOLDER"
    )


def _in_short(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_here(name: str) -> bool:
    """Returns whether a tokenizer can be read without a download; files that are not one count as well."""
    if name == "words" or not name or Path(name).is_absolute() or Path(name).is_dir():
        return bool(name) and (name == "words" or Path(name).is_dir())
    try:
        return _is_downloaded(name)
    except ValueError:  # no name of a repository
        return False


def _is_downloaded(name: str) -> bool:
    """Returns whether an earlier download of a repository has left all that its tokenizer is read from."""
    from huggingface_hub import try_to_load_from_cache

    file, settings = (try_to_load_from_cache(name, file) for file in ("tokenizer.json", "tokenizer_config.json"))
    return isinstance(file, str) and settings is not None  # or an object that says that the repository has none


def make_tokenizer(name: str) -> Tokenizer:
    """Returns the built-in tokenizer for "words", else that of the checkpoint folder `name`."""
    return word_tokenizer() if name == "words" else huggingface_tokenizer(name)
