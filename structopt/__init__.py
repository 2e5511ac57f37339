"""Model structure optimisation: each idea of the book as a small, tested room."""

__version__ = "0.1.0"
