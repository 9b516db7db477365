"""One random change of a file: of a value anywhere in its JSON, of a line, or of its bytes."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

ODD = (None, True, -1, 0, 0.5, 10**30, float("nan"), float("inf"), "", "x", [], [[]], {}, {"a": None}, [None] * 3)
"""values that stand in place of every value"""
NOTHING = type("Nothing", (), {"__repr__": lambda self: "nothing"})()
"""stands for a value that is not there"""
_ODD_TEXTS = (
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"NaN",
    b"-",
    b"e999",
    b"[" * 100_000,
    b"1" * 5_000,
    b'"',
    b",",
    b"\n",
    b"\\",
)


def change_file(name: str, content: bytes, rng: Random) -> bytes | None:
    """Returns the content of a file with one change; None for a file that is gone."""
    if rng.random() < 0.03:
        return None
    if name.endswith(".json") and rng.random() < 0.8:
        return json.dumps(change_document(json.loads(content), rng)).encode()
    if name.endswith((".jsonl", ".py")) and rng.random() < 0.8:
        return change_line(content, rng)
    if name.endswith(".safetensors") and rng.random() < 0.6:
        return change_header(content, rng)
    return change_bytes(content, rng)


def change_document(document: Any, rng: Random) -> Any:
    """Returns a document with one change, at any depth."""
    document = json.loads(json.dumps(document))
    node, key = _choose(document, rng)
    if node is None:
        return rng.choice(ODD)
    value = node[key]
    kind = rng.choice(("odd", "odd", "other", "opposite", "delete", "add", "rename", "type", "larger"))
    if kind == "odd":
        node[key] = rng.choice(ODD)
    elif kind == "other":
        node[key] = rng.choice(list(_leaves(document)))
    elif kind == "delete":
        del node[key]
    elif kind == "add" and isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), json.loads(json.dumps(value)))
    elif kind == "add":
        node["unknown"] = 1
    elif kind == "rename" and isinstance(node, dict):
        node[key[:-1] + "_"] = node.pop(key)
    elif kind == "type":
        node[key] = str(value) if isinstance(value, (int, float)) else [value]
    else:
        node[key] = _opposite(value) if kind == "opposite" else _larger(value)
    return document


def _choose(node: Any, rng: Random) -> tuple[Any, Any]:
    """Returns a random container of a document and a key in it, (None, None) where there is none."""
    found = (None, None)
    while isinstance(node, (dict, list)) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        found, node = (node, key), node[key]
        if rng.random() < 0.15:
            break
    return found


def _leaves(node: Any) -> Iterator[Any]:
    if isinstance(node, (dict, list)) and node:
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _leaves(inner)
    else:
        yield node


def _opposite(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return -value if isinstance(value, (int, float)) else 0


def _larger(value: Any) -> Any:
    if isinstance(value, str):
        return value + "x"
    return 10 * value + 1 if isinstance(value, (int, float)) else [value, value]


def change_line(content: bytes, rng: Random) -> bytes:
    """Returns a text with one line changed, left out, doubled or in another place."""
    lines = content.split(b"\n")
    i, kind = rng.randrange(len(lines)), rng.choice(("change", "change", "change", "delete", "double", "swap"))
    if kind == "delete":
        del lines[i]
    elif kind == "double":
        lines.insert(i, lines[i])
    elif kind == "swap":
        other = rng.randrange(len(lines))
        lines[i], lines[other] = lines[other], lines[i]
    elif lines[i].startswith(b"{"):
        lines[i] = json.dumps(change_document(json.loads(lines[i]), rng)).encode()
    else:
        lines[i] = change_bytes(lines[i], rng)
    return b"\n".join(lines)


def change_header(content: bytes, rng: Random) -> bytes:
    """Returns a file of safetensors with one change of its header."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(change_document(json.loads(content[8:end]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + content[end:]


def change_bytes(content: bytes, rng: Random) -> bytes:
    """Returns bytes with one change: a bit, a byte, a part that is cut off, left out, doubled or zero, or one more."""
    first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    last = min(last, first + 64)
    kind = rng.choice(("bit", "bit", "bit", "cut", "drop", "double", "zero", "empty", "odd", "odd", "end"))
    if kind == "bit" and content:
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    changed = {
        "cut": content[:first],
        "drop": content[:first] + content[last:],
        "double": content[:last] + content[first:],
        "zero": content[:first] + bytes(last - first) + content[last:],
        "odd": content[:first] + rng.choice(_ODD_TEXTS) + content[first:],
        "end": content + rng.choice(_ODD_TEXTS),
    }
    return changed.get(kind, b"")


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields path, old and new value of all that differs between two documents; `NOTHING` where one has no value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            inner = f"{path}.{name}" if path else name
            yield from differences(old.get(name, NOTHING), new.get(name, NOTHING), inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{path}[{i}]")
    elif type(old) is not type(new) or old != new:
        yield path, old, new


def parse(content: bytes) -> Any:
    """Returns a JSON document; raises ValueError where it is none, or names a field twice."""

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name twice")
        return dict(pairs)

    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("too deep") from error
