"""Tokenizer of a GGUF file as tokenizer.json, tokenizer_config.json and chat_template.jinja.

GGUF has the vocabulary, and names the rule by which llama.cpp splits text before merging (`tokenizer.ggml.pre`). The
JSON is not written by the package `tokenizers`: whichever release is installed, the same file gives the same bytes.
"""

import json
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

from rudder.server.models.gguf_file import GGUFFile, ModelFileError

TOKENS, MERGES, SCORES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.scores"
TYPES, PRE, TEMPLATE = "tokenizer.ggml.token_type", "tokenizer.ggml.pre", "tokenizer.chat_template"
# Name in the files of Transformers, and key of the metadata.
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}
# Ends of a turn and of a message, which end an answer as EOS does.
ENDS = ("eot_token_id", "eom_token_id")

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splitting_by(regex: str) -> list[dict[str, Any]]:
    """Return pre-tokenizers that split text where a regular expression matches, and spell it in bytes."""
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return [split, {**BYTE_LEVEL, "use_regex": False}]


# Pre-tokenizers by `tokenizer.ggml.pre` (llama.cpp: src/llama-vocab.cpp). ByteLevel's own expression is that of GPT-2.
PRE_TOKENIZERS = {
    "gpt-2": [BYTE_LEVEL],
    **{name: [DIGITS, BYTE_LEVEL] for name in ("smollm", "starcoder", "refact")},
    **{name: splitting_by(LLAMA3) for name in ("llama-bpe", "llama3", "llama-v3")},
    "tekken": splitting_by(TEKKEN),
}
# Their text begins with BOS, and a text that is a token is not merged from parts.
WHOLE_TOKENS = ("llama-bpe", "llama3", "llama-v3", "tekken")


