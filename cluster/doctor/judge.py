"""What to make of what nodes said: for each look, its answers by node, turned into lines.

A node is called by its name; equal answers share a line.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cluster.doctor.finding import Findings, bad, count, ok, span, unseen

SKEW = 2.0
"""Seconds that clocks may differ by: beyond, certificates and S3's signatures fail sooner or later."""
LEAST_FILES, FILES = 8_192, 65_536
"""Open files below which Ray itself warns, and those that a large cluster wants."""
LEAST_FREE = 5.0
"""GB that must be free for data: the birds take 2 once decoded, products 18."""
SAME_PACKAGES = "bring it to constraints.txt by `bash ~/hdml/cluster/node.sh`, or `ray up` again"
SAME_SOURCE = "`ray up` again, which brings the program to all nodes"

ByNode = Mapping[str, Any]


class Here(NamedTuple):
    """What the driver's own process has, which all nodes must have too."""

    versions: Mapping[str, str]
    source: str
    commit: str
    archives: str
    """HDML_ARCHIVES."""
    token: bool | None
    """Whether Ray asks everyone for its token; None where that is not known."""


def versions(said: ByNode, here: Here) -> Findings:
    """Whether all nodes have the packages of the driver."""
    odd = False
    for node, own in said.items():
        for name, wanted in here.versions.items():
            if own[name] != wanted:
                odd = True
                yield bad(f"{node} has {name} {own[name]}, the driver {wanted}", SAME_PACKAGES)
    if not odd:
        yield ok(f"versions on {count(len(said), 'node')}: {_listed(here.versions)}")


def source(said: ByNode, here: Here) -> Findings:
    """Whether all nodes run the program of the driver."""
    for node, digest in said.items():
        if not digest:
            yield bad(f"{node} has no program", "set PYTHONPATH=~/hdml in the environment of its `ray start`")
        elif digest != here.source:
            yield bad(f"{node} has another program, {digest[:12]}, the driver {here.source[:12]}", SAME_SOURCE)
    if set(said.values()) == {here.source}:
        yield ok(f"program on {count(len(said), 'node')}: digest {here.source[:12]}, commit {here.commit}")


def gpus(said: ByNode, here: Here) -> Findings:
    """Whether torch uses the GPUs that Ray counts, what they are, and who else is on them."""
    for node, own in said.items():
        there, usable = len(own["cards"]), len(own["usable"])
        if own["error"]:
            yield bad(
                f"torch can't use the GPUs of {node}, {own['error']}",
                "install the NVIDIA driver that this torch wants there, see `nvidia-smi`",
            )
        elif own["counted"] != usable:
            yield bad(
                f"Ray counts {own['counted']:g} GPUs on {node}, torch uses {usable}",
                f"start Ray there with --num-gpus={usable}",
            )
        elif there > usable and not own["hidden"]:
            yield bad(f"{node} has {there} GPUs, torch uses {usable}", "see `nvidia-smi -q` there, or restart it")
        if usable and not there:
            yield unseen(f"driver and memory of the GPUs of {node}", "no nvidia-smi there")
        for card in own["cards"]:
            if card["users"]:
                yield ok(f"GPU {card['index']} of {node} is in use: {', '.join(card['users'])}")
    if not any(own["counted"] or own["cards"] for own in said.values()):
        yield ok(f"no GPU on {count(len(said), 'node')}: trials train on CPUs")
        return
    kinds: dict[str, list[Any]] = defaultdict(list)
    for own in said.values():
        for card in own["cards"]:
            kinds[card["name"]].append(card)
    for kind, cards in kinds.items():
        free = span([card["free"] / 1024 for card in cards], "GB")
        yield ok(f"GPUs: {len(cards)} x {kind}, each {free} free of {span([c['total'] / 1024 for c in cards], 'GB')}")
    yield from _alike(said, "driver", lambda own: {card["driver"] for card in own["cards"]})
    capabilities = _nodes_by(said, lambda own: {capability for _, capability in own["usable"]})
    if len(capabilities) > 1:
        yield ok(f"GPUs of unlike kinds, so trials differ in speed and in the last bits: {_places(capabilities)}")


def _alike(said: ByNode, what: str, of: Callable[[Any], set[str]]) -> Findings:
    places = _nodes_by(said, of)
    if len(places) > 1:
        yield bad(f"NVIDIA {what}s differ, {_places(places)}", "install the same one, or use one machine image")
    elif places:
        yield ok(f"NVIDIA {what} {next(iter(places))} on all nodes with a GPU")


