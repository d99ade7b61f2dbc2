"""Finetune a captioner and a text-to-image model so that messages survive the round trip between them."""


class UserError(ValueError):
    """A user's mistake; its message names the thing and the way out, and is all there is to show."""


__version__ = "0.1.0"
