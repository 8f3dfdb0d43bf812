"""What a trial takes of a node, how many fit, and what a cluster that grows is told."""

import pytest
import yaml

from hdml_core.config import ConfigError
from studies.machinery import resources
from studies.machinery.resources import Resources, Room, may_come, price_per_hour, start_ray
from studies.machinery.study import Study


def node(cpus, gpus=0.0):
    return {"CPU": float(cpus), "GPU": float(gpus)}


@pytest.mark.parametrize(
    ("asked", "nodes", "fitting"),
    [
        (Resources(1, 0.0), [node(2), node(3)], 5),
        (Resources(2, 0.0), [node(3), node(3)], 2),  # a trial never lies on two nodes
        (Resources(1, 1.0), [node(8, 4), node(2, 4), node(64)], 6),
        (Resources(1, 0.5), [node(8, 1)], 2),
        (Resources(1, 0.1), [node(16, 1)], 10),  # ten times 0.1, but for rounding
        (Resources(2, 2.0, 2), [node(8, 4)], 2),
        (Resources(1, 2.0, 2), [node(8, 1), node(8, 1)], 1),  # but several GPUs may
        (Resources(1, 1.0), [node(8)], 0),
        (Resources(1, 0.0), [], 0),
    ],
)
def test_so_many_trials_fit(asked, nodes, fitting):
    assert asked.fitting(nodes) == fitting


def test_a_trial_pays_for_its_share_of_the_dearest_node_that_it_may_be_on():
    assert Resources(1, 1.0).node_share([node(8, 4), node(8, 2), node(64)]) == 0.5
    assert Resources(1, 4.0, 4).node_share([node(8, 2)]) == 2.0
    assert Resources(1, 1.0).node_share([]) == 1.0


def test_several_gpus_are_a_process_each():
    several = study(cpus_per_trial=3, gpus_per_trial=2.0)
    assert Resources.of(several, has_gpus=True).bundles == [{"CPU": 3.0, "GPU": 1.0}] * 2
    assert Resources.of(several, has_gpus=False).bundles == [{"CPU": 3.0}]
    assert Resources.of(study(gpus_per_trial=0.5), has_gpus=True).bundles == [{"CPU": 1.0, "GPU": 0.5}]
    assert Resources.of(study(processes_per_trial=2), has_gpus=False).bundles == [{"CPU": 1.0}] * 2


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster of these nodes, which `ray up` has started with these kinds."""

    def made(there, *kinds):
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        monkeypatch.setattr(resources, "LAUNCHED", tmp_path / "launched.yaml")
        resources.LAUNCHED.write_text(yaml.safe_dump({"available_node_types": dict(enumerate(kinds))}))
        monkeypatch.setattr(resources, "nodes", lambda: there)
        monkeypatch.setattr(resources.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(resources.time, "sleep", lambda seconds: there.append(node(4, 1)))

    return made


WORKER = {"resources": {"CPU": 8, "GPU": 1}, "min_workers": 0, "max_workers": 5}
HEAD = {"resources": {"CPU": 0}, "max_workers": 0}


def study(**fields):
    return Study("s", "Why?", {}, **fields)


def test_a_cluster_that_has_no_gpu_yet_is_asked_for_some(cluster):
    cluster([node(0)], HEAD, WORKER)
    assert may_come() == [node(8, 1)] * 5
    assert start_ray(study()) == Resources(1, 1.0)
    assert Room(study(parallel=6), Resources(1, 1.0))() == 6


def test_a_cluster_that_stays_as_it_is_gets_no_more_than_fits(cluster):
    cluster([node(4, 2), node(4, 1)])
    asked = start_ray(study())
    assert asked == Resources(1, 1.0)
    assert Room(study(), asked)() == 3
    assert Room(study(parallel=2), asked)() == 2


def test_room_follows_the_nodes(cluster, monkeypatch):
    there = [node(4, 2)]
    cluster(there)
    monkeypatch.setattr(resources, "LOOK_EVERY", -1.0)
    room = Room(study(), Resources(1, 1.0))
    assert room() == 2
    there.append(node(4, 1))
    assert room() == 3
    there.clear()
    assert room() == 1  # what waits for a node to come back


def test_nodes_that_are_being_started_are_waited_for(cluster, capsys):
    there = [node(4)]
    cluster(there, {"resources": {}, "min_workers": 2, "max_workers": 2})
    assert start_ray(study()) == Resources(1, 1.0)
    assert len(there) == 3
    assert "waiting for nodes: 1 of 3 are there" in capsys.readouterr().err


def test_a_trial_that_fits_on_no_node_is_refused(cluster):
    cluster([node(4, 1)])
    with pytest.raises(ConfigError, match="room for a trial, got .*'CPU': 8.0.* on nodes of .*ask for less by"):
        start_ray(study(cpus_per_trial=8))


@pytest.mark.parametrize("there", [[node(8, 1)], [node(8, 1), node(8)], [node(0, 4)]])
def test_a_trial_on_several_gpus_must_find_them_all(cluster, there):
    cluster(there)
    with pytest.raises(ConfigError, match="room for a trial, got .*'GPU': 1.0.* [+] .*'GPU': 1.0.* on nodes of"):
        start_ray(study(gpus_per_trial=2.0))


def test_ranks_do_not_share_a_gpu(cluster):
    cluster([node(8, 4)])
    assert start_ray(study(gpus_per_trial=2.0, processes_per_trial=2)) == Resources(1, 2.0, 2)
    with pytest.raises(ConfigError, match="processes_per_trial must be at most gpus_per_trial .* got 2 and 1"):
        start_ray(study(processes_per_trial=2))


def test_an_hour_costs_its_share(cluster):
    cluster([node(0)], HEAD, WORKER)
    assert price_per_hour(study(node_price=3.0), Resources(1, 0.5)) == 1.5