def data(said: ByNode, here: Here) -> Findings:
    """Whether every node has a data root that it can write to, with room in it."""
    fine = {}
    for node, own in said.items():
        if "error" in own:
            way_out = "make it, owned by who runs Ray there, or set HDML_DATA elsewhere"
            yield bad(f"HDML_DATA {own['folder']} can't be written on {node}, {own['error']}", way_out)
        elif own["free"] / 1e9 < LEAST_FREE:
            way_out = "free some, or set HDML_DATA to a larger disk"
            yield bad(f"HDML_DATA {own['folder']} has {own['free'] / 1e9:.1f} GB free on {node}", way_out)
        else:
            fine[node] = own
    if fine:
        own = next(iter(fine.values()))
        free = span([each["free"] / 1e9 for each in fine.values()], "GB")
        yield ok(f"HDML_DATA {own['folder']} on {count(len(fine), 'node')}: {free} free, {_speeds(fine)}")


def out(said: ByNode, here: Here) -> Findings:
    """Which nodes see the folder that studies write to, and how fast it is."""
    fine = {}
    for node, own in said.items():
        if own["seen"] and "error" in own:
            way_out = "mount it there for writing, or not at all"
            yield bad(f"HDML_OUT is seen and can't be written on {node}, {own['error']}", way_out)
        elif own["seen"]:
            fine[node] = own
    if fine:
        yield ok(f"HDML_OUT on {count(len(fine), 'node')}: {_speeds(fine)}")
    if apart := [node for node, own in said.items() if not own["seen"]]:
        yield ok(f"HDML_OUT is not seen on {', '.join(apart)}: checkpoints travel from there through Ray")


def archives(said: ByNode, here: Here) -> Findings:
    """Whether every node reaches the archives that the driver names."""
    fine = []
    for node, own in said.items():
        if own["address"] != here.archives:
            wanted = here.archives or "nothing"
            yield bad(
                f"HDML_ARCHIVES names {own['address'] or 'nothing'} on {node}, {wanted} for the driver",
                "`ray up` again, which writes ~/.hdml_environment and starts Ray anew",
            )
        elif "error" in own:
            way_out = "let its account read there, mount it, or set HDML_ARCHIVES elsewhere"
            yield bad(f"HDML_ARCHIVES {own['address']} can't be read on {node}, {own['error']}", way_out)
        else:
            fine.append(own)
    if fine and here.archives:
        yield ok(f"HDML_ARCHIVES {here.archives} on {count(len(fine), 'node')}: {fine[0]['entries']} entries")
    elif fine:
        yield ok("HDML_ARCHIVES is not set: archives that HDML_DATA lacks come from their official addresses")


def manifests(said: ByNode, here: Here) -> Findings:
    """Whether the same data set was decoded from the same data on all nodes that have it."""
    names = sorted({name for own in said.values() for name in own})
    for name in names:
        have = {node: ",".join(digest[:12] for digest in own[name]) for node, own in said.items() if name in own}
        places = _nodes_by(have, lambda digests: {digests})
        if len(places) > 1:
            way_out = f"delete the wrong archive and cache/{name}-* in HDML_DATA there"
            yield bad(f"{name} is not the same data on all nodes, {_places(places)}", way_out)
        else:
            yield ok(f"{name} decoded on {count(len(have), 'node')}: digest {next(iter(places))}")
    if not names:
        yield ok("no data set is decoded yet: each node does so at its first trial")


def ports(said: ByNode, here: Here) -> Findings:
    """Whether strangers may reach Ray."""
    for node, own in said.items():
        listening = own["listening"]
        named = ", ".join(f"{program} {port}" for program, _, port in listening if not program.startswith("ray::"))
        if any(program == "dashboard" for program, _, _ in listening):
            yield bad(
                f"the dashboard of {node} listens beyond the loopback", "ray start --head --dashboard-host=127.0.0.1"
            )
        if not own["public"] or not listening:
            continue
        address = own["public"][0]
        if here.token is False:
            yield bad(
                f"{node} is at {address} with Ray open to anyone, {named}",
                "close all ports but ssh at its firewall, and start Ray with RAY_AUTH_MODE=token",
            )
        else:
            port = next(port for _, _, port in listening)
            yield unseen(
                f"whether a firewall keeps strangers from {node} at {address}, {named}",
                f"it can't be told from inside; from outside this must not connect: nc -vz {address} {port}",
            )
    beyond = sum(bool(own["listening"]) for own in said.values())
    inner = sum(not own["public"] for own in said.values() if own["listening"])
    if beyond and inner == beyond:
        yield ok(f"Ray listens to its network on {count(beyond, 'node')}, none with a public address of its own")
    elif not beyond:
        yield ok("Ray listens on the loopback alone")