class TokenType(IntEnum):
    """Types of tokens (llama.cpp: `llama_token_type`)."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def files_of(file: GGUFFile, config: dict[str, Any]) -> dict[str, str]:
    """Return the texts of the tokenizer's files by name. ModelFileError: a tokenizer that cannot be converted."""
    builders = {"gpt2": byte_level, "llama": sentencepiece}
    kind = file.value("tokenizer.ggml.model", str)
    if kind not in builders:
        raise ModelFileError(f"{file.name}: tokenizer.ggml.model: {kind} cannot be converted")
    tokens = tokens_of(file)
    if len(tokens) > config["vocab_size"]:
        raise ModelFileError(f"{file.name}: {TOKENS}: {len(tokens)} for {config['vocab_size']} embeddings")
    special = {f"{name}_token": tokens[number] for name, number in ids_of(file).items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    files = {
        "tokenizer.json": json.dumps(builders[kind](file, tokens), ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }
    if TEMPLATE in file.metadata:
        files["chat_template.jinja"] = file.value(TEMPLATE, str)
    return files


def tokens_of(file: GGUFFile) -> list[str]:
    """Return the vocabulary. ModelFileError: not an array of different texts."""
    tokens = file.values(TOKENS, str)
    if not tokens or len(set(tokens)) < len(tokens):
        raise ModelFileError(f"{file.name}: {TOKENS}: is empty, or has a token twice")
    return tokens


def ids_of(file: GGUFFile) -> dict[str, int]:
    """Return the ids of `bos`, `eos`, `pad` and `unk`, as far as the file names them."""
    keys = {name: f"tokenizer.ggml.{key}" for name, key in SPECIAL.items()}
    return {name: token_id(file, key) for name, key in keys.items() if key in file.metadata}


def token_id(file: GGUFFile, key: str) -> int:
    """Return the id at a key of the metadata. ModelFileError: the vocabulary has no such token."""
    number = file.value(key, int)
    if not 0 <= number < len(file.values(TOKENS, str)):
        raise ModelFileError(f"{file.name}: {key} is {number}, beyond the vocabulary")
    return number


def special_ids(file: GGUFFile) -> dict[str, int | None]:
    """Return `bos_token_id`, `eos_token_id` and `pad_token_id` of config.json."""
    ids = ids_of(file)
    return {f"{name}_token_id": ids.get(name) for name in ("bos", "eos", "pad")}


def end_ids(file: GGUFFile) -> int | list[int] | None:
    """Return the ids at which an answer ends: `eos_token_id` of generation_config.json."""
    keys = [f"tokenizer.ggml.{name}" for name in (SPECIAL["eos"], *ENDS)]
    ids = list(dict.fromkeys(token_id(file, key) for key in keys if key in file.metadata))
    return ids if len(ids) > 1 else next(iter(ids), None)


def byte_level(file: GGUFFile, tokens: list[str]) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE, as GPT-2 and Llama 3 have."""
    rule = file.value(PRE, str)
    if rule not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ModelFileError(f"{file.name}: {PRE}: the rule {rule} cannot be converted; {known} can")
    vocabulary = set(tokens)
    merges = [split_merge(file, merge, vocabulary) for merge in file.values(MERGES, str)]
    model = bpe(tokens, merges, ignore_merges=rule in WHOLE_TOKENS)
    template = template_of(file, tokens, bos=rule in WHOLE_TOKENS)
    post = [BYTE_LEVEL, template] if template else [BYTE_LEVEL]
    return {
        **frame(file, tokens),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[rule]},
        "post_processor": {"type": "Sequence", "processors": post},
        "decoder": BYTE_LEVEL,
        "model": model,
    }


def split_merge(file: GGUFFile, merge: str, vocabulary: set[str]) -> list[str]:
    """Split a merge at its space. ModelFileError: it does not merge two tokens to a third."""
    left, _, right = merge.partition(" ")
    if not {left, right, left + right} <= vocabulary:
        raise ModelFileError(f"{file.name}: {MERGES}: {merge!r} does not merge two tokens to a third")
    return [left, right]


def sentencepiece(file: GGUFFile, tokens: list[str]) -> dict[str, Any]:
    """Return the tokenizer.json of a SentencePiece BPE with bytes as its fallback, as Llama 2 and Mistral have."""
    unknown = token_id(file, "tokenizer.ggml.unknown_token_id")
    prefix = [{"type": "Prepend", "prepend": "▁"}] if file.value("tokenizer.ggml.add_space_prefix", bool, True) else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders = [{**spaces, "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    merges = merges_by_score(file, tokens)
    return {
        **frame(file, tokens),
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "post_processor": template_of(file, tokens, bos=True),
        "decoder": {"type": "Sequence", "decoders": [*decoders, *strip]},
        "model": bpe(tokens, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True),
    }


def merges_by_score(file: GGUFFile, tokens: list[str]) -> list[list[str]]:
    """Return the merges that give the tokens, those of the highest score first, as SentencePiece applies them."""
    scores, types = file.values(SCORES, float), types_of(file, tokens)
    if len(scores) != len(tokens):
        raise ModelFileError(f"{file.name}: {SCORES}: {len(scores)} for {len(tokens)} tokens")
    ids = {token: number for number, token in enumerate(tokens) if types[number] == TokenType.NORMAL}
    ranked = sorted(
        (-scores[number], ids[token[:cut]], ids[token[cut:]])
        for token, number in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    )
    return [[tokens[left], tokens[right]] for _, left, right in ranked]


def types_of(file: GGUFFile, tokens: list[str]) -> list[int]:
    """Return the type of each token. ModelFileError: not one for each."""
    types = file.values(TYPES, int)
    if len(types) != len(tokens):
        raise ModelFileError(f"{file.name}: {TYPES}: {len(types)} for {len(tokens)} tokens")
    return types


def bpe(tokens: Iterable[str], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    """Return the `model` of a tokenizer.json."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    defaults = {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    affixes = {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {"type": "BPE", **defaults, **affixes, **settings, "vocab": vocabulary, "merges": merges}


def frame(file: GGUFFile, tokens: list[str]) -> dict[str, Any]:
    """Return the parts of a tokenizer.json that every tokenizer has, with the tokens that are matched whole."""
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": tokens[number], **settings, "special": kind in special}
        for number, kind in enumerate(types_of(file, tokens))
        if kind in special or kind == TokenType.USER_DEFINED
    ]
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", "added_tokens": added, **dict.fromkeys(parts)}


def template_of(file: GGUFFile, tokens: list[str], bos: bool) -> dict[str, Any] | None:
    """Return the post-processor that adds BOS and EOS, None if the file adds neither; `bos`: if it does not say."""
    ids = ids_of(file)
    adds = {"bos": file.value("tokenizer.ggml.add_bos_token", bool, bos)}
    adds["eos"] = file.value("tokenizer.ggml.add_eos_token", bool, False)
    names = {end: tokens[ids[end]] for end, added in adds.items() if added and end in ids}
    if not names:
        return None

    def sequence(name: str, kind: int) -> list[dict[str, Any]]:
        pieces = [("SpecialToken", names.get("bos")), ("Sequence", name), ("SpecialToken", names.get("eos"))]
        return [{piece: {"id": value, "type_id": kind}} for piece, value in pieces if value is not None]

    special = {token: {"id": token, "ids": [ids[end]], "tokens": [token]} for end, token in names.items()}
    pair = sequence("A", 0) + sequence("B", 1)
    return {"type": "TemplateProcessing", "single": sequence("A", 0), "pair": pair, "special_tokens": special}
