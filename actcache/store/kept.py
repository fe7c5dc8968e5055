"""A cache can be read while it grows, and as it was before: the files that growth replaces are kept.

kept/FINGERPRINT has a hard link to each of these files, at the path that the file has below the cache. It is for
readers of the manifest/cache.json with that fingerprint. The folder appears as a whole, before the first of these files
is replaced. All other files of the smaller cache are files of the larger one.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from actcache.errors import CacheMismatch, CorruptShard, ManifestError
from actcache.files import (
    PARTIAL_SUFFIX,
    NoFile,
    contents,
    is_there,
    listed,
    make_folder,
    sync_folder,
    write_atomically,
)
from actcache.format.paths import CACHE_MANIFEST, KEPT
from actcache.format.seal import fingerprint

# what link says where a file system has none, of somebody else's files, and across quotas of one file system (EXDEV)
NO_LINKS = {errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFiles:
    """The files of one finished cache, wherever growth has left them. Keys are paths below `root` and `folder`.

    root: the folder of the cache. fingerprint: of its manifest/cache.json; "" for a cache that is being written, whose
    files are all in place. folder: a path below the root.
    """

    root: Path
    fingerprint: str = ""
    folder: str = "."

    @property
    def are_kept(self) -> bool:
        """Whether the files that growth replaces are kept."""
        return bool(self.fingerprint) and (self.root / KEPT / self.fingerprint).exists()

    def below(self, folder: str) -> CacheFiles:
        """The files below a folder of these."""
        return replace(self, folder=f"{self.folder}/{folder}")

    def absolute(self) -> CacheFiles:
        """The same files for a process that has another working folder."""
        return replace(self, root=self.root.absolute())

    def path(self, key: str) -> Path:
        """Where the file is: kept, if growth has begun to replace such files, else in its place."""
        return Path(self._place(key))

    def read(self, key: str, read: Callable[[Path], T]) -> T:
        """What `read` makes of a file. It reads again if growth begins or ends meanwhile.

        Raises what `read` raises, but CacheMismatch if another cache has taken the place of this one.
        """
        while True:
            place = self._place(key)
            try:
                value = read(Path(place))
            except (CorruptShard, ManifestError, NoFile):
                if self._place(key) == place:
                    self.refuse_another()
                    raise
            else:
                if self._place(key) == place:
                    return value

    def _place(self, key: str) -> str:
        """`path` as text: a Path of many parts takes longer than the look at the file."""
        if self.fingerprint:
            kept = f"{self.root}/{KEPT}/{self.fingerprint}/{self.folder}/{key}"
            if is_there(kept):
                return kept
        return f"{self.root}/{self.folder}/{key}"

    def refuse_another(self) -> None:
        """Raise CacheMismatch if manifest/cache.json is no longer that of this cache."""
        if self.fingerprint:
            with suppress(NoFile):
                refuse_another(self.root, self.fingerprint, fingerprint(contents(self.root / CACHE_MANIFEST)))


def refuse_another(root: Path, wanted: str, found: str) -> None:
    """Raise CacheMismatch unless the fingerprint that is found in a cache is the wanted one."""
    if wanted != found:
        raise CacheMismatch(
            f"{root}: was cache {wanted} when it was opened, is {found} now; it has a new hook, has grown or was "
            "written anew, so open it again"
        )


def keep(root: Path, fingerprint: str, keys: Iterable[str]) -> None:
    """Keep these files before they are replaced. A file that is missing is left out.

    After a kill, the same call does it again. The caller holds `exclusive`.

    Args:
        root: the folder of the cache.
        fingerprint: of its manifest/cache.json.
        keys: the files, as paths below the cache.
    """
    whole = root / KEPT / fingerprint
    if whole.exists():  # a growth that was killed has kept them; some may have been replaced since
        return
    aside = _aside(whole)
    try:
        for key in keys:
            with suppress(FileNotFoundError):
                _link(root / key, aside / key)
        for folder, _, _ in os.walk(aside, topdown=False):
            sync_folder(Path(folder))
        os.rename(aside, whole)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(whole.parent)


def forget(root: Path, fingerprint: str) -> None:
    """Undo `keep` for a cache that does not grow after all. The caller holds `exclusive`."""
    whole = root / KEPT / fingerprint
    aside = _aside(whole)
    with suppress(FileNotFoundError):
        os.rename(whole, aside)
        shutil.rmtree(aside)


def kept_fingerprints(root: Path) -> list[str]:
    """The fingerprints of the caches that this one has grown from, or grows from."""
    return sorted(path.name for path in listed(root / KEPT) if path.is_dir() and path.suffix != PARTIAL_SUFFIX)


def _aside(whole: Path) -> Path:
    """A path for what is not whole. What a killed process has left there is removed."""
    aside = whole.with_name(f".{whole.name}{PARTIAL_SUFFIX}")
    with suppress(FileNotFoundError):
        shutil.rmtree(aside)
    return aside


def _link(path: Path, kept: Path) -> None:
    make_folder(kept.parent)
    try:
        os.link(path, kept)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        write_atomically(kept, [contents(path)])
