"""student_from_teacher: a smaller model of the teacher's own class, started from some of its layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..capture.blocks import block_lists
from ..layer_maps import make_layer_map

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CHOICES = ("skip", "first", "last")
_BY_HAND = (
    "build the student by hand: type(teacher)(CONFIG) with a smaller CONFIG, and its load_state_dict for what it shares"
)


def student_from_teacher(
    teacher: PreTrainedModel,
    num_layers: int,
    layers: str | Sequence[int] = "skip",
    *,
    hidden_size: int | None = None,
    **config_changes: Any,
) -> PreTrainedModel:
    """Make a student with ``num_layers`` of the teacher's layers, its embeddings and its head.

    Args:
        teacher: a transformers model whose blocks lie in one ``nn.ModuleList``: BERT, RoBERTa, MPNet,
            DistilBERT, ELECTRA, DeBERTa, ModernBERT, GPT-2, Llama and models built like them, with any head.
        num_layers: number of the student's layers, 1 to the teacher's.
        layers: which of the teacher's layers to copy: "skip" (the last of each of ``num_layers`` equal runs, as
            PKD-skip picks), "first", "last", or ``num_layers`` indices counted from 0.
        hidden_size: a smaller width. Nothing is copied then: all weights are fresh. Heads keep their size, the
            feed-forward layer keeps its ratio.
        **config_changes: further values of the student's configuration, such as ``intermediate_size``; with them,
            too, all weights are fresh.

    Returns:
        A model of the teacher's class, on the teacher's device and in its dtype, in training mode.

    Raises:
        ValueError: a number of layers, a choice or a width that is not allowed; an encoder-decoder, or another model
            whose blocks cannot be told.

    A ModernBERT layer that becomes the first one loses its ``attn_norm``, as that architecture has none there.
    """
    config = teacher.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"teacher: {type(teacher).__name__} is an encoder-decoder, of which num_layers would shorten one side; "
            f"{_BY_HAND}"
        )
    blocks = _blocks_of(teacher)
    picks = _picks(layers, num_layers, config.num_hidden_layers)
    student_config = copy.deepcopy(config)
    student_config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:  # which layers attend globally
        student_config.layer_types = [config.layer_types[j] for j in picks]
    fresh = hidden_size not in (None, config.hidden_size) or bool(config_changes)
    if hidden_size not in (None, config.hidden_size):
        _narrow(student_config, hidden_size)
    for name, value in config_changes.items():
        if not hasattr(config, name):
            raise ValueError(f"config_changes: {type(config).__name__} has no value {name!r}")
        setattr(student_config, name, value)
    student: Any = type(teacher)(student_config)
    depth = len(student.get_submodule(blocks))
    if depth != num_layers:  # BartForCausalLM's num_hidden_layers is that of an encoder it does not have
        raise ValueError(
            f"teacher: config.num_hidden_layers = {num_layers} gives a {type(teacher).__name__} of {depth} layers; "
            f"{_BY_HAND}"
        )
    if not fresh:
        _copy_layers(teacher, student, blocks, picks)
    placed: PreTrainedModel = student.to(device=teacher.device, dtype=teacher.dtype).train()
    return placed


def _picks(layers: str | Sequence[int], m: int, n: int) -> list[int]:
    if not 1 <= m <= n:
        raise ValueError(f"num_layers: got {m}; allowed are 1 to the teacher's {n}")
    if isinstance(layers, str):
        if layers not in CHOICES:
            raise ValueError(f"layers: got {layers!r}; allowed are {', '.join(CHOICES)} or a list of teacher layers")
        if layers == "first":
            return list(range(m))
        return [row[0] for row in make_layer_map(layers, m, n)]
    picks = list(layers)
    if len(picks) != m or not all(0 <= j < n for j in picks):
        raise ValueError(f"layers: got {picks}; {m} student layers need {m} teacher layers from 0 to {n - 1}")
    return picks


def _narrow(config: PretrainedConfig, width: int) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not 0 < width < config.hidden_size or width % head:
        raise ValueError(
            f"hidden_size: got {width}; allowed are multiples of the head size {head} below the teacher's "
            f"{config.hidden_size}"
        )
    ratio = width / config.hidden_size
    heads = width // head
    if getattr(config, "num_key_value_heads", None) is not None:  # grouped-query attention keeps its groups' size
        groups = config.num_attention_heads // config.num_key_value_heads
        config.num_key_value_heads = max(1, heads // groups)
        if heads % config.num_key_value_heads:
            raise ValueError(f"hidden_size: {heads} heads do not divide into the teacher's groups of {groups}")
    # BERT and most others; GPT-2 (None: four times the width); DistilBERT; DeBERTa's pooler.
    for name in ("intermediate_size", "n_inner", "hidden_dim", "pooler_hidden_size"):
        value = getattr(config, name, None)
        if value is not None:
            setattr(config, name, int(value * ratio))
    config.num_attention_heads = heads
    config.hidden_size = width


def _blocks_of(teacher: PreTrainedModel) -> str:
    """Return the name of the ``nn.ModuleList`` of the teacher's blocks."""
    lists = block_lists(teacher)
    if len(lists) != 1:
        found = ", ".join(repr(name) for name, _ in lists) or "none"
        raise ValueError(
            f"teacher: cannot tell the blocks of {type(teacher).__name__}: its config.num_hidden_layers is "
            f"{teacher.config.num_hidden_layers}, module lists of that length: {found}; {_BY_HAND}"
        )
    return lists[0][0]


def _copy_layers(teacher: PreTrainedModel, student: PreTrainedModel, blocks: str, picks: list[int]) -> None:
    prefix = f"{blocks}."
    own = student.state_dict()
    state: dict[str, Tensor] = {}
    for key, tensor in teacher.state_dict().items():
        if not key.startswith(prefix):
            state[key] = tensor
            continue
        index, _, rest = key.removeprefix(prefix).partition(".")
        for i, j in enumerate(picks):
            if j == int(index):
                state[f"{prefix}{i}.{rest}"] = tensor
    # strict=False and the filter: ModernBERT's first layer has no attn_norm, the others do.
    student.load_state_dict({key: tensor for key, tensor in state.items() if key in own}, strict=False)
