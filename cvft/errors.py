"""Errors a user can cause, each saying what is wrong, which value it is and what to do.

Entry points turn a `CvftError` into one line and exit code 2. Anything else is a fault of ours and keeps its traceback.
"""


class CvftError(Exception):
    """Root of every error that a user can cause and mend."""


class ConfigError(CvftError):
    """A configuration key or value that cannot be used; the message starts with its dotted name."""


class DataError(CvftError):
    """Raw input (a folder, a table, an image) that is missing, unreadable or of another kind than told."""


class ShardError(CvftError):
    """A shard or a manifest that is missing, damaged or does not belong to the other."""


class CheckpointError(CvftError):
    """A checkpoint that is missing, damaged or made for another model or another preprocessing."""


class TrainingError(CvftError):
    """A training step or a descriptor that cannot be used, such as a loss that is not finite."""


class StoreError(CvftError):
    """A storage location that cannot be reached, read or written."""


class StoreUnavailableError(StoreError):
    """A store that may answer again by itself: it refuses connections, is overloaded or broken for the moment."""


class ClusterError(CvftError):
    """A Ray cluster that cannot be reached, or that cannot hold what is asked of it."""


class MissingExtraError(CvftError):
    """A feature whose optional package is not installed; the message names the extra to install."""
