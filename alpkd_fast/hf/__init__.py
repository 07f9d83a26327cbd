"""Distillation with Hugging Face transformers (extra ``[hf]``)."""
