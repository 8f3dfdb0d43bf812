"""The site: what is particular to one user's machines, read from `site.toml` and checked at the door.

Names are those of the file, sections first: `aws.region`. What the user has not set yet reads "SET: ..." and is let
through here, so that a layout can be rendered and looked at before; `cluster.check` tells it.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hdml_core.errors import ConfigError, did_you_mean

UNSET = "SET: "
"""How a value begins that the user has to give."""
FILE = Path(__file__).with_name("site.toml")
SPELT_BY_SHELLS = ("\n", '"', "`", "\\", "$(")
"""What a value may not hold: layouts put it between double quotes of a shell, for the sake of $HOME."""
FEWEST_LOST_AFTER = 6.0
"""Seconds: below them, a busy node would be taken for a lost one."""


@dataclass(frozen=True)
class Cluster:
    """What all layouts have in common."""

    name: str
    min_workers: int
    max_workers: int
    idle_minutes: float
    upscaling_speed: float
    lost_after_seconds: float
    object_store_gb: float


@dataclass(frozen=True)
class Services:
    """Addresses of the database and the tracker, as the head reaches them."""

    ledger: str
    mlflow: str


@dataclass(frozen=True)
class Place:
    """Where nodes of a layout find and put files: as shells write it, so that `$HOME` is each node's own."""

    archives: str
    data: str
    out: str


@dataclass(frozen=True)
class Aws(Place):
    """Machines of Amazon's EC2, for gpu.yaml."""

    region: str
    zones: tuple[str, ...]
    head_type: str
    worker_type: str
    spot: bool
    machine_image: str
    disk_gb: int
    security_group: str
    head_profile: str
    worker_profile: str
    image: str
    mount: str


@dataclass(frozen=True)
class Gcp(Place):
    """Machines of Google's Compute Engine, for gcp.yaml."""

    project: str
    region: str
    zone: str
    head_type: str
    worker_type: str
    worker_cpus: int
    worker_gpus: int
    spot: bool
    machine_image: str
    disk_gb: int
    subnetwork: str
    worker_account: str
    image: str
    mount: str


@dataclass(frozen=True)
class Local(Place):
    """Machines that are there, reached by ssh, for local.yaml."""

    head: str
    workers: tuple[str, ...]
    user: str
    key: str
    proxy_command: str
    python: str


@dataclass(frozen=True)
class Kuberay(Place):
    """Pods of a Kubernetes that has the KubeRay operator, for kuberay.yaml."""

    namespace: str
    image: str
    study: str
    claim: str
    head_cpus: int
    head_memory_gb: int
    worker_cpus: int
    worker_memory_gb: int
    worker_gpus: int


@dataclass(frozen=True)
class Slurm(Place):
    """Nodes that a Slurm lends, for slurm.sh."""

    partition: str
    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    memory_gb_per_node: int
    hours: int
    python: str


@dataclass(frozen=True)
class Site:
    """All that a layout is rendered from."""

    cluster: Cluster
    services: Services
    aws: Aws
    gcp: Gcp
    local: Local
    kuberay: Kuberay
    slurm: Slurm


def load(file: Path = FILE) -> Site:
    """Read a site.

    Raises ConfigError where the file can't be read, a name is unknown or lacks, or a value is not what it must be.
    """
    try:
        given = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the site file {file} can't be read: {error}; name one with --site FILE") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the site file {file} must be TOML, got: {error}") from error
    sections = get_type_hints(Site)
    _names("", given, sections)
    site = Site(**{name: _section(name, given[name], kind) for name, kind in sections.items()})
    _ranges(site)
    return site


def unset(value: object) -> bool:
    """Whether a value is still the user's to give."""
    return isinstance(value, str) and value.startswith(UNSET)


def _section(name: str, given: object, kind: Any) -> Any:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} must be a section, [{name}], got {given!r}")
    fields = get_type_hints(kind)
    _names(f"{name}.", given, fields)
    return kind(**{field: _value(f"{name}.{field}", given[field], wanted) for field, wanted in fields.items()})


def _names(prefix: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(
                f"unknown setting {prefix + name!r} in the site file: there are {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
    for name in known:
        if name not in given:
            raise ConfigError(
                f"the site file lacks {prefix + name!r}: take it over from cluster/site.toml as published"
            )


def _value(name: str, given: Any, wanted: Any) -> Any:
    if wanted == tuple[str, ...]:
        if not isinstance(given, list):
            raise ConfigError(f"{name} must be a list of texts, got {given!r}")
        return tuple(_value(name, each, str) for each in given)
    if wanted is float and isinstance(given, int) and not isinstance(given, bool):
        return float(given)
    if type(given) is not wanted:
        words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise ConfigError(f"{name} must be {words[wanted]}, got {given!r}")
    if wanted is str and not unset(given) and any(mark in given for mark in SPELT_BY_SHELLS):
        raise ConfigError(f"{name} must be one line without quotes, backticks, backslashes or $(, got {given!r}")
    return given


def _ranges(site: Site) -> None:
    rules = {
        "cluster.lost_after_seconds": FEWEST_LOST_AFTER,
        "cluster.min_workers": 0,
        "cluster.max_workers": max(1, site.cluster.min_workers),
        "cluster.idle_minutes": 1.0,
        "cluster.upscaling_speed": 1.0,
        "cluster.object_store_gb": 0.1,
    }
    for section in dataclasses.fields(site):
        for field in dataclasses.fields(getattr(site, section.name)):
            name = f"{section.name}.{field.name}"
            value = getattr(getattr(site, section.name), field.name)
            least = rules.get(name, 1 if field.type is int else None)
            if least is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
