"""One driver at a time: a lease is refused while it lives, taken when it is dead, and fences off who lost it."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, insert, select

from studies.machinery import lease as leases
from studies.machinery.lease import Lease, LeaseError, LeaseLostError, holders

THINGS = Table("things", MetaData(), Column("n", Integer, primary_key=True))


@pytest.fixture
def url(tmp_path):
    url = f"sqlite:///{tmp_path}/ledger.db"
    THINGS.metadata.create_all(create_engine(url))
    return url


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.05)


def write(engine, n):
    with engine.begin() as connection:
        connection.execute(insert(THINGS).values(n=n))


def written(engine):
    with engine.connect() as connection:
        return list(connection.execute(select(THINGS.c.n)).scalars())


def elsewhere(monkeypatch):
    """From here on this process is on another machine, where it can't see who runs on the first."""
    monkeypatch.setattr(leases, "_boot", lambda: "another")


def test_a_second_driver_is_refused_and_told_who_is_there(url):
    with Lease(create_engine(url), "study"):
        with pytest.raises(LeaseError, match=rf"'study' is at work already: process {os.getpid()} on .*--join"):
            Lease(create_engine(url), "study")
        with Lease(create_engine(url), "other"):
            pass
    with Lease(create_engine(url), "study"):
        pass


def test_a_driver_may_join_and_each_knows_the_other(url):
    with Lease(create_engine(url), "study") as first, Lease(create_engine(url), "study", join=True) as second:
        assert first.others() == {second.token}
        assert second.others() == {first.token}
    assert holders(create_engine(url), "study") == []


def test_of_two_that_come_at_once_one_is_refused(url):
    taken, refused = [], []

    def come():
        try:
            taken.append(Lease(create_engine(url), "study").__enter__())
        except LeaseError as error:
            refused.append(error)

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 3)
    taken[0].__exit__()


def hold_for_ever(url):
    Lease(create_engine(url), "study").__enter__()
    signal.pause()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_driver_that_was_killed_is_replaced_at_once(url, reaped):
    process = multiprocessing.get_context("spawn").Process(target=hold_for_ever, args=(url,))
    process.start()
    while not holders(create_engine(url), "study"):
        time.sleep(0.02)
    process.kill()
    if reaped:
        process.join()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with Lease(create_engine(url), "study"):
        pass
    process.join()


def test_a_driver_whose_beat_stands_still_is_fenced_off(url, monkeypatch):
    engine = create_engine(url)
    silent = Lease(engine, "study")  # never entered: it does not beat
    write(engine, 1)
    elsewhere(monkeypatch)
    with Lease(create_engine(url), "study"):
        with pytest.raises(LeaseLostError, match="another driver took this one for dead"):
            write(engine, 2)
        assert written(engine) == [1]
    silent._thread.start()
    silent.__exit__()
    write(engine, 3)
    assert written(engine) == [1, 3]


def test_a_living_driver_is_not_taken_for_dead(url, monkeypatch):
    engine = create_engine(url)
    with Lease(engine, "study"):
        elsewhere(monkeypatch)
        with pytest.raises(LeaseError, match="is at work already"):
            Lease(create_engine(url), "study")
        write(engine, 1)


def test_clocks_do_not_matter(url, monkeypatch):
    engine = create_engine(url)
    with Lease(engine, "study"):
        elsewhere(monkeypatch)
        monkeypatch.setattr(time, "time", lambda: 4e9)
        with pytest.raises(LeaseError, match="is at work already"):
            Lease(create_engine(url), "study")
        write(engine, 1)


def test_a_turn_is_one_driver_s(url):
    with Lease(create_engine(url), "study") as first, Lease(create_engine(url), "study", join=True) as second:
        inside = []

        def take(lease):
            for _ in range(5):
                with lease.turn():
                    inside.append(lease.token)
                    time.sleep(0.005)
                    inside.append(lease.token)

        threads = [threading.Thread(target=take, args=(lease,)) for lease in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(inside) == 20
        assert inside[::2] == inside[1::2]


def test_joined_drivers_bury_each_other(url, monkeypatch):
    silent = Lease(create_engine(url), "study")
    monkeypatch.setattr(leases.Holder, "is_gone", lambda holder: False)
    monkeypatch.setattr(Lease, "_living", lambda lease: holders(lease._engine, "study"))
    with Lease(create_engine(url), "study", join=True) as second:
        assert second.others() == {silent.token}
        deadline = time.monotonic() + 20
        while second.others() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert second.others() == set()
