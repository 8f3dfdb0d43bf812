"""Real services for tests, and the ways in which they fail: a database, a tracker, the line to it, a small disk.

Each is a context manager, listens on 127.0.0.1 only, and skips its test, saying why, where the system lacks what it
needs. The fixtures at the end share one of each among all tests: starting a tracker takes seconds.
"""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, Literal, Self, get_args
from urllib.parse import urlsplit

import pytest

HOST = "127.0.0.1"
PATIENCE = 120.0  # seconds until a service that does not answer counts as broken


def free_port() -> int:
    """A port that stays its holder's while it is down: from below those that a system, or Ray, hands out by itself."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with suppress(OSError), socket.create_server((HOST, port)):
            return port


class PostgreSQL:
    """A PostgreSQL server, in a folder of its own: the user it runs as can't reach what root's tests write into."""

    def __init__(self) -> None:
        # Debian keeps them off PATH, a folder for each version.
        installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
        self._path = os.pathsep.join([os.environ["PATH"], *map(str, installed)])
        if not (shutil.which("initdb", path=self._path) and shutil.which("pg_ctl", path=self._path)):
            pytest.skip("PostgreSQL not found: put its initdb and pg_ctl on PATH")
        # PostgreSQL refuses to run as root.
        self._user = _unprivileged_user() if os.geteuid() == 0 else None
        self._port = free_port()
        self._databases = {"postgres"}

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
        if self._user:
            shutil.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
        self._run("initdb", "--no-sync", "--auth=trust", "--username=tests", "--encoding=UTF8", "--no-locale")
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    def start(self) -> None:
        """Start the server, unless it runs, and wait until it answers."""
        if self._runs():
            return
        # What was committed survives a server that is killed even unsynced; only a power cut would lose it.
        options = f"-c listen_addresses={HOST} -c port={self._port} -c unix_socket_directories= -c fsync=off"
        self._run("pg_ctl", "start", "--wait", f"--log={self._folder}/log", f"--options={options}")

    def stop(self, mode: Literal["immediate", "fast"] = "immediate") -> None:
        """Stop the server, if it runs: `immediate` as if it had crashed, `fast` with its transactions rolled back."""
        if self._runs():
            self._run("pg_ctl", "stop", "--wait", f"--mode={mode}")

    @property
    def process(self) -> int:
        """The server's own, which has started all its others."""
        return int((self._folder / "data" / "postmaster.pid").read_text().split()[0])

    def url(self, database: str) -> str:
        """The SQLAlchemy address of a database, which is made at the first call."""
        # Here, since all tests load this module, and those of the core need no client of a database.
        import psycopg
        from psycopg import sql

        if database not in self._databases:
            address = f"host={HOST} port={self._port} user=tests dbname=postgres"
            with psycopg.connect(address, autocommit=True) as connection:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
            self._databases.add(database)
        return f"postgresql+psycopg://tests@{HOST}:{self._port}/{database}"

    def _runs(self) -> bool:
        return self._command("pg_ctl", "status").returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        result = self._command(program, *arguments)
        if result.returncode != 0:
            log = self._folder / "log"
            raise RuntimeError(f"{program} failed: {result.stdout}{log.read_text() if log.exists() else ''}")

    def _command(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(shutil.which(program, path=self._path)), *arguments, f"--pgdata={self._folder}/data"]
        user: dict[str, Any] = {}
        if self._user:
            user = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        return subprocess.run(
            command, cwd=self._folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **user
        )


def _unprivileged_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as")


class MlflowServer:
    """`mlflow server` over a database, its artifacts and its log in `folder`: two processes and about 400 MB."""

    def __init__(self, folder: Path, backend: str) -> None:
        self.folder = folder
        self._backend = backend
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address, the same after every start."""
        return f"http://{HOST}:{self._port}"

    @property
    def process(self) -> int:
        """The server's own, which has started all its others."""
        assert self._process  # it runs
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, unless it runs, and wait until it answers: 4 s where it has the machine for itself."""
        if self._process:
            return
        options = f"--host {HOST} --port {self._port} --workers 1 --backend-store-uri".split()
        # Its job runner starts seven more processes, for evaluations that no study asks for.
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = self.folder / "server.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options, self._backend],
                cwd=self.folder,
                env=os.environ | quiet,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"mlflow server at {self.url} did not start: {log.read_text()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill the server where it stands, if it runs; from then on connections are refused."""
        if not self._process:
            return
        with suppress(ProcessLookupError):  # it went by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        # The process that listens is a child's child, which can't be waited for.
        while self._answers():
            time.sleep(0.01)

    def _answers(self) -> bool:
        with closing(HTTPConnection(HOST, self._port, timeout=5)) as connection:
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            except (OSError, HTTPException):
                return False


