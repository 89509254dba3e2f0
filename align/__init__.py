"""align: a staged pipeline from demonstrations to an aligned language model and a verdict on it."""

__version__ = "0.1.0"
