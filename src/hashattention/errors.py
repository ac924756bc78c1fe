"""Typed errors. Every message says what was given, what is allowed and what to do next."""

from __future__ import annotations


class HashAttentionError(Exception):
    """Root of every error this library raises on purpose."""


class ConfigError(HashAttentionError, ValueError):
    """A configuration key or value is not allowed."""


class InputError(HashAttentionError, ValueError):
    """A tensor handed to an op has the wrong shape, dtype or device."""


class BackendError(HashAttentionError, RuntimeError):
    """The named kernel backend cannot run this call."""


class ArtifactError(HashAttentionError):
    """A maps folder is missing, damaged, of another version, or not this model's."""


class ModelNotFoundError(HashAttentionError, LookupError):
    """No model answers to the given name."""


class DownloadError(HashAttentionError, OSError):
    """A model could not be fetched whole: no network, or a checksum that does not match."""


class UnsupportedModelError(HashAttentionError, TypeError):
    """The model's attention or cache cannot be served by selected tokens."""


class TextError(HashAttentionError, ValueError):
    """The training or evaluation text is missing or too short."""


class CheckpointError(HashAttentionError):
    """A training folder cannot be resumed."""


class MissingDependencyError(HashAttentionError, ImportError):
    """An optional package is not installed."""
