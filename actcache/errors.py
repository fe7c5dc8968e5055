"""Every error actcache raises on purpose. A file that the system does not let us read is an OSError: it may be sound.

ActcacheError          what is on disk, in the model or in the data is not as it must be
  ManifestError        the manifest or a metadata file is missing, malformed, incomplete or of another format version
  CacheMismatch        the cache (or run) is fine but is not the one that was asked for
  CorruptShard         bytes on disk do not match the checksum in the manifest
  CacheLocked          another process holds the cache or the run
  LocksMissing         the file system has no locks
  DiskTooSmall         the disk has less room than what is to be written
  DatasetError         the dataset is missing, empty, malformed or too short
  ModelError           the language model cannot be loaded or lacks the hook that was asked for
  NonFiniteActivations the model produced NaN or infinity, or the stored dtype overflowed
  TrainingDiverged     a loss or a weight of an SAE became NaN or infinite
ConfigError            (a ValueError) the arguments or the YAML are wrong, whatever is on disk
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class ActcacheError(Exception):
    """Base of every error about what was found outside the program.

    A message says who complains, the rule, what was got, and the way out. Whoever needs a part of it reads the
    attributes.

    Attributes:
        what: what is wrong.
        path: the file that it is wrong with; None where `what` says it.
        way_out: what to do; "" where `what` says it.
    """

    def __init__(self, what: str, *, path: Path | None = None, way_out: str = "", where: str = ""):
        """where: the place within the file, for the message."""
        self.what, self.path, self.way_out = what, path, way_out
        said = ": ".join(part for part in ("" if path is None else str(path), where, what) if part)
        super().__init__(f"{said}; {way_out}" if way_out else said)


class ManifestError(ActcacheError):
    """The manifest or a metadata file is missing, malformed, incomplete or of another format version."""


class CacheMismatch(ActcacheError):
    """The cache (or run) is fine but is not the one that was asked for."""


class CorruptShard(ActcacheError):
    """Bytes on disk do not match the checksum in the manifest.

    Attributes:
        what, path, way_out: as in ActcacheError.
        chunk: number of the chunk within the file; None if the whole file is wrong.
        rows: (start, stop), the rows of the chunk within the split; None if the whole file is wrong.
    """

    def __init__(
        self,
        what: str,
        *,
        path: Path | None = None,
        chunk: int | None = None,
        rows: tuple[int, int] | None = None,
        way_out: str = "",
    ):
        self.chunk, self.rows = chunk, rows
        number = "" if chunk is None else f"chunk {chunk}"
        where = f"{number} (rows {rows[0]} to {rows[1]})" if number and rows else number
        super().__init__(what, path=path, where=where, way_out=way_out)


class CacheLocked(ActcacheError):
    """Another process holds the cache or the run."""


class LocksMissing(ActcacheError):
    """The file system has no locks.

    Nothing would keep two processes from writing at once.
    """


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
