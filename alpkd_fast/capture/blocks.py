"""Which modules of a model hold its hidden states."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

# What transformers' backbones call the norm after the last block; it belongs to their last hidden state.
_FINAL_NORMS = ("norm", "ln_f", "final_norm", "final_layer_norm", "final_layernorm", "norm_f", "ln_final")
# Names that are the last norm's in models of text alone: ViT's last hidden state comes before its ``layernorm``, and
# Wav2Vec2's ``layer_norm`` stands in front of the blocks.
_FINAL_NORMS_OF_TEXT = ("layer_norm", "layernorm", "ln", "emb_layer_norm_after")
# Models that give the last norm a name that others give to a norm of the embeddings; or none: Reformer's last norm is
# that of two streams.
_FINAL_NORMS_OF_TYPE = {
    "bigbird_pegasus": ("layernorm_embedding",),
    "lfm2": ("embedding_norm",),
    "lfm2_moe": ("embedding_norm",),
    "lfm3": ("embedding_norm",),
    "reformer": (),
    "roberta-prelayernorm": ("LayerNorm",),
    "xlm-roberta-xl": ("LayerNorm",),
    "xmod": ("LayerNorm",),
}

# Wrappers by name, so that none of them has to be imported: where they keep the model.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
}


def unwrap(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the model inside DistributedDataParallel, FSDP 1 and torch.compile wrappers, and its name in there."""
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "model: DataParallel runs copies of the model in threads, their hidden states would overwrite each other; "
            "use DistributedDataParallel"
        )
    prefix = ""
    while (attribute := _WRAPPERS.get(type(model).__name__)) is not None:
        model, prefix = model.get_submodule(attribute), f"{prefix}{attribute}."
    return model, prefix


def find_blocks(
    model: nn.Module, layers: Sequence[int | str] | None, final_norm: bool, prefix: str = ""
) -> tuple[dict[str, nn.Module], str | None]:
    """Return the modules whose outputs are the hidden states, by name, in the order of ``layers``; and the name of the
    final norm, where it was found in place of the last block.

    Names may be those of the model or, with the ``prefix`` in front, those of its wrapper.
    """
    if layers is not None and len(layers) == 0:
        raise ValueError("layers: got none; pass block indices, module names, or None for every block")
    if layers is not None and all(isinstance(layer, str) for layer in layers):
        names = [str(name).removeprefix(prefix) for name in layers]
        return {name: _named(model, name) for name in names}, None
    blocks, norm = _blocks(model, final_norm)
    if layers is None:
        return dict(blocks), norm
    if not all(isinstance(layer, int) for layer in layers):
        raise TypeError(f"layers: got {layers!r}; pass either block indices or module names")
    chosen = {}
    for layer in layers:
        if not -len(blocks) <= int(layer) < len(blocks):
            raise ValueError(f"layers: got index {layer}, the model has {len(blocks)} blocks")
        name, module = blocks[int(layer)]
        if name in chosen:
            raise ValueError(f"layers: index {layer} names block {name!r} a second time; name each block once")
        chosen[name] = module
    return chosen, norm


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        near = [known for known, _ in model.named_modules() if known.endswith("." + name)]
        hint = f"; did you mean {near[0]!r}?" if near else "; model.named_modules() lists them"
        raise ValueError(f"layers: {type(model).__name__} has no module named {name!r}{hint}") from None


def block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The outermost ModuleLists whose length is ``config.num_hidden_layers``, by name; the blocks where it is one."""
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inside_another:
            lists.append((name, module))
    return lists


def _blocks(model: nn.Module, final_norm: bool) -> tuple[list[tuple[str, nn.Module]], str | None]:
    """The transformer's blocks, and its final norm."""
    lists = block_lists(model)
    if len(lists) != 1:
        depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
        found = ", ".join(repr(name) for name, _ in lists) or "none"
        raise ValueError(
            f"layers: cannot tell the blocks of {type(model).__name__}: its config.num_hidden_layers is {depth}, "
            f"module lists of that length: {found}; pass layers=[module names], for example "
            "layers=['encoder.layer.0', 'encoder.layer.1']"
        )
    ((path, module_list),) = lists
    blocks = [(f"{path}.{i}", block) for i, block in enumerate(module_list)]
    owner = path.rpartition(".")[0]
    convolution = getattr(model.get_submodule(owner), "conv", None)
    if isinstance(convolution, nn.Module):  # DeBERTa-v2 XL: its convolution completes the first block
        blocks[0] = (f"{owner}.conv".removeprefix("."), convolution)
    norm = _final_norm(model, owner) if final_norm else None
    if norm is not None:
        blocks[-1] = (norm, model.get_submodule(norm))
    return blocks, norm


def _final_norm(model: nn.Module, owner: str) -> str | None:
    """The name of the norm that completes the last hidden state; ``owner`` is the module that holds the blocks."""
    names: tuple[str, ...] = _FINAL_NORMS
    if getattr(model, "main_input_name", None) == "input_ids":
        names += _FINAL_NORMS_OF_TEXT
    holders = [owner]
    model_type = getattr(model.config, "model_type", "")
    if model_type in _FINAL_NORMS_OF_TYPE:
        names = _FINAL_NORMS_OF_TYPE[model_type]
        holders.append(owner.rpartition(".")[0])  # where RoBERTa-PreLayerNorm has it
    for holder in holders:
        for name in names:
            if isinstance(getattr(model.get_submodule(holder), name, None), nn.Module):
                return f"{holder}.{name}".removeprefix(".")
    return None
