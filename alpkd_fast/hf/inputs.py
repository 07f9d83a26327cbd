"""What a batch holds: the tokens that count, and what each model reads."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import find_labels

from .heads import model_class
from .teacher_parts import Inputs


def attention_mask(inputs: Inputs) -> Tensor:
    """(B, S), of ones where the batch has none."""
    mask: Tensor | None = inputs.get("attention_mask")
    if mask is None and "input_ids" not in inputs:
        raise ValueError(
            f"attention_mask: the batch has neither it nor input_ids, but {', '.join(inputs)}; rows of inputs_embeds "
            "need an attention_mask, 1 for each token that counts"
        )
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


def count_rows(mask: Tensor, pooling: str) -> Tensor:
    """The 0-dim number of rows that count after pooling a mask (B, S), as :func:`alpkd_fast.alp_loss` counts them."""
    if pooling == "token":
        return mask.sum()
    if pooling == "cls":
        return mask[:, 0].sum()
    return mask.any(-1).sum()


def input_names(model: nn.Module) -> list[str]:
    """What the model itself takes, without labels, as the losses are computed here.

    Forwards of PEFT and torch.compile pass on more than they name, and an instance's may be wrapped for autocast.
    """
    base = model_class(model)
    labels = find_labels(base)  # type: ignore[no-untyped-call]
    return [name for name in inspect.signature(base.forward).parameters if name not in labels]


def accepted(inputs: Inputs, names: list[str]) -> Inputs:
    """The inputs that a model takes."""
    own = {name: value for name, value in inputs.items() if name in names}
    if "return_dict" in names or "kwargs" in names:  # outputs are read by name, whatever the model's config says
        own["return_dict"] = True
    return own


def check_decoder_inputs(model: Any, inputs: Inputs) -> None:
    """An encoder-decoder's tokens are counted by its labels, and those are kept from the models, which would make
    the decoder's inputs of them."""
    if not (model.config.is_encoder_decoder and model.get_output_embeddings() is not None):
        return
    missing = [] if "labels" in inputs else ["labels"]
    if not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs):
        missing.append("decoder_input_ids")
    if missing:
        raise ValueError(
            f"{missing[0]}: got none for {type(model).__name__}; its batches must hold labels, -100 where no "
            "token counts, and decoder_input_ids; data_collator=DataCollatorForSeq2Seq(tokenizer, model=student) "
            "makes both of rows that have labels"
        )
