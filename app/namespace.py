"""Enter a user namespace and become another program: for PostgreSQL, which refuses to run as root.

    python app/namespace.py UID GID DEATH_SIGNAL PARENT COMMAND...

To the command its user is UID; to the file system it stays who it was. Imports nothing of ours, so
that it starts quickly.
"""

import ctypes
import os
import sys

CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1


def main() -> None:
    uid, gid, death_signal, parent = map(int, sys.argv[1:5])
    libc = ctypes.CDLL(None, use_errno=True)
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER) != 0:
        sys.exit(f"no user namespace: {os.strerror(ctypes.get_errno())}")
    # user_namespaces(7): a process that gave up setgroups may map its own group.
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {outer_uid} 1"),
        ("gid_map", f"{gid} {outer_gid} 1"),
    ):
        descriptor = os.open(f"/proc/self/{file}", os.O_WRONLY)
        os.write(descriptor, text.encode())
        os.close(descriptor)
    libc.prctl(PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)
    os.execv(sys.argv[5], sys.argv[5:])  # noqa: S606  (no shell is what is wanted)


if __name__ == "__main__":
    main()
