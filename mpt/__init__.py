"""mpt trains transformers in the right precision, says why, proves it, and keeps the run alive."""

__version__ = "0.1.0"
