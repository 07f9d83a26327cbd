"""What a model's head predicts."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.trainer_utils import unwrap_peft_model

from ..capture.blocks import unwrap

# Heads with one output per token beside those of language models, which have output embeddings.
_OF_TOKENS = ("ForTokenClassification", "ForPreTraining", "ForQuestionAnswering")


def model_class(model: Any) -> type[nn.Module]:
    """The class of the model itself, inside the wrappers of PEFT, torch.compile and the distributed ones."""
    return type(unwrap_peft_model(unwrap(model)[0]))  # type: ignore[no-untyped-call]


def predicts_tokens(model: Any) -> bool:
    """Whether the model gives one output per token, and not one per sequence."""
    return model.get_output_embeddings() is not None or model_class(model).__name__.endswith(_OF_TOKENS)
