"""The site file: what it may say, and what a mistake in it is told as."""

import dataclasses
import re

import pytest

from cluster import site
from cluster.__main__ import DONE, MISTAKE, main
from hdml_core.errors import ConfigError

TEXT = site.FILE.read_text()


@pytest.fixture
def written(tmp_path):
    """Write a site file with one thing replaced; the path."""

    def write(old: str, new: str):
        assert old in TEXT
        file = tmp_path / "site.toml"
        file.write_text(TEXT.replace(old, new, 1))
        return file

    return write


def test_the_published_site_has_every_setting_and_says_what_is_the_users_to_give():
    loaded = site.load()
    values = {
        f"{section.name}.{field.name}": getattr(getattr(loaded, section.name), field.name)
        for section in dataclasses.fields(loaded)
        for field in dataclasses.fields(getattr(loaded, section.name))
    }
    wanted = [
        name for name, value in values.items() if site.unset(value[0] if isinstance(value, tuple) and value else value)
    ]
    assert {name.partition(".")[0] for name in wanted} == {"services", "aws", "gcp", "local", "kuberay", "slurm"}
    assert all(re.search(r"SET: .+ such as \S+", line) for line in TEXT.splitlines() if '"SET' in line and "=" in line)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("idle_minutes", "idle_minuts", "unknown setting 'cluster.idle_minuts' .*did you mean 'idle_minutes'"),
        ("[aws] ", "[awz] ", "unknown setting 'awz' .*did you mean 'aws'"),
        ('name = "hdml"\n', "", "lacks 'cluster.name'"),
        ("max_workers = 4", 'max_workers = "4"', "cluster.max_workers must be a whole number, got '4'"),
        ("max_workers = 4", "max_workers = true", "cluster.max_workers must be a whole number, got True"),
        ("spot = true", 'spot = "yes"', "aws.spot must be true or false, got 'yes'"),
        ('zones = ["us-west-2a", "us-west-2b"]', 'zones = "us-west-2a"', "aws.zones must be a list of texts, got"),
        ('zones = ["us-west-2a", "us-west-2b"]', "zones = [1]", "aws.zones must be a text, got 1"),
        ("lost_after_seconds = 30.0", "lost_after_seconds = 5", "lost_after_seconds must be at least 6.0, got 5.0"),
        ("min_workers = 0", "min_workers = 5", "cluster.max_workers must be at least 5, got 4"),
        ("worker_gpus = 1", "worker_gpus = 0", "gcp.worker_gpus must be at least 1, got 0"),
        ('mount = ""', "mount = '''a\nb'''", "aws.mount must be one line without quotes"),
        ('mount = ""', "mount = 'a $(b)'", "aws.mount must be one line without quotes"),
        ("[services]", "[services", "must be TOML, got"),
    ],
)
def test_a_mistake_is_told_by_name_rule_value_and_way_out(written, old, new, complaint):
    with pytest.raises(ConfigError, match=complaint):
        site.load(written(old, new))


def test_a_file_that_is_not_there_is_told_with_the_option_that_names_another(tmp_path):
    with pytest.raises(ConfigError, match=r"can't be read: .*--site FILE"):
        site.load(tmp_path / "none.toml")


def test_the_command_ends_with_status_2_on_a_mistake_and_writes_nothing(written, tmp_path, capsys):
    file = written("idle_minutes", "idle_minuts")
    assert main(["write", "--site", str(file), "--to", str(tmp_path / "layouts")]) == MISTAKE
    assert "error: unknown setting" in capsys.readouterr().err
    assert not (tmp_path / "layouts").exists()
    assert main(["write", "--to", str(tmp_path / "layouts")]) == DONE
    assert main(["write", "--to", str(file)]) == MISTAKE
    assert "name a folder with --to" in capsys.readouterr().err
