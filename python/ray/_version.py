"""The version: Ray's API level, with the engine's own version as a local label."""

__all__ = ["__version__"]

__version__ = "2.60.0+skate.0.1.0"
