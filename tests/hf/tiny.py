"""Tiny random models, a tokenizer and sentences made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

GOOD, BAD = ["good", "fine", "great", "nice"], ["bad", "poor", "awful", "sad"]
OTHERS = ["film", "book", "plot", "cast", "the", "a", "very", "and", "is", "was", "not", "it"]
WORDS = [*GOOD, *BAD, *OTHERS]


def make_tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {token: i for i, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
    )


def bert_config(layers: int = 4, width: int = 32, **changes: Any) -> BertConfig:
    values = {
        "vocab_size": 5 + len(WORDS),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**{**values, **changes})


def bert(layers: int = 4, width: int = 32, seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(bert_config(layers, width, **changes))


def masked_lm(layers: int = 4, width: int = 32, seed: int = 0, **changes: Any) -> BertForMaskedLM:
    torch.manual_seed(seed)
    return BertForMaskedLM(bert_config(layers, width, **changes))


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences of 2 to 14 words whose label is the mood of their one telling word."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        label = draw.randrange(2)
        words = draw.choices(OTHERS, k=draw.randint(1, 13))
        words.insert(draw.randint(0, len(words)), draw.choice(GOOD if label else BAD))
        rows.append({"sentence": " ".join(words), "label": label, "idx": index})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
