"""What a node says of itself. Travels to every node as it is here: one without the program answers too.

Every look has a name and a time limit: a file system that hangs keeps nobody from telling the rest.
"""

import ipaddress
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from studies.machinery.audit import code_digest

PACKAGES = ("torch", "torchvision", "ray", "optuna", "mlflow", "numpy")
ABSENT = "none"
LIMIT = 30.0
"""Seconds for each look."""
MEGABYTE, MEGABYTES = 1 << 20, 64
SMALL_FILES = 10

USES_GPUS = """
import json, torch
found = []
for index in range(torch.cuda.device_count()):
    assert torch.ones(8, device=f"cuda:{index}").sum().item() == 8
    found.append([torch.cuda.get_device_name(index), "%d.%d" % torch.cuda.get_device_capability(index)])
print(json.dumps(found))
"""
"""In a process of its own, which gives the memory back that a GPU's context takes."""


class Asked(NamedTuple):
    """What a node is asked."""

    data: Path
    """The data root, as trials use it."""
    out: Path | None
    """Where studies write; None where the driver can't."""
    mark: str
    """Name of a file there that no other folder has."""
    gpus: float
    """How many GPUs Ray counts there, and bytes of its object store."""
    object_store: float


Answer = tuple[dict[str, Any], dict[str, str]]
"""What was found by each look, and why another found nothing."""


def look(asked: Asked) -> Answer:
    """Look at everything on this node."""
    looks: Mapping[str, Callable[[], Any]] = {
        "versions": versions,
        "source": source,
        "gpus": lambda: gpus(asked.gpus),
        "data": lambda: data(asked.data),
        "out": lambda: out(asked.out, asked.mark),
        "archives": archives,
        "manifests": lambda: manifests(asked.data),
        "ports": ports,
        "files": lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "memory": lambda: {"shared": shutil.disk_usage("/dev/shm").total, "store": asked.object_store},
    }
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, method in looks.items():
        try:
            found[name] = within(LIMIT, method)
        except Exception as error:  # noqa: BLE001 - whatever is wrong there is what was asked
            failed[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return found, failed


def within(seconds: float, method: Callable[[], Any]) -> Any:
    """What a method returns or raises, or TimeoutError; what hangs is left hanging."""
    outcome: list[Any] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            outcome.append(method())
        except Exception as error:  # noqa: BLE001 - it is raised again by who waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return outcome[0]


def clock() -> float:
    """The time here."""
    return time.time()


def versions() -> dict[str, str]:
    """Of Python and of what results hang on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT


def source() -> str:
    """SHA-256 of the program that trials here would run; empty where there is none."""
    spec = find_spec("studies")
    return code_digest(Path(spec.origin).parent.parent) if spec and spec.origin else ""


def gpus(counted: float) -> dict[str, Any]:
    """What Ray, torch and the driver each say of the GPUs."""
    cards = _asked("index,uuid,name,driver_version,memory.total,memory.free") if shutil.which("nvidia-smi") else []
    users = _asked("gpu_uuid,pid,used_memory", "compute-apps") if cards else []
    usable: list[list[str]] = []
    error = ""
    if cards or counted:
        command = [sys.executable, "-c", USES_GPUS]
        result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT - 5, check=False)
        if result.returncode == 0:
            usable = json.loads(result.stdout.splitlines()[-1])
        else:
            error = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
    return {
        "counted": counted,
        "usable": usable,
        "error": error,
        "hidden": "CUDA_VISIBLE_DEVICES" in os.environ,
        "cards": [
            {
                "index": int(index),
                "name": name,
                "driver": driver,
                "total": float(total),
                "free": float(free),
                "users": [f"process {pid} {used} MB" for card, pid, used in users if card == uuid_],
            }
            for index, uuid_, name, driver, total, free in cards
        ],
    }


def _asked(names: str, of: str = "gpu") -> list[list[str]]:
    command = ["nvidia-smi", f"--query-{of}={names}", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT - 5, check=False)
    if said.returncode != 0:
        raise OSError(f"nvidia-smi: {(said.stdout + said.stderr).strip()}")
    return [line.split(", ") for line in said.stdout.splitlines()]


def data(root: Path) -> dict[str, Any]:
    """The data root: bytes free there, and how fast it is written to."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return {"folder": str(root), "free": shutil.disk_usage(root).free, **_written(root)}
    except OSError as error:
        return {"folder": str(root), "error": error.strerror or str(error)}


def out(folder: Path | None, mark: str) -> dict[str, Any]:
    """Where studies write, if that is seen from here."""
    if folder is None or not (folder / mark).exists():
        return {"seen": False}
    try:
        return {"seen": True, **_written(folder)}
    except OSError as error:
        return {"seen": True, "error": error.strerror or str(error)}


def _written(folder: Path) -> dict[str, float]:
    """MB/s of a large file, and ms for a small one, each on the disk before it counts."""
    path = folder / f".doctor-{uuid.uuid4().hex}"
    block = os.urandom(MEGABYTE)
    try:
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(MEGABYTES):
                file.write(block)
            os.fsync(file)
        large = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(SMALL_FILES):
            with path.open("wb", buffering=0) as file:
                file.write(block[:4096])
                os.fsync(file)
        small = time.perf_counter() - began
    finally:
        path.unlink(missing_ok=True)
    return {"speed": MEGABYTES * MEGABYTE / 1e6 / large, "small": 1000 * small / SMALL_FILES}


def archives() -> dict[str, Any]:
    """What HDML_ARCHIVES names here, and how many entries it has."""
    address = os.environ.get("HDML_ARCHIVES", "")
    if not address:
        return {"address": ""}
    try:
        return {"address": address, "entries": _entries(address)}
    except (OSError, ValueError, ImportError) as error:
        return {"address": address, "error": str(error)}


def _entries(address: str) -> int:
    if "://" not in address:
        return len(os.listdir(address))
    from pyarrow import fs  # here: it takes a while

    system, folder = fs.FileSystem.from_uri(address)
    return len(system.get_file_info(fs.FileSelector(folder)))


def manifests(root: Path) -> dict[str, list[str]]:
    """Digests of what is decoded in the data root, by data set."""
    found: dict[str, list[str]] = {}
    for path in sorted((root / "cache").glob("*.json")):
        found.setdefault(path.stem.rpartition("-")[0], []).append(json.loads(path.read_text())["digest"])
    return {name: sorted(set(digests)) for name, digests in found.items()}


def ports() -> dict[str, Any]:
    """Where Ray's programs listen beyond the loopback, and addresses of the node that the world may reach."""
    listening = []
    for each in psutil.net_connections("inet"):
        if each.status == psutil.CONN_LISTEN and each.laddr and not _address(each.laddr.ip).is_loopback:
            program = _program_of_ray(each.pid)
            listening += [(program, each.laddr.ip, each.laddr.port)] if program else []
    own = {
        _address(each.address)
        for card in psutil.net_if_addrs().values()
        for each in card
        if each.family in (socket.AF_INET, socket.AF_INET6)
    }
    return {"listening": sorted(listening), "public": sorted(str(address) for address in own if address.is_global)}


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _program_of_ray(process: int | None) -> str:
    """Its name; empty of what is not Ray's, or someone else's."""
    with suppress(psutil.Error):
        words = psutil.Process(process).cmdline()
        if words and words[0].startswith("ray::"):
            return words[0]
        inside = [word for word in words[:4] if "/ray/" in word]
        return Path(inside[0]).stem if inside else ""
    return ""
