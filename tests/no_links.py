"""A real file system without hard links, in memory, that the kernel mounts by FUSE: as exFAT, SMB or a mounted bucket may be.

It speaks the kernel's protocol (linux/fuse.h, 7.31) itself, in a process of its own: no library of FUSE is needed, but
the right to mount.
"""

import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOOKUP, FORGET, GETATTR, SETATTR, MKDIR, UNLINK, RMDIR, RENAME, LINK = 1, 2, 3, 4, 9, 10, 11, 12, 13
OPEN, READ, WRITE, RELEASE, FSYNC, FLUSH, INIT, OPENDIR = 14, 15, 16, 18, 20, 25, 26, 27
READDIR, RELEASEDIR, FSYNCDIR, CREATE, BATCH_FORGET, RENAME2 = 28, 29, 30, 35, 42, 45
LONGEST = 1 << 20
LIBC = ctypes.CDLL(None, use_errno=True)


class Node:
    """A file's bytes, or a folder's entries by name."""

    def __init__(self, mode: int) -> None:
        self.mode, self.data, self.entries, self.time = mode, bytearray(), dict[bytes, int](), time.time()


class FileSystem:
    """Answers requests; `link_error` is what it says to a link, `renames`: whether it knows RENAME_NOREPLACE."""

    def __init__(self, link_error: int, renames: bool) -> None:
        self.nodes = {1: Node(stat.S_IFDIR | 0o777)}
        self.link_error, self.renames, self.last = link_error, renames, 1

    def answer(self, kind: int, node: int, body: bytes) -> bytes | int:
        """The reply's body, or a negative error number."""
        here = self.nodes.get(node)
        assert here is not None or kind in (INIT, FORGET, BATCH_FORGET), (kind, node)
        match kind:
            case _ if kind == INIT:
                return struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, 0, 8, 6, 65536, 1, 16, 0, 0)
            case _ if kind == LOOKUP:
                found = here.entries.get(body.rstrip(b"\0"))
                return -errno.ENOENT if found is None else self.entry(found)
            case _ if kind == GETATTR:
                return struct.pack("<QII", 0, 0, 0) + self.attributes(node)
            case _ if kind == SETATTR:
                valid, _, _, size = struct.unpack_from("<IIQQ", body)
                if valid & 8:
                    here.data[size:] = bytes(max(0, size - len(here.data)))
                return struct.pack("<QII", 0, 0, 0) + self.attributes(node)
            case _ if kind == MKDIR:
                return self.make(here, body[8:], stat.S_IFDIR | 0o777)
            case _ if kind == CREATE:
                made = self.make(here, body[16:], stat.S_IFREG | 0o666)
                return made if isinstance(made, int) else made + struct.pack("<QII", 0, 0, 0)
            case _ if kind in (UNLINK, RMDIR):
                return self.remove(here, body.rstrip(b"\0"))
            case _ if kind == LINK:
                return -self.link_error
            case _ if kind == RENAME:
                return self.rename(here, *struct.unpack_from("<Q", body), 0, body[8:])
            case _ if kind == RENAME2:
                return self.rename(here, *struct.unpack_from("<QI", body), body[16:])
            case _ if kind in (OPEN, OPENDIR):
                return struct.pack("<QII", 0, 0, 0)
            case _ if kind == READ:
                _, offset, size = struct.unpack_from("<QQI", body)
                return bytes(here.data[offset : offset + size])
            case _ if kind == WRITE:
                _, offset, size = struct.unpack_from("<QQI", body)
                here.data[offset : offset + size] = body[40 : 40 + size]
                return struct.pack("<II", size, 0)
            case _ if kind == READDIR:
                _, offset, size = struct.unpack_from("<QQI", body)
                return self.list(here, offset, size)
            case _ if kind in (RELEASE, RELEASEDIR, FSYNC, FSYNCDIR, FLUSH):
                return b"" if kind != FSYNCDIR else -errno.EINVAL  # SMB syncs no folder
        return -errno.ENOSYS

    def make(self, folder: Node, name: bytes, mode: int) -> bytes | int:
        name = name.split(b"\0")[0]
        if name in folder.entries:
            return -errno.EEXIST
        self.last += 1
        self.nodes[self.last], folder.entries[name] = Node(mode), self.last
        return self.entry(self.last)

    def remove(self, folder: Node, name: bytes) -> bytes | int:
        if name not in folder.entries:
            return -errno.ENOENT
        if self.nodes[folder.entries[name]].entries:
            return -errno.ENOTEMPTY
        del folder.entries[name]
        return b""

    def rename(self, folder: Node, target: int, flags: int, names: bytes) -> bytes | int:
        old, new = names.split(b"\0")[:2]
        if flags and not self.renames:
            return -errno.EINVAL
        if flags and new in self.nodes[target].entries:
            return -errno.EEXIST
        self.nodes[target].entries[new] = folder.entries.pop(old)
        return b""

    def list(self, folder: Node, offset: int, size: int) -> bytes:
        found = b""
        for number, (name, node) in list(enumerate(folder.entries.items(), 1))[offset:]:
            entry = struct.pack("<QQII", node, number, len(name), self.nodes[node].mode >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(found) + len(entry) > size:
                break
            found += entry
        return found

    def entry(self, node: int) -> bytes:
        return struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + self.attributes(node)

    def attributes(self, number: int) -> bytes:
        node = self.nodes[number]
        seconds, size = int(node.time), len(node.data)
        return struct.pack(
            "<QQQQQQIIIIIIIIII", number, size, size // 512, *[seconds] * 3, 0, 0, 0, node.mode, 1, 0, 0, 0, 4096, 0
        )


def serve(folder: str, link_error: int, renames: bool) -> None:
    """Mount at a folder, and answer until it is unmounted."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions".encode()
    if LIBC.mount(b"no-links", folder.encode(), b"fuse", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "cannot be mounted")
    print("mounted", flush=True)
    files = FileSystem(link_error, renames)
    while True:
        try:
            request = os.read(device, LONGEST)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            raise
        _, kind, unique, node = struct.unpack_from("<IIQQ", request)
        if kind in (FORGET, BATCH_FORGET):
            continue
        found = files.answer(kind, node, request[40:])
        code, body = (found, b"") if isinstance(found, int) else (0, found)
        os.write(device, struct.pack("<IiQ", 16 + len(body), code, unique) + body)


@contextmanager
def without_links(folder: Path, link_error: int = errno.EPERM, *, renames: bool = True) -> Iterator[Path]:
    """The folder, with such a file system mounted on it. Raises OSError where nothing may be mounted."""
    command = [sys.executable, __file__, str(folder), str(link_error), str(int(renames))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        if server.stdout.readline() != "mounted\n":
            raise OSError(f"no file system of FUSE can be mounted here: {server.stderr.read().strip()[-200:]}")
        try:
            yield folder
        finally:
            LIBC.umount2(str(folder).encode(), 2)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
