"""A tokenizer in the files of Llama's, with its ids but few words: what an OpenVLA checkpoint folder holds."""

import json

SPACE = "▁"
SPACE_ID, PAD_ID, NEWLINE_ID, NUM_PIECES = 29871, 32000, 13, 32000
_SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>"}
_WORDS = ("In", ":", "What", "action", "should", "the", "robot", "take", "to", "put", "carrot", "on", "plate", "Out")
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?:"


def write_llama_tokenizer(folder):
    """Writes tokenizer.json (byte-pair encoding with bytes to fall back on) and tokenizer_config.json as published.

    The 32000 pieces are three special ones, 256 bytes, words and the parts that they are merged from, and, at its own
    place, the lone space; numbered fillers in between never match a text.
    """
    merges, pieces = [], []
    for word in _WORDS:
        merged = SPACE
        for letter in word:
            merges.append([merged, letter])
            merged += letter
            pieces.append(merged)
    merges.append(["O", "u"])
    merges.append(["Ou", "t"])
    pieces += ["Ou", "Out"]
    merges, pieces = list(dict.fromkeys(map(tuple, merges))), list(dict.fromkeys(pieces))
    vocabulary = {piece: i for i, piece in _SPECIAL.items()}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {piece: 259 + i for i, piece in enumerate(pieces)}
    vocabulary[SPACE] = SPACE_ID
    vocabulary |= {letter: SPACE_ID + 1 + i for i, letter in enumerate(_LETTERS)}
    taken = set(vocabulary.values())
    vocabulary |= {f"<filler {i}>": i for i in range(NUM_PIECES) if i not in taken}
    added = [{"id": i, "content": text} for i, text in (*_SPECIAL.items(), (PAD_ID, "<PAD>"))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token | flags for token in added],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
            "merges": [" ".join(pair) for pair in merges],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    description = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(token["id"]): {"content": token["content"]} | flags for token in added},
        "auto_map": {"AutoProcessor": "processing_prismatic.PrismaticProcessor"},
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": "<PAD>",
        "padding_side": "right",
        "processor_class": "PrismaticProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(description))
    config = {"model_type": "openvla", "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    return vocabulary
