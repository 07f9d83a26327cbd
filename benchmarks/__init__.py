"""Benchmarks of alpkd_fast: ``pytest benchmarks/`` measures, ``python -m benchmarks.report`` draws."""
