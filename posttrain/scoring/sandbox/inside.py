"""The first code that runs in a sandbox. It isolates the process, gives up all rights, and becomes the program.

`run.py` starts it as `python -I -S inside.py JOB_FD READY_FD isolate|limit`. It imports the standard library only,
because this package is not visible in the sandbox. isolate: enter new namespaces (network, processes, mounts, IPC) and
a new root, which holds the interpreter read-only and an empty /tmp. limit: bubblewrap has done that already, so only
the limits are set.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any

_NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # mounts, UTS, IPC, PIDs, network
_NEW_USER = 0x10000000
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_NOSUID, _MS_NODEV = 0x1000, 0x4000, 0x40000, 2, 4
_MNT_DETACH = 2
_MOUNT_SETATTR, _AT_RECURSIVE, _AT_FDCWD = 442, 0x8000, -100
_ATTR_READ_ONLY, _ATTR_NO_SUID, _ATTR_NO_DEV = 1, 2, 4
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_DEVICES = ("null", "zero", "urandom")
_FIRST_USER, _NUM_USERS = 20_000, 40_000
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    job_fd, ready_fd, way = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with os.fdopen(job_fd, "rb") as file:
        job = json.load(file)
    os.set_inheritable(ready_fd, False)  # the program must not be able to write "ready"
    if way == "isolate":
        user = _enter_namespaces(job["parent"])
        child = os.fork()
        if child:
            os.close(ready_fd)
            os._exit(_wait(child))
        # This is the first process of a PID namespace, which ends with it: nothing that the program starts outlives it.
        _build_root(job)
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
    _become_program(job, ready_fd)


def _enter_namespaces(parent: int) -> int | None:
    """Enter new namespaces. Returns the user id to change to if this process is root, otherwise None.

    Each run as root takes another user id, because the limit on processes counts all processes of a user.
    """
    user = None
    if os.geteuid() == 0 and _libc.unshare(_NEW_NAMESPACES) == 0:
        user = _FIRST_USER + os.getpid() % _NUM_USERS
    else:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(_FIRST_USER, _FIRST_USER, _FIRST_USER)
            os.setresuid(_FIRST_USER, _FIRST_USER, _FIRST_USER)
            _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self still belongs to root
        uid, gid = os.geteuid(), os.getegid()
        _check(_libc.unshare(_NEW_NAMESPACES | _NEW_USER), "new namespaces")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _die_with(parent)
    return user


def _build_root(job: Mapping[str, Any]) -> None:
    root = next(path for path in ("/mnt", "/srv", "/media", "/tmp") if os.path.isdir(path))
    _mount(None, "/", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, _MS_NOSUID | _MS_NODEV, kind="tmpfs", options="size=1m,mode=755")
    os.chdir(root)
    for path in job["visible"]:
        _show(path, root)
    os.mkdir(f"{root}/dev")
    for device in _DEVICES:
        open(f"{root}/dev/{device}", "w").close()
        _mount(f"/dev/{device}", f"{root}/dev/{device}", _MS_BIND)
    os.mkdir(f"{root}/tmp")
    size = job["limits"]["disk_mib"]
    _mount("tmpfs", f"{root}/tmp", _MS_NOSUID | _MS_NODEV, kind="tmpfs", options=f"size={size}m,mode=1777")
    _read_only(root, recursive=False)
    _check(_libc.pivot_root(b".", b"."), "a new root")
    _check(_libc.umount2(b".", _MNT_DETACH), "leaving the old root")
    os.chdir("/tmp")


def _show(path: str, root: str) -> None:
    """Make a host file or folder visible, read-only, at the same place in the new root. A link stays a link."""
    place = root + path
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.lexists(place):  # inside a folder that is visible already
        return
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.mkdir(place)
    else:
        open(place, "w").close()
    _mount(path, place, _MS_BIND | _MS_REC)
    _read_only(place, recursive=True)


def _become_program(job: Mapping[str, Any], ready_fd: int) -> None:
    limits = job["limits"]
    os.chdir("/tmp")
    with open("/tmp/main.py", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(job["source"])
    mib = 1 << 20
    for which, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_FSIZE, limits["disk_mib"] * mib),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, limits["num_processes"]),
        (resource.RLIMIT_AS, limits["memory_mib"] * mib),
    ):
        resource.setrlimit(which, (value, value))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "giving up privileges")
    _die_with(None)
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    os.write(ready_fd, b"ready")
    os.execve(job["python"], [job["python"], "-I", "-B", "/tmp/main.py"], environment)


def _die_with(parent: int | None) -> None:
    """Have the kernel send SIGKILL to this process when its parent ends. A change of user cancels this request, so this
    is called again after each change."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def _wait(child: int) -> int:
    status = os.waitpid(child, 0)[1]
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _read_only(path: str, recursive: bool) -> None:
    """Make a mount read-only, without suid and devices, and if `recursive` the mounts below it too (Linux 5.12)."""
    attributes = (ctypes.c_uint64 * 4)(_ATTR_READ_ONLY | _ATTR_NO_SUID | (_ATTR_NO_DEV if recursive else 0), 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _check(_libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, attributes, size), f"{path} read-only")


def _mount(source: str | None, target: str, flags: int, *, kind: str | None = None, options: str | None = None) -> None:
    words = [word.encode() if word is not None else None for word in (source, target, kind, options)]
    _check(_libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]), f"mounting {target}")


def _check(status: int, what: str) -> None:
    if status != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
