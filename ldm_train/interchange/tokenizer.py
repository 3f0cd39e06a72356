"""CLIP's tokenizer as the files of a `tokenizer/` folder, out of the vocabulary that comes with open_clip.

A byte-pair encoding (Sennrich et al. 2016) over bytes that are written as printable characters: 256 characters, the
same at the end of a word, one token for each of 48,894 merges in order, and two marks, 49,408 in all. open_clip's and
transformers' numbers of tokens are the same; the marks have other spellings. Padding by token 0 makes a mark of "!" for
transformers, as in the published folders of Stable Diffusion 2, so that one inside a caption is read as padding there.
"""

import json
from typing import Any, Literal

from open_clip.tokenizer import SimpleTokenizer

_START, _END = "<|startoftext|>", "<|endoftext|>"
_ZERO = "!"  # the token of number 0


def tokenizer_files(padding: Literal["end", "zero"], context_length: int) -> dict[str, str]:
    """The folder's files, name -> content.

    Args:
        padding: what captions are filled up with: the end mark (Stable Diffusion 1) or token 0 (2).
        context_length: tokens of a caption, marks included.
    """
    ours = SimpleTokenizer(context_length=context_length)
    marks = {ours.sot_token_id: _START, ours.eot_token_id: _END}
    vocabulary = {marks.get(number, token): number for token, number in ours.encoder.items()}
    merges = sorted(ours.bpe_ranks, key=ours.bpe_ranks.__getitem__)
    special = {
        "bos_token": _START,
        "eos_token": _END,
        "pad_token": _END if padding == "end" else _ZERO,
        "unk_token": _END,
    }
    config = special | {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": context_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    return {
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n",
        "special_tokens_map.json": _json(special),
        "tokenizer_config.json": _json(config),
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
    }


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
