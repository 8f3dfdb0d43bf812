"""Run a command where no one else can reach it: `python tests/isolated.py COMMAND...`.

Ray listens on every interface. On Linux as root the command gets a network of its own that holds nothing but
the loopback; elsewhere it keeps the network, and Ray asks each caller for a random token. The command takes
this process over, so its exit status and the signals sent to it are its own.
"""

import ctypes
import fcntl
import os
import secrets
import socket
import struct
import sys

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1


def leave_the_network() -> bool:
    """Move this process into an empty network, its loopback up; False where the system does not allow it."""
    if sys.platform != "linux" or ctypes.CDLL(None).unshare(CLONE_NEWNET) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    return True


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python tests/isolated.py COMMAND...")
    if not leave_the_network():
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.execvp(sys.argv[1], sys.argv[1:])
