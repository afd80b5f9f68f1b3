"""Benchmarks: what the product must do, measured as ratios side by side in one run.

One module a benchmark, each with `NAME`, `TITLE` and `run(options)`. `python -m benchmarks --help`.
"""