Mode = Literal["through", "refuse", "hang", "error", "drop_reply"]


class FaultyProxy:
    """What stands between a client and an HTTP server, in the test's process, and fails as `mode` says.

    through      requests and replies pass
    refuse       no one listens
    hang         connections are accepted and never answered, until the mode changes
    error        every request gets status 500 and does not reach the server
    drop_reply   the request takes effect, and the connection is cut in place of the reply

    The mode counts at the moment when a request has been read; each connection carries one request. A server that is
    down looks like a cut connection.
    """

    def __init__(self, target_url: str) -> None:
        target = urlsplit(target_url)
        self.target = (str(target.hostname), target.port)
        self.changed = threading.Condition()
        self._port = free_port()
        self._listener: _Listener | None = None
        self._mode: Mode = "refuse"

    @property
    def url(self) -> str:
        """Its address, the same in every mode."""
        return f"http://{HOST}:{self._port}"

    def __enter__(self) -> Self:
        self.mode = "through"
        return self

    def __exit__(self, *error: object) -> None:
        self.mode = "refuse"

    @property
    def mode(self) -> Mode:
        """How it fails; may be set at any time, and holds once the assignment is done."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        with self.changed:
            self._mode = mode
            self.changed.notify_all()
        if mode == "refuse" and self._listener:
            self._listener.shutdown()
            self._listener.server_close()
            self._listener = None
        elif mode != "refuse" and not self._listener:
            self._listener = _Listener((HOST, self._port), partial(_Relay, self))
            threading.Thread(target=self._listener.serve_forever, args=[0.01], daemon=True).start()


class _Listener(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


class _Relay(BaseHTTPRequestHandler):
    """One request on its way. The base class speaks HTTP/1.0, so that the connection ends with it."""

    def __init__(self, proxy: FaultyProxy, *arguments: Any) -> None:
        self.proxy = proxy
        super().__init__(*arguments)

    def relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match mode := self.proxy.mode:
            case "hang":
                with self.proxy.changed:
                    self.proxy.changed.wait_for(lambda: self.proxy.mode != "hang")
            case "error":
                self.send_error(500)
            case "through" | "drop_reply":
                with suppress(OSError, HTTPException), closing(HTTPConnection(*self.proxy.target)) as server:
                    server.request(self.command, self.path, body, dict(self.headers) | {"Connection": "close"})
                    reply = server.getresponse()
                    content = reply.read()
                    if mode == "through":
                        self.answer(reply.status, reply.headers.items(), content)

    def answer(self, status: int, headers: Any, content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            # The content was put together again, whole.
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = relay  # noqa: N815 - http.server's names

    def log_message(self, *arguments: Any) -> None:
        """Say nothing: a test's output is its own."""


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of so many megabytes at `folder`, in memory and gone at the end."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a small disk is a tmpfs: only root on Linux can mount one")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk can't be mounted here: {mounted.stderr.splitlines()[0]}")
    try:
        yield folder
    finally:
        # Lazily: a process that was killed a moment ago may still hold a file there.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def shared_postgresql() -> Iterator[PostgreSQL]:
    with PostgreSQL() as server:
        yield server


@pytest.fixture
def postgresql(shared_postgresql: PostgreSQL) -> PostgreSQL:
    """The tests' PostgreSQL, running: the test before may have failed while it was stopped."""
    shared_postgresql.start()
    return shared_postgresql


@pytest.fixture(scope="session")
def shared_mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("mlflow_server")
    with MlflowServer(folder, f"sqlite:///{folder}/mlflow.db") as server:
        yield server


@pytest.fixture
def mlflow_server(shared_mlflow_server: MlflowServer) -> MlflowServer:
    """The tests' MLflow server, running: the test before may have failed while it was stopped."""
    shared_mlflow_server.start()
    return shared_mlflow_server
