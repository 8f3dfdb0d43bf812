"""Several machines in one: each with a network, disks, processes and a name of its own, and a line that can be cut.

A machine is a set of Linux namespaces, joined to the others by a bridge in the network of the test. Its /tmp, and so
Ray's sessions and whatever a study writes there, is its own; the project's folder is on all of them.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT

NETWORK = "10.77.0"
BRIDGE = "hdml-bridge"


class Machine:
    """One of them. `address` is what the others reach it by."""

    def __init__(self, number: int) -> None:
        self.name, self.address = f"machine-{number}", f"{NETWORK}.{number}"
        self._line = f"hdml-{number}"
        # The project may itself lie in /tmp, which is another one there.
        own_tmp = f"mount -t tmpfs tmpfs /tmp; mkdir -p /tmp/home {ROOT}"
        kept = f"mount --bind {ROOT} /mnt; {own_tmp}; mount --bind /mnt {ROOT}"
        script = f"hostname {self.name}; {kept}; ip link set lo up; exec sleep inf"
        apart = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._keeper = subprocess.Popen([*apart, "sh", "-c", script], stderr=subprocess.DEVNULL)
        self._init = _child(self._keeper.pid)
        _run("ip", "link", "add", self._line, "type", "veth", "peer", "name", "eth0", "netns", str(self._init))
        _run("ip", "link", "set", self._line, "master", BRIDGE, "up")
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def start(self, *command: str, environment: Mapping[str, str] = {}, log: str = "log") -> "subprocess.Popen[bytes]":
        """Start a command there, with its output in a file of that machine's /tmp."""
        own = {"HOME": "/tmp/home", "PYTHONPATH": str(ROOT), "TMPDIR": "/tmp"}
        with self.path(f"/tmp/{log}").open("ab") as output:
            return subprocess.Popen(
                ["nsenter", "--target", str(self._init), "--all", f"--wd={ROOT}", *command],
                env={**os.environ, **own, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def run(self, *command: str, environment: Mapping[str, str] = {}) -> str:
        """Run a command there to its end; return what it said."""
        process = self.start(*command, environment=environment, log="run")
        said = self.path("/tmp/run")
        if process.wait(120) != 0:
            raise RuntimeError(
                f"{' '.join(command)} on {self.name} ended with {process.returncode}: {said.read_text()}"
            )
        return said.read_text()

    def path(self, there: str) -> Path:
        """Where a path of the machine is found from here."""
        return Path(f"/proc/{self._init}/root{there}")

    def cut(self) -> None:
        """Pull its network cable; what runs there goes on."""
        _run("ip", "link", "set", self._line, "down")

    def mend(self) -> None:
        """Plug the cable in again."""
        _run("ip", "link", "set", self._line, "up")

    def kill(self) -> None:
        """Take it away, power and all."""
        self._keeper.kill()
        self._keeper.wait()
        # By itself the line would go some time later, and the next machine's has its name.
        subprocess.run(["ip", "link", "del", self._line], capture_output=True, check=False)


@contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """So many machines on one network; the test is skipped, saying why, where they can't be made."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("machines are Linux namespaces: only root can make them, with Debian's package iproute2")
    with ExitStack() as stack:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        stack.callback(_run, "ip", "link", "del", BRIDGE)
        _run("ip", "addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        made = []
        for number in range(1, count + 1):
            made.append(Machine(number))
            stack.callback(made[-1].kill)
        yield made


def _child(process: int) -> int:
    """The first child of a process, once it has one that runs what it was told to run."""
    children = Path(f"/proc/{process}/task/{process}/children")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for child in children.read_text().split():
            if "sleep" in Path(f"/proc/{child}/cmdline").read_text().split("\0")[0]:
                return int(child)
        time.sleep(0.01)
    raise RuntimeError("a machine does not come up")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
