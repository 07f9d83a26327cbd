"""A backend under test. Not in conftest.py: several folders have one, and only one of those can be imported."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

import alpkd_fast


@dataclass(frozen=True)
class Backend:
    """A backend under test; called like alp_loss."""

    name: str

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter, or the emulation of CUDA: on CPU tensors, and very slow."""
        switch = {"triton": "TRITON_INTERPRET", "cuda": "ALPKD_EMULATE_CUDA"}.get(self.name, "")
        return os.environ.get(switch) == "1"

    @property
    def device(self) -> str:
        return "cuda" if self.name in ("triton", "cuda") and not self.interpreted else "cpu"

    @property
    def fused(self) -> bool:
        return self.name != "reference"

    def unit(self, *dtypes: torch.dtype) -> float:
        """Unit roundoff of products and sums for inputs of these dtypes."""
        if torch.float64 in dtypes:
            return 2.0**-53
        on_matrix_units = self.name in ("triton", "cuda") and any(d.itemsize == 2 for d in dtypes)
        return 2.0**-17 if on_matrix_units else 2.0**-24  # operands split in two parts of 8 bits and a sign

    def __call__(self, *args, **options):
        try:
            return alpkd_fast.alp_loss(*args, **options, backend=self.name)
        except RuntimeError as error:
            if self.name in ("triton", "cuda") and str(error).startswith(f"backend='{self.name}' cannot run"):
                pytest.skip(str(error))
            raise

    def details(self, *args, **options) -> alpkd_fast.ALPOutput:
        return self(*args, **options, return_details=True)
