"""The services start, answer and fail as they say: a test that leans on them tests what it means to."""

import errno
import threading
from contextlib import closing
from http.client import HTTPConnection, RemoteDisconnected
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from urllib.parse import urlsplit

import mlflow
import pytest
import sqlalchemy
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError

from tests.services import HOST, FaultyProxy, MlflowServer, PostgreSQL, small_disk


@pytest.fixture
def impatient(monkeypatch):
    """An MLflow client that asks once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_a_database_outlives_its_server(postgresql, mode):
    url = postgresql.url(f"ledger_{mode}")
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE trials AS SELECT 7 AS number"))
    postgresql.stop(mode)
    with pytest.raises(OperationalError, match="refused"):
        engine.connect()
    assert postgresql.url(f"ledger_{mode}") == url
    postgresql.start()
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("SELECT number FROM trials")).scalar_one() == 7


def test_a_database_server_leaves_nothing():
    with PostgreSQL() as server:
        folder = server._folder
        assert (folder / "data").is_dir()
    assert not folder.exists()


def test_a_tracker_is_killed_and_comes_back(mlflow_server, impatient):
    client = mlflow.MlflowClient(mlflow_server.url)
    experiment = client.create_experiment("killed")
    mlflow_server.stop()
    with pytest.raises(MlflowException, match="refused"):
        client.get_experiment(experiment)
    mlflow_server.start()
    assert client.get_experiment(experiment).name == "killed"


def test_a_tracker_stands_on_a_database_server(postgresql, tmp_path, impatient):
    with MlflowServer(tmp_path, postgresql.url("mlflow")) as server:
        experiment = mlflow.MlflowClient(server.url).create_experiment("toy")
    engine = sqlalchemy.create_engine(postgresql.url("mlflow"), poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        names = connection.execute(sqlalchemy.text("SELECT experiment_id, name FROM experiments")).all()
    assert (int(experiment), "toy") in names


def test_a_tracker_that_does_not_start_shows_its_log(tmp_path):
    server = MlflowServer(tmp_path, "nonsense://host")
    with pytest.raises(RuntimeError, match="(?s)did not start: .*nonsense"):
        server.start()


def test_a_reply_of_the_tracker_is_lost_and_its_effect_is_not(mlflow_server, impatient):
    with FaultyProxy(mlflow_server.url) as proxy:
        client = mlflow.MlflowClient(proxy.url)
        run = client.create_run(client.create_experiment("lost")).info.run_id
        for step, mode in enumerate(("error", "drop_reply")):
            proxy.mode = mode
            with pytest.raises(MlflowException):
                client.log_metric(run, "train/j_m", 0.5, step=step)
        proxy.mode = "through"
        assert [point.step for point in client.get_metric_history(run, "train/j_m")] == [1]


class Shouting(ThreadingTCPServer):
    """Answers in capitals on connections that stay open, and remembers what it was told."""

    daemon_threads = True

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            told = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.told.append(told)
            self.send_response(201)
            self.send_header("Transfer-Encoding", "chunked")
            self.send_header("Told-At", self.path)
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(told), told.upper()))

        def log_message(self, *arguments):
            pass

    def __init__(self):
        super().__init__((HOST, 0), self.Answer)
        self.told = []


@pytest.fixture
def target():
    with Shouting() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def proxy(target):
    with FaultyProxy(f"http://{HOST}:{target.server_address[1]}") as proxy:
        yield proxy


def tell(connection, words):
    connection.request("POST", "/a?b=c", words)
    reply = connection.getresponse()
    return reply.status, reply.headers["Told-At"], reply.read()


def client(proxy):
    return closing(HTTPConnection(HOST, urlsplit(proxy.url).port, timeout=0.5))


def test_the_proxy_lets_requests_and_replies_through(proxy, target):
    with client(proxy) as connection:
        assert tell(connection, b"one") == (201, "/a?b=c", b"ONE")
        assert tell(connection, b"two") == (201, "/a?b=c", b"TWO")
    assert target.told == [b"one", b"two"]


@pytest.mark.parametrize(
    ("mode", "error", "told"),
    [
        ("refuse", ConnectionRefusedError, []),
        ("hang", TimeoutError, []),
        ("drop_reply", RemoteDisconnected, [b"one"]),
    ],
)
def test_the_proxy_fails_as_told_and_recovers(proxy, target, mode, error, told):
    proxy.mode = mode
    with client(proxy) as connection, pytest.raises(error):
        tell(connection, b"one")
    assert target.told == told
    proxy.mode = "through"
    with client(proxy) as connection:
        assert tell(connection, b"two") == (201, "/a?b=c", b"TWO")


def test_the_proxy_answers_with_an_error(proxy, target):
    with client(proxy) as connection:
        tell(connection, b"one")
        proxy.mode = "error"
        # A connection that was opened before fails too.
        assert tell(connection, b"two")[0] == 500
    assert target.told == [b"one"]


def test_who_hangs_is_let_go_when_the_mode_changes(proxy, target):
    proxy.mode = "hang"
    with client(proxy) as connection:
        connection.request("POST", "/", b"one")
        with pytest.raises(TimeoutError):
            connection.sock.recv(1)
        proxy.mode = "through"
        assert connection.sock.recv(1) == b""
    assert not target.told


def test_a_server_that_is_down_is_a_cut_connection():
    with FaultyProxy("http://127.0.0.1:1") as proxy, client(proxy) as connection, pytest.raises(RemoteDisconnected):
        tell(connection, b"one")


def test_an_unknown_mode_is_named(proxy):
    with pytest.raises(ValueError, match="mode must be one of through, refuse, hang, error, drop_reply, got 'eror'"):
        proxy.mode = "eror"


def test_a_small_disk_is_full_soon_and_gone_at_the_end(tmp_path):
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        (disk / "fits").write_bytes(bytes(500_000))
        with pytest.raises(OSError, match="No space") as full:
            (disk / "too_much").write_bytes(bytes(1_000_000))
        assert full.value.errno == errno.ENOSPC
    assert not list(disk.iterdir())
