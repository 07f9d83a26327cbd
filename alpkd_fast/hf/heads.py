"""What a model's head predicts, and which models the losses can read."""

from __future__ import annotations

import inspect
from typing import Any, get_args

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils.generic import ModelOutput

from ..capture.blocks import unwrap
from .config import DistillationConfig

# Heads with one output per token beside those of language models, which have output embeddings.
_OF_TOKENS = ("ForTokenClassification", "ForPreTraining", "ForQuestionAnswering")

_BY_HAND = "For others write the loop of docs/usage.md with HiddenStates(model, layers) of alpkd_fast.capture"


def model_class(model: Any) -> type[nn.Module]:
    """The class of the model itself, inside the wrappers of PEFT, torch.compile and the distributed ones."""
    return type(unwrap_peft_model(unwrap(model)[0]))  # type: ignore[no-untyped-call]


def predicts_tokens(model: Any) -> bool:
    """Whether the model gives one output per token, and not one per sequence."""
    return model.get_output_embeddings() is not None or model_class(model).__name__.endswith(_OF_TOKENS)


def default_pooling(model: Any) -> str:
    """The rows of the loss on hidden states: those that the head reads."""
    if predicts_tokens(model):
        return "token"
    config = model.config
    decodes = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    decodes = decodes and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES  # as BERT is in both
    if decodes or getattr(config, "is_decoder", False):
        return "last"  # its first token sees itself alone
    return "cls"


def check_model(name: str, model: Any, options: DistillationConfig) -> None:
    """Refuse a model that the losses cannot read. ``name``: the trainer's argument that it came as."""
    kind = model_class(model).__name__
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(
            f"{name}: {kind} reads {model.main_input_name}; allowed are models that read input_ids. {_BY_HAND}"
        )
    if options.uses_logits and not _gives_logits(model):
        raise ValueError(
            f"{name}: {kind} gives no logits of classes, which CE and KD compare; set ce_weight=0 and kd_weight=0 for "
            'the loss on hidden states alone, which all methods but "kd" have, or take a model with a head for '
            "classification or language modelling"
        )
    if options.uses_hidden_states and model.config.is_encoder_decoder:
        raise ValueError(
            f"{name}: {kind} has hidden states of an encoder and of a decoder, and the loss compares one list of them; "
            f'use method="kd". {_BY_HAND}'
        )
    if options.uses_hidden_states and kind.endswith("ForMultipleChoice"):
        raise ValueError(
            f"{name}: {kind} reads (rows, choices, tokens), and the loss on hidden states takes (rows, tokens); use "
            f'method="kd". {_BY_HAND}'
        )


def check_shared(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse parameters to be trained that freezing the teacher would freeze."""
    theirs = {id(p) for p in teacher.parameters()}
    shared = [name for name, p in student.named_parameters() if p.requires_grad and id(p) in theirs]
    if shared:
        raise ValueError(
            f"model: {shared[0]} and {len(shared) - 1} more of its parameters are the teacher's own, which is frozen; "
            "give the student its own with copy.deepcopy(student), or freeze them first with requires_grad_(False)"
        )


def _gives_logits(model: Any) -> bool:
    """What its forward says that it returns; a model that does not say is taken to have logits of classes."""
    # ELECTRA's discriminator has one number per token; Llama's head for answers does not say what it returns.
    if model_class(model).__name__.endswith(("ForPreTraining", "ForQuestionAnswering")):
        return False
    returns = inspect.signature(model_class(model).forward).return_annotation
    outputs = [c for c in get_args(returns) or (returns,) if isinstance(c, type) and issubclass(c, ModelOutput)]
    return not outputs or any("logits" in inspect.signature(c).parameters for c in outputs)
