"""WMTP: weighted multi-token prediction for causal language models."""

__version__ = "0.1.0"
