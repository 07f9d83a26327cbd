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
# Architectures whose hidden states are compared once: (kind, options), and the head where the base model has two sides.
_COMMON = _BERT | _TOKEN_IDS
_GROUPED = _COMMON | {"num_key_value_heads": 1, "head_dim": 8}
_SEQ2SEQ = _TOKEN_IDS | {
    "vocab_size": 50, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip
_MOE = {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts_per_tok": 1}
_XMOD = _COMMON | {"languages": ["en_XX"], "default_language": "en_XX"}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 8,
}  # fmt: skip
_LOCAL = {
    "attention_head_size": 8, "feed_forward_size": 24, "attn_layers": ["local"] * LAYERS, "axial_pos_embds": False,
    "local_attn_chunk_length": TOKENS,
}  # fmt: skip
OTHERS = {
    **{
        name: (name, _COMMON, "")
        for name in (
            "bert-generation", "big_bird", "biogpt", "bloom", "camembert", "convbert", "ctrl",
            "data2vec-text", "ernie", "esm", "falcon", "fnet", "gpt_bigcode", "gpt_neox", "ibert", "layoutlm",
            "megatron-bert", "mobilebert", "mpt", "nomic_bert", "openai-gpt", "opt", "persimmon", "phi", "phi3",
            "rembert", "roberta-prelayernorm", "roformer", "xglm", "xlm-roberta", "xlm-roberta-xl",
        )
    },
    **{
        name: (name, _GROUPED, "")
        for name in (
            "cohere", "cohere2", "ernie4_5", "eurobert", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
            "granite", "helium", "lfm2", "ministral", "mistral", "mixtral", "nanochat", "nemotron", "olmo", "olmo2",
            "olmo3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
        )
    },
    **{
        name: (name, _SEQ2SEQ, "ForCausalLM")
        for name in ("bart", "bigbird_pegasus", "blenderbot", "marian", "mbart", "pegasus", "plbart", "whisper")
    },
    "codegen": ("codegen", _COMMON | {"rotary_dim": 4}, ""),
    "deepseek_v3": ("deepseek_v3", _COMMON | _LATENT, ""),
    "gpt_neo": ("gpt_neo", _COMMON | {"num_hidden_layers": 4, "attention_types": [[["global", "local"], 2]]}, ""),
    "gptj": ("gptj", _COMMON | {"rotary_dim": 4}, ""),
    "luke": ("luke", _COMMON | {"entity_vocab_size": 9}, ""),
    "qwen2_moe": ("qwen2_moe", _GROUPED | _MOE, ""),
    "qwen3_5": ("qwen3_5_text", _GROUPED | _LINEAR, ""),
    "qwen3_moe": ("qwen3_moe", _GROUPED | _MOE, ""),
    "qwen3_next": ("qwen3_next", _GROUPED | _LINEAR | _MOE, ""),
    "reformer": ("reformer", _COMMON | _LOCAL, ""),
    "xmod": ("xmod", _XMOD, ""),
    "xmod-prenorm": ("xmod", _XMOD | {"pre_norm": True}, ""),
}  # fmt: skip
FINAL_NORM = ("modernbert", "gpt2", "llama")  # transformers' last hidden state comes after a norm


def make_model(name, head="", dropout=False, seed=0, **changes):
    """A model of the architecture: the base model, or with ``head`` such as "ForSequenceClassification"."""
    kind, options = (CONFIGS | OTHERS)[name][:2]
    config = transformers.AutoConfig.for_model(kind, **{**options, **changes})
    config._attn_implementation = "eager"
    if not dropout:
        for key in vars(config):
            if ("dropout" in key or key.endswith("_pdrop")) and not isinstance(getattr(config, key), bool):
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
