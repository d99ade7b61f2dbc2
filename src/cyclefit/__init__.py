"""Finetune a captioner and a text-to-image model so that messages survive the round trip between them."""

__version__ = "0.1.0"
