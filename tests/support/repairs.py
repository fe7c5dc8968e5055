"""A cache that is repaired, and what was written meanwhile."""

SETTINGS = {"tokens": 72 * 16, "holdout": 0.5}  # a partial last shard in both splits


def no_model(compute):
    raise AssertionError("the model was loaded")


def repaired(root, load_model=no_model, **arguments):
    """Repair the cache, which must be sound then, and must have been damaged; returns the report."""
    from actcache.integrity.repair import repair

    report = repair(root, load_model, **arguments)
    assert report.problems == ()
    assert report.found
    return report


def stamps(root):
    """Path -> inode, time and bytes of every file but the locks."""
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def changed(before, after):
    return {path for path in {*before, *after} if before.get(path) != after.get(path)}
