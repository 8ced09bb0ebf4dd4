"""Hugging Face checkpoints <-> ours, streaming and checked."""

from convert.conversion import convert

__all__ = ["convert"]
