"""Tiny transformers models with random weights, one per architecture, and a batch for them."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")

LAYERS, WIDTH, BATCH, TOKENS = 3, 16, 4, 7
_BERT = {
    "vocab_size": 50,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
_TOKEN_IDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "cls_token_id": 2, "sep_token_id": 2}
_DEBERTA = {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
CONFIGS = {
    "bert": ("bert", _BERT),
    "roberta": ("roberta", _BERT),
    "mpnet": ("mpnet", _BERT),
    "distilbert": ("distilbert", {"vocab_size": 50, "dim": WIDTH, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 24}),
    "electra": ("electra", _BERT | {"embedding_size": 8}),
    "deberta": ("deberta", _DEBERTA),
    "deberta-v2": ("deberta-v2", _DEBERTA | {"norm_rel_ebd": "layer_norm", "share_att_key": True}),
    "deberta-v2-conv": ("deberta-v2", _DEBERTA | {"conv_kernel_size": 3, "conv_act": "gelu"}),
    "modernbert": ("modernbert", _BERT | _TOKEN_IDS),
    "gpt2": (
        "gpt2",
        {"vocab_size": 50, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 32} | _TOKEN_IDS,
    ),
    "llama": ("llama", _BERT | _TOKEN_IDS | {"num_key_value_heads": 1}),
}
FINAL_NORM = ("modernbert", "gpt2", "llama")  # transformers' last hidden state comes after a norm


def make_model(name, head="", dropout=False, seed=0, **changes):
    """A model of the architecture: the base model, or with ``head`` such as "ForSequenceClassification"."""
    kind, options = CONFIGS[name]
    config = transformers.AutoConfig.for_model(kind, **{**options, **changes})
    config._attn_implementation = "eager"
    if not dropout:
        for key in vars(config):
            if "dropout" in key or key.endswith("_pdrop"):
                setattr(config, key, 0.0)
    auto = getattr(transformers, f"AutoModel{head}")
    torch.manual_seed(seed)
    return auto.from_config(config).train()


def make_batch(seed=0, left_padding=False):
    """input_ids and attention_mask of sequences of 7, 5, 3 and 1 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([TOKENS, 5, 3, 1])
    position = torch.arange(TOKENS)
    mask = position >= TOKENS - lengths[:, None] if left_padding else position < lengths[:, None]
    ids = torch.randint(3, 50, (BATCH, TOKENS), generator=generator)
    return {"input_ids": torch.where(mask, ids, 1), "attention_mask": mask.long()}
