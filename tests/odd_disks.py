"""Network disks and mounted buckets, as changed functions of `os`: what they lack and remember."""

import errno
import fcntl
import os
from pathlib import Path

from shardspec.storage import disks

LACKS = {
    "nfs": {},
    "nfs_without_locks": {"flock": errno.ENOLCK},
    "lustre_without_locks": {"flock": errno.ENOSYS},
    "folders_not_synced": {"fsync of folders": errno.EINVAL},
    "no_links": {"link": errno.EPERM},
    "gcsfuse": {"link": errno.ENOSYS},
    "goofys": {"link": errno.EOPNOTSUPP, "pwrite": errno.EOPNOTSUPP, "rewrite": errno.EOPNOTSUPP},
    "mountpoint": {"link": errno.ENOSYS, "replace": errno.ENOSYS, "pwrite": errno.EOPNOTSUPP},
    "read_only": {"create": errno.EROFS},
    "over_quota": {"write": errno.EDQUOT},
    "broken": {"write": errno.EIO},
}
"""What each does not do, and the error that says so."""


def lack(monkeypatch, kind):
    """Makes the disk of this process one of the kinds."""
    missing = LACKS[kind]

    def refusing(name, really, when=lambda *arguments: True):
        def call(*arguments, **more):
            if when(*arguments):
                raise OSError(missing[name], os.strerror(missing[name]))
            return really(*arguments, **more)

        return call

    def is_folder(descriptor):
        return Path(f"/proc/self/fd/{descriptor}").is_dir()

    def changes(path, flags, *_):
        return bool(flags & os.O_RDWR) and Path(path).exists()

    def makes(path, mode="r", *_):
        return any(letter in mode for letter in "xwa")

    calls = {
        "flock": (fcntl, "flock", lambda *_: True),
        "link": (os, "link", lambda *_: True),
        "replace": (os, "replace", lambda *_: True),
        "pwrite": (os, "pwrite", lambda *_: True),
        "rewrite": (os, "open", changes),
        "fsync of folders": (os, "fsync", is_folder),
        "create": (Path, "open", makes),
        "write": (os, "fsync", lambda *_: True),
    }
    for name in missing:
        owner, function, when = calls[name]
        monkeypatch.setattr(owner, function, refusing(name, getattr(owner, function), when))
    monkeypatch.setattr(disks, "is_own", lambda path: False)
    monkeypatch.setattr(disks, "_SETTLE_S", 0.0)


def remember(monkeypatch):
    """Makes this process a machine that believes for ever what it was told of names.

    It asks again for the folders in which it makes files itself, but not where it renames others:
    so that what it builds itself is as unknown to it as what other machines build.
    """
    really_list, really_scan, really_exists, really_open = (
        os.listdir,
        os.scandir,
        Path.exists,
        os.open,
    )
    known = {}

    def once(key, ask):
        found = known.get(key)  # another thread may drop it meanwhile
        if found is None:
            known[key] = found = (ask(),)
        return found[0]

    class Scan(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __next__(self):
            if not self:
                raise StopIteration
            return self.pop(0)

    def scan(folder="."):
        if isinstance(folder, int):  # of a removal
            return really_scan(folder)
        found = once(("scan", str(folder)), lambda: [*really_scan(folder)])
        return Scan(found)

    def make(path, flags, *arguments, **more):
        descriptor = really_open(path, flags, *arguments, **more)
        if flags & os.O_EXCL:
            folder = str(Path(path).parent)
            for key in [*known]:
                if folder in (key[1], str(Path(key[1]).parent)):
                    known.pop(key, None)
        return descriptor

    monkeypatch.setattr(
        os, "listdir", lambda folder=".": once(("list", str(folder)), lambda: really_list(folder))
    )
    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(
        Path, "exists", lambda path: once(("exists", str(path)), lambda: really_exists(path))
    )
    monkeypatch.setattr(os, "open", make)
    monkeypatch.setattr(disks, "is_own", lambda path: False)
