"""No secret of this machine is in what a study writes, prints or sends."""

import pytest

from studies.machinery.redaction import known, redacted


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "PGPASSFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_without_secrets_all_stays_as_it_is():
    assert known() == set()
    assert redacted({"a": ["hdml", 1, None]}) == {"a": ["hdml", 1, None]}


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY"])
def test_what_the_environment_holds_is_hidden(name, monkeypatch):
    monkeypatch.setenv(name, "s3cret/(value)")
    assert redacted("it was s3cret/(value), or s3cret%2F%28value%29") == "it was ***, or ***"


@pytest.mark.parametrize("name", ["HDML_LEDGER", "MLFLOW_TRACKING_URI"])
def test_a_password_in_an_address_is_hidden_as_it_is_and_as_it_was_written(name, monkeypatch):
    monkeypatch.setenv(name, "postgresql+psycopg://hdml:p%40ss word@host/ledger")
    assert redacted("p@ss word, p%40ss%20word") == "***, ***"
    monkeypatch.setenv(name, "postgresql://host/ledger?user=hdml&password=p%40ss word")
    assert redacted("p@ss word") == "***"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (".ray/auth_token", "the-secret\n"),
        (".pgpass", "# a remark\nhost:5432:*:hdml:other-one\nhost:5432:ledger:hdml:the-secret\n"),
        (".mlflow/credentials", "[mlflow]\nmlflow_tracking_username = hdml\nmlflow_tracking_password = the-secret\n"),
    ],
)
def test_what_the_usual_files_hold_is_hidden(home, file, content):
    (home / file).parent.mkdir(exist_ok=True)
    (home / file).write_text(content)
    assert redacted(["with the-secret", {"and": "the-secret"}, ("the-secret",)]) == [
        "with ***",
        {"and": "***"},
        ["***"],
    ]


def test_a_colon_in_a_pgpass_password_is_no_end(home):
    (home / ".pgpass").write_text("host:5432:*:hdml:one\\:two\\\\three")
    assert "one:two\\three" in known()


def test_keys_stay_and_words_that_are_short_are_no_secrets(monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "hdml.alpha")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hdml")
    assert redacted({"hdml.alpha": "hdml.alpha", "x": "hdml.beta"}) == {"hdml.alpha": "***", "x": "hdml.beta"}


def test_a_file_that_is_no_text_or_of_no_known_form_holds_none(home):
    (home / ".mlflow").mkdir()
    (home / ".mlflow" / "credentials").write_text("no section")
    (home / ".pgpass").write_bytes(b"\xff\xfe")
    assert known() == set()
