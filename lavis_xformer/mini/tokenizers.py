"""Tokenizers of the mini world, made from the language of its scenes; no weights, nothing downloaded.

All keep every letter as a piece of its own, so that any English text can be encoded. Missing folders are created.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertTokenizer, GPT2Tokenizer, T5TokenizerFast

BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
OPT_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
T5_SPECIALS = ("<pad>", "</s>", "<unk>")  # each in the order of the original checkpoints


def write_bert(folder: Path, words: Iterable[str]) -> BertTokenizer:
    """Write vocab.txt, the tokenizer's settings and the Q-Former's config.json; other words are spelled out.

    Returns:
        The tokenizer that ``BertTokenizer.from_pretrained(folder)`` returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase + string.digits
    pieces = [*BERT_SPECIALS, *string.punctuation, *letters, *(f"##{letter}" for letter in letters)]
    pieces += sorted({word.lower() for word in words} - set(pieces))
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 128}
    _write_json(folder / "tokenizer_config.json", settings)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.06,  # about as far below 1 / sqrt(width) as BERT's 0.02
    )
    _write_json(folder / "config.json", config.to_dict())
    return BertTokenizer.from_pretrained(folder)


def write_opt(folder: Path, texts: Iterable[str]) -> GPT2Tokenizer:
    r"""Learn byte-pair merges from texts and write them in the format of OPT's checkpoints.

    Returns:
        The tokenizer that ``AutoTokenizer.from_pretrained(folder, use_fast=False)`` returns: it puts ``</s>``
        first, pads with ``<pad>``, and encodes ``"\n"``, with which BLIP-2 ends a text, as one token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _merges(texts, OPT_SPECIALS).save_model(str(folder))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": 512,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    return GPT2Tokenizer.from_pretrained(folder)


def write_t5(folder: Path, texts: Iterable[str]) -> T5TokenizerFast:
    """Learn byte-pair merges from texts and write them as a T5 tokenizer: ``</s>`` last, no text unknown.

    Returns:
        The tokenizer that ``T5TokenizerFast.from_pretrained(folder)`` returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    learner = _merges(texts, T5_SPECIALS, add_prefix_space=True)
    learner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    learner.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    _write_json(folder / "tokenizer_config.json", settings)
    return T5TokenizerFast.from_pretrained(folder)


def _merges(texts: Iterable[str], specials: Sequence[str], **options: bool) -> ByteLevelBPETokenizer:
    """Learn at most 1024 tokens, the special ones first."""
    learner = ByteLevelBPETokenizer(**options)
    learner.train_from_iterator(
        texts, vocab_size=1024, min_frequency=2, special_tokens=list(specials), show_progress=False
    )
    return learner


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
