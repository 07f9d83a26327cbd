"""Triton kernels of alpkd_fast, installed as alpkd_fast.kernels."""
