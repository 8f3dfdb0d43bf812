"""The spool keeps every event, in order, through whatever ends its driver."""

import multiprocessing
import os
import signal

import pytest

from studies.machinery.spool import REFUSED, Spool, refused
from tests.services import small_disk

PROCESSES = multiprocessing.get_context("forkserver")


def events(count, first=0):
    return [{"do": "log", "n": first + i} for i in range(count)]


def write(spool, count, first=0):
    for event in events(count, first):
        spool.append(event)


def only_left(folder):
    (spool,), living = Spool.left(folder)
    assert living == 0
    return spool


def killed(folder, n):
    """A driver that is killed while it writes."""
    spool = Spool.begin(folder)
    for event in events(n):
        spool.append(event)
    os.write(spool._file, b'{"do": "log", "n": ')
    os.kill(os.getpid(), signal.SIGKILL)


def test_events_come_back_in_their_order_until_they_are_acknowledged(tmp_path):
    spool = Spool.begin(tmp_path)
    write(spool, 5)
    assert spool.read(3) == spool.read(3) == events(3)
    assert spool.unsent == 5
    spool.acknowledge()
    assert spool.unsent == 2
    assert spool.read(3) == events(2, first=3)
    spool.acknowledge()
    assert spool.read(3) == []
    assert list(spool.everything()) == events(5)


def test_what_was_sent_to_its_end_is_removed_and_the_rest_is_left(tmp_path):
    done, rest = Spool.begin(tmp_path), Spool.begin(tmp_path)
    for spool in (done, rest):
        write(spool, 3)
        spool.read(3 if spool is done else 2)
        spool.acknowledge()
        spool.close()
    left = only_left(tmp_path)
    assert left.unsent == 1
    assert left.read(9) == events(1, first=2)
    left.acknowledge()
    left.close()
    assert list(tmp_path.iterdir()) == []


def test_a_driver_that_lives_keeps_its_spool(tmp_path):
    assert Spool.left(tmp_path / "nothing") == ([], 0)
    spool = Spool.begin(tmp_path)
    write(spool, 1)
    assert Spool.left(tmp_path) == ([], 1)
    spool.close()
    assert only_left(tmp_path).read(9) == events(1)


def test_a_driver_killed_in_the_middle_of_a_line_leaves_those_before(tmp_path):
    driver = PROCESSES.Process(target=killed, args=[tmp_path, 3])
    driver.start()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    left = only_left(tmp_path)
    assert left.unsent == 3
    write(left, 1, first=3)
    assert left.read(9) == events(4)


def test_what_was_left_is_sent_in_the_order_of_the_drivers(tmp_path):
    for n in range(11):
        spool = Spool.begin(tmp_path)
        write(spool, 1, first=n)
        spool.close()
    left, _ = Spool.left(tmp_path)
    assert [spool.read(1)[0]["n"] for spool in left] == list(range(11))


@pytest.mark.parametrize("noted", ["", "1000000", "\0\0\0"])
def test_a_note_of_what_was_sent_that_a_crash_has_spoilt_loses_nothing_new(tmp_path, noted):
    spool = Spool.begin(tmp_path)
    write(spool, 2)
    spool.read(1)
    spool.acknowledge()
    spool.close()
    next(tmp_path.glob("*.sent")).write_text(noted)
    left = only_left(tmp_path)
    write(left, 1, first=2)
    assert left.read(9)[-1:] == events(1, first=2)


def test_a_line_that_a_disk_has_spoilt_is_told_as_such(tmp_path):
    spool = Spool.begin(tmp_path)
    write(spool, 1)
    os.write(spool._file, b"\0\xff\0\n")
    write(spool, 1, first=1)
    spool.close()
    first, spoilt, second = only_left(tmp_path).read(9)
    assert [first, second] == events(2)
    assert spoilt["do"] == "unreadable"


def test_refused_events_are_kept_with_their_reason(tmp_path, capsys):
    spool = Spool.begin(tmp_path)
    assert refused(tmp_path) == 0
    for event in events(2):
        spool.refuse(event, "no such thing")
    assert refused(tmp_path) == 2
    assert (tmp_path / REFUSED).read_text().splitlines()[0] == '{"do": "log", "n": 0, "refused": "no such thing"}'
    assert capsys.readouterr().err == f"what is refused is kept in {tmp_path / REFUSED}: no such thing\n"
    assert Spool.left(tmp_path) == ([], 1)


def test_a_full_disk_keeps_events_waiting_and_loses_none(tmp_path, capsys):
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        spool = Spool.begin(disk / "spool")
        write(spool, 2)
        filler = disk / "filler"
        filler.write_bytes(b"0" * free(disk))
        big = {"do": "log", "text": "x" * 10_000}
        for _ in range(3):
            spool.append(big, durable=True)
        assert spool.unsent == 5
        assert "can't be written, kept in memory until it can" in capsys.readouterr().err
        assert spool.read(9)[:2] == events(2)
        assert len(spool.read(9)) < 5
        filler.unlink()
        write(spool, 1, first=2)
        assert spool.read(9) == [*events(2), big, big, big, *events(1, first=2)]
        spool.read(9)
        spool.acknowledge()
        spool.close()


def free(folder):
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
