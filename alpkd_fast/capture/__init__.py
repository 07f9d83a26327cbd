"""Hidden states from a model's own forward: what the loss needs, and no more."""

from .hidden_states import HiddenStates

__all__ = ["HiddenStates"]
