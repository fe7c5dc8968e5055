"""Every error actcache raises on purpose.

ActcacheError          what is on disk, in the model or in the data is not as it must be
  ManifestError        the manifest or a metadata file is missing, malformed, incomplete or of another format version
  CacheMismatch        the cache (or run) is fine but is not the one that was asked for
  CorruptShard         bytes on disk do not match the checksum in the manifest
  CacheLocked          another process holds the cache
  DiskTooSmall         the disk has less room than what is to be written
  DatasetError         the dataset is missing, empty, malformed or too short
  ModelError           the language model cannot be loaded or lacks the hook that was asked for
  NonFiniteActivations the model produced NaN or infinity, or the stored dtype overflowed
  TrainingDiverged     a loss or a weight of an SAE became NaN or infinite
ConfigError            (a ValueError) the arguments or the YAML are wrong, whatever is on disk
"""


class ActcacheError(Exception):
    """Base of every error about what was found outside the program.

    A message says who complains, the rule, what was got, and the way out.
    """


class ManifestError(ActcacheError):
    """The manifest or a metadata file is missing, malformed, incomplete or of another format version."""


class CacheMismatch(ActcacheError):
    """The cache (or run) is fine but is not the one that was asked for."""


class CorruptShard(ActcacheError):
    """Bytes on disk do not match the checksum in the manifest."""


class CacheLocked(ActcacheError):
    """Another process holds the cache."""


class DiskTooSmall(ActcacheError):
    """The disk has less room than what is to be written."""


class DatasetError(ActcacheError):
    """The dataset is missing, empty, malformed or too short."""


class ModelError(ActcacheError):
    """The language model cannot be loaded, or lacks the hook that was asked for."""


class NonFiniteActivations(ActcacheError):
    """The model produced NaN or infinity, or the stored dtype overflowed."""


class TrainingDiverged(ActcacheError):
    """A loss or a weight of an SAE became NaN or infinite."""


class ConfigError(ValueError):
    """The arguments or the YAML are wrong, whatever is on disk."""
