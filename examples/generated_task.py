"""A task that needs no download: short generated reviews, good or bad? And a small BERT to learn it.

"wrong : dull , not warm , kind but not grim": each word has a sign and "not" flips it; what stands after "but" counts
three times, and "wrong :" in front flips the whole. Each of these rules works on what the one before it gives, so
depth matters.
"""

from __future__ import annotations

import random

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

GOOD = ("good", "bright", "warm", "kind")
BAD = ("bad", "dull", "cold", "grim")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, "not", "but", "wrong", ":", ",")


def make_rows(count, seed):
    """Return a column of ``count`` texts, as a list of columns, and their labels, half of them good."""
    draw = random.Random(seed)
    texts, labels = [], []
    while len(texts) < count:
        text, score = review(draw)
        if score and (score > 0) == len(texts) % 2:
            texts.append(text)
            labels.append(int(score > 0))
    return [texts], labels


def review(draw):
    text, score = clause(draw)
    if draw.random() < 0.5:
        after, value = clause(draw)
        text, score = f"{text} but {after}", score + 3 * value
    return (f"wrong : {text}", -score) if draw.random() < 0.15 else (text, score)


def clause(draw):
    phrases, score = [], 0
    for _ in range(draw.randint(1, 2)):
        value = draw.choice((-1, 1))
        phrase = draw.choice(GOOD if value > 0 else BAD)
        if draw.random() < 0.25:
            phrase, value = f"not {phrase}", -value
        phrases.append(phrase)
        score += value
    return " , ".join(phrases), score


def make_tokenizer():
    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def make_bert(vocabulary_size, layers=6):
    """A BERT of 6 layers x 128 with random weights."""
    config = BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
    )
    return BertForSequenceClassification(config)