def files(said: ByNode, here: Here) -> Findings:
    """Whether Ray may open as many files as it needs."""
    way_out = "`ulimit -n 65536` before `ray start`; the hard limit is in /etc/security/limits.conf"
    low = {node: limit for node, limit in said.items() if limit < LEAST_FILES}
    yield from (bad(f"open files on {node} are limited to {limit}", way_out) for node, limit in low.items())
    if not low:
        least = min(said.values())
        hint = "" if least >= FILES else f"; hundreds of workers want {FILES}"
        yield ok(f"open files: {least} or more on {count(len(said), 'node')}{hint}")


def memory(said: ByNode, here: Here) -> Findings:
    """Whether Ray's object store fits into shared memory."""
    small = {node: own for node, own in said.items() if own["store"] > own["shared"]}
    for node, own in small.items():
        store, shared = own["store"] / 1e9, own["shared"] / 1e9
        yield bad(
            f"/dev/shm of {node} has {shared:.1f} GB, less than Ray's object store of {store:.1f} GB",
            f"docker run --shm-size={store + 1:.0f}g, or ray start --object-store-memory={0.9e9 * shared:.0f}",
        )
    if not small:
        store = span([own["store"] / 1e6 for own in said.values()], "MB")
        yield ok(f"object store of {store} in /dev/shm on {count(len(said), 'node')}")


def clocks(said: ByNode, here: Here) -> Findings:
    """Whether clocks agree: seconds ahead of the driver's, and how sure that is, by node."""
    far = {node: ahead for node, (ahead, doubt) in said.items() if abs(ahead) - doubt > SKEW}
    for node, ahead in far.items():
        way_out = "sudo apt-get install -y chrony && sudo chronyc makestep"
        yield bad(f"the clock of {node} is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}", way_out)
    if not far:
        worst = max(1000 * (abs(ahead) + doubt) for ahead, doubt in said.values())
        yield ok(f"clocks of {count(len(said), 'node')} agree within {worst:.0f} ms")


JUDGES: Mapping[str, tuple[Callable[[ByNode, Here], Findings], str]] = {
    "versions": (versions, "install what studies need there"),
    "source": (source, SAME_SOURCE),
    "gpus": (gpus, ""),
    "data": (data, "mount the disk of HDML_DATA anew, or set it elsewhere"),
    "out": (out, "mount the storage of HDML_OUT anew, or set it elsewhere"),
    "archives": (archives, "mount the storage of HDML_ARCHIVES anew, or let the node's account read there"),
    "manifests": (manifests, "delete what is damaged in HDML_DATA/cache"),
    "ports": (ports, ""),
    "files": (files, ""),
    "memory": (memory, ""),
    "clocks": (clocks, ""),
}
"""How each look is judged, and what mends one that itself failed; empty where that is no harm to a study."""


def judge(said: Mapping[str, ByNode], failed: Mapping[str, Mapping[str, str]], here: Here) -> Findings:
    """Lines for all looks, by name, at all nodes; and for those that failed, with the reason."""
    for name, (method, way_out) in JUDGES.items():
        for node, why in failed.get(name, {}).items():
            yield bad(f"{name} of {node}, {why}", way_out) if way_out else unseen(f"{name} of {node}", why)
        if said.get(name):
            yield from method(said[name], here)


def _nodes_by(said: ByNode, of: Callable[[Any], set[str]]) -> dict[str, list[str]]:
    """The nodes that have each of some values."""
    places: dict[str, list[str]] = defaultdict(list)
    for node, own in said.items():
        for value in sorted(of(own)):
            places[value].append(node)
    return dict(sorted(places.items()))


def _places(places: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{value} on {', '.join(nodes)}" for value, nodes in places.items())


def _listed(own: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in own.items())


def _speeds(said: ByNode) -> str:
    speed, small = ([own[name] for own in said.values()] for name in ("speed", "small"))
    return f"written at {span(speed, 'MB/s')}, a small file in {span(small, 'ms')}"
