"""Fused intermediate-layer distillation losses (ALP-KD and its relatives) for PyTorch."""

from .api import ALPOutput, alp_loss
from .backends import backends
from .layer_maps import make_layer_map
from .module import ALPLoss

__version__ = "0.1.0"

__all__ = ["ALPLoss", "ALPOutput", "alp_loss", "backends", "make_layer_map"]
