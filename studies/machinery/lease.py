"""Who is at work on a study: a lease in the ledger's own database, renewed for as long as its driver lives.

A lease is dead once its driver is seen to be gone, or once its beat has stood still over LOOKS looks of whoever
watches it: no clock is ever compared with another. A driver whose lease was taken away commits nothing more to the
ledger: every commit demands, in its own transaction, that the lease still stands. The lease's token is the fence.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil
from sqlalchemy import Column, Connection, Engine, Integer, MetaData, String, Table, Text, delete, event, insert, select
from sqlalchemy import update as renew
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.schema import CreateTable

from hdml_core.config import ConfigError

BEAT = 2.0
"""Seconds between two beats, and between two looks at the beats of others."""
LOOKS = 8
"""A lease whose beat stands still over so many looks is dead."""
TURN = -1
"""The place of whoever takes a trial just now; drivers' own places count from 0."""

LEASES = Table(
    "hdml_leases",
    MetaData(),
    Column("study", String(512), primary_key=True),
    Column("place", Integer, primary_key=True),
    Column("token", String(32), nullable=False),
    Column("beat", Integer, nullable=False),
    Column("owner", Text, nullable=False),
)


class LeaseError(ConfigError):
    """The study is at work elsewhere."""


class LeaseLostError(LeaseError):
    """Another driver took this one for dead and has taken its trials over: it may write no more."""


class Holder(NamedTuple):
    """A lease as others see it."""

    place: int
    token: str
    beat: int
    owner: dict[str, Any]

    def __str__(self) -> str:
        return f"process {self.owner['process']} on {self.owner['host']}, begun {self.owner['begun']}"

    def is_gone(self) -> bool:
        """Whether the driver ran on this machine, this side of its last start, and runs no more."""
        here = (self.owner["host"], self.owner["boot"]) == (socket.gethostname(), _boot())
        return here and not _runs(self.owner["process"])


class Lease:
    """The right to write one study's trials. As a context it is kept alive, and given back at the end."""

    def __init__(self, engine: Engine, study: str, join: bool = False) -> None:
        """Take the lease; those of drivers that are dead are taken away first.

        Raises LeaseError, naming it, where another driver is at work, unless to `join` it was asked for.
        """
        self.study = study
        self.token = uuid.uuid4().hex
        self._engine = engine
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name=f"lease of {study}", daemon=True)
        self._stood: dict[tuple[str, int], int] = {}
        try:
            self._take(join)
        except DBAPIError as error:
            here = holders(engine, study)
            whose = f", which is in the hands of {here[0]}" if here else ""
            raise LeaseError(f"the ledger of study {study!r}{whose}, can't be written: {error.orig}") from error
        event.listen(engine, "commit", self._demand)

    def others(self) -> set[str]:
        """The tokens of the other drivers that hold a lease."""
        return {holder.token for holder in holders(self._engine, self.study)} - {self.token}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have no other driver take a trial meanwhile."""
        own = (LEASES.c.place == TURN, LEASES.c.token == self.token)
        self._delete(*own)  # one that a database that went away could not take back
        while not self._insert(TURN):
            time.sleep(0.02)
        try:
            yield
        finally:
            self._delete(*own)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lease back; where the database is gone, its next driver will find this one gone."""
        self._over.set()
        self._thread.join()
        event.remove(self._engine, "commit", self._demand)
        with suppress(DBAPIError):
            self._delete(LEASES.c.token == self.token)

    def _take(self, join: bool) -> None:
        make_table(self._engine)
        while True:
            others = self._living()
            if others and not join:
                raise LeaseError(
                    f"study {self.study!r} is at work already: {others[0]}. Wait for it, stop it, or run the study "
                    "with --join to work on the same trials beside it"
                )
            if self._insert(max((other.place for other in others), default=-1) + 1):
                return

    def _beat_on(self) -> None:
        own = (LEASES.c.study == self.study, LEASES.c.token == self.token)
        while not self._over.wait(BEAT):
            # A database that is gone is waited for, by this thread as by all; a lease that is gone stops the driver
            # at its next write.
            with suppress(DBAPIError, LeaseLostError):
                with self._engine.begin() as connection:
                    connection.execute(renew(LEASES).where(*own).values(beat=LEASES.c.beat + 1))
                self._bury()

    def _living(self) -> list[Holder]:
        """Watch the other leases until each has beaten or is buried."""
        seen = {other.token: other.beat for other in self._bury()}
        while True:
            others = self._bury()
            if all(other.beat > seen.get(other.token, other.beat) for other in others):
                return others
            for other in others:
                seen.setdefault(other.token, other.beat)
            time.sleep(BEAT)

    def _bury(self) -> list[Holder]:
        """Look at the other leases once; take away the dead ones, and return the rest."""
        rest = []
        stood = {}
        for other in holders(self._engine, self.study):
            if other.token == self.token:
                continue
            key = (other.token, other.beat)
            stood[key] = self._stood.get(key, -1) + 1
            if other.is_gone() or stood[key] >= LOOKS:
                self._delete(LEASES.c.token == other.token)
            else:
                rest.append(other)
        self._stood = stood
        return rest

    def _insert(self, place: int) -> bool:
        row = {"study": self.study, "place": place, "token": self.token, "beat": 0, "owner": json.dumps(_owner())}
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(LEASES).values(row))
        except IntegrityError:
            return False
        return True

    def _delete(self, *where: Any) -> None:
        with self._engine.begin() as connection:
            connection.execute(delete(LEASES).where(LEASES.c.study == self.study, *where))

    def _demand(self, connection: Connection) -> None:
        """Let no transaction of this process commit once its lease is gone; the row stays locked until it has."""
        own = select(LEASES.c.beat).where(
            LEASES.c.study == self.study, LEASES.c.place != TURN, LEASES.c.token == self.token
        )
        if connection.execute(own.with_for_update(read=True, key_share=True)).first() is None:
            raise LeaseLostError(
                f"another driver took this one for dead and has study {self.study!r} in hand: nothing more is written"
            )


def holders(engine: Engine, study: str) -> list[Holder]:
    """Who holds a lease of the study, dead or alive."""
    columns = (LEASES.c.place, LEASES.c.token, LEASES.c.beat, LEASES.c.owner)
    chosen = select(*columns).where(LEASES.c.study == study, LEASES.c.place != TURN).order_by(LEASES.c.place)
    make_table(engine)
    with engine.connect() as connection:
        return [
            Holder(place, token, beat, json.loads(owner)) for place, token, beat, owner in connection.execute(chosen)
        ]


def make_table(engine: Engine) -> None:
    """Make the table of leases where there is none; of two that do so at once, one comes late."""
    with suppress(IntegrityError), engine.begin() as connection:
        connection.execute(CreateTable(LEASES, if_not_exists=True))


def _owner() -> dict[str, Any]:
    begun = datetime.now().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "boot": _boot(), "process": os.getpid(), "begun": begun}


def _runs(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _boot() -> str:
    """What tells one start of this machine from the next; empty where the system does not say."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""
