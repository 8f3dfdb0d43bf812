"""Archives are read alike however they are packed, and downloaded whole or not at all."""

import hashlib
import shutil

import pytest

from hdml_core.datasets import DataError
from hdml_core.datasets.archives import Archive, fetch, identity, members
from tests.datasets.made import birds, write_folder, write_tar, write_zip

CONTENT = b"an archive" * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


def online(tmp_path, md5=MD5):
    """An archive whose address is a file."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "made.tgz").write_bytes(CONTENT)
    return Archive("made.tgz", address=(tmp_path / "far" / "made.tgz").as_uri(), md5=md5)


@pytest.mark.parametrize(
    "path",
    [
        lambda root: write_tar(root / "made.tgz", birds()),
        lambda root: write_zip(root / "made.zip", birds()),
        lambda root: write_folder(root / "made", birds()),
    ],
    ids=["tar", "zip", "folder"],
)
def test_however_packed(tmp_path, path):
    found = {str(name): content for name, content in members(path(tmp_path), (".jpg",))}
    assert len(found) == 8
    assert all(
        birds()[f"{'' if name.startswith('CUB') else 'CUB_200_2011/'}{name}"] == content
        for name, content in found.items()
    )


@pytest.mark.parametrize("write", [write_tar, write_zip])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_truncated_archive(tmp_path, write, kept):
    path = write(tmp_path / ("made.zip" if write is write_zip else "made.tgz"), birds(per_class=20))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=f"{path} is damaged or cut short"):
        list(members(path, (".jpg",)))


def test_a_folder_stands_for_its_archive(tmp_path):
    archive = Archive("made.tgz")
    (tmp_path / "made").mkdir()
    assert fetch(tmp_path, archive) == tmp_path / "made"
    (tmp_path / "made.tgz").write_bytes(CONTENT)
    assert fetch(tmp_path, archive) == tmp_path / "made.tgz"


def test_identity_follows_the_files(tmp_path):
    folder = write_folder(tmp_path, {"made/a.jpg": b"1", "made/b.jpg": b"2"}) / "made"
    before = identity(folder)
    (folder / "b.jpg").write_bytes(b"22")
    assert identity(folder)[0] == before[0]
    assert identity(folder)[1] != before[1]


def test_a_download(tmp_path):
    archive = online(tmp_path)
    path = fetch(tmp_path, archive)
    assert path.read_bytes() == CONTENT
    (tmp_path / "far" / "made.tgz").unlink()
    assert fetch(tmp_path, archive) == path


@pytest.mark.parametrize("failure", ["checksum", "address"])
def test_a_failed_download_leaves_nothing_and_says_what_to_do(tmp_path, failure):
    archive = online(tmp_path, md5="0" * 32 if failure == "checksum" else MD5)
    if failure == "address":
        (tmp_path / "far" / "made.tgz").unlink()
    by_hand = f"download {archive.address} by hand and put it at {tmp_path / 'made.tgz'}"
    with pytest.raises(DataError, match=by_hand) as raised:
        fetch(tmp_path, archive)
    assert ("checksum" if failure == "checksum" else "not found in") in str(raised.value)
    assert not list(tmp_path.glob("made.tgz*"))


def test_an_archive_of_the_user_need_not_have_the_checksum(tmp_path):
    archive = online(tmp_path)
    (tmp_path / "made.tgz").write_bytes(b"crops")
    assert fetch(tmp_path, archive).read_bytes() == b"crops"


def test_no_archive_and_no_address(tmp_path):
    with pytest.raises(
        DataError, match=r"made.tgz not found in .* nor its unpacked folder made; gone: put it at .*HDML"
    ):
        fetch(tmp_path, Archive("made.tgz", note="gone"))


def test_no_data_root(tmp_path):
    with pytest.raises(DataError, match="data root .*nowhere not found: make it, or set HDML_DATA"):
        fetch(tmp_path / "nowhere", online(tmp_path))


MADE = Archive("made.zip", note="made here")


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with an archive, a folder that one unpacks to, and a table within another."""
    folder = tmp_path / "elsewhere"
    (folder / "unpacked" / "inner").mkdir(parents=True)
    (folder / "made.zip").write_bytes(b"an archive")
    (folder / "unpacked" / "inner" / "one").write_bytes(b"one")
    return folder


def test_what_a_root_lacks_is_read_from_a_shared_folder_where_it_lies(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv("HDML_ARCHIVES", str(elsewhere))
    root = tmp_path / "root"
    assert fetch(root, MADE) == elsewhere / "made.zip"
    assert fetch(root, Archive("unpacked.zip")) == elsewhere / "unpacked"
    root.mkdir()
    (root / "made.zip").write_bytes(b"its own")
    assert fetch(root, MADE) == root / "made.zip"


def test_what_a_root_lacks_is_fetched_from_a_shared_address_once(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv("HDML_ARCHIVES", elsewhere.as_uri())
    root = tmp_path / "root"
    for archive in (MADE, Archive("unpacked.zip")):
        fetch(root, archive)
    assert (root / "made.zip").read_bytes() == b"an archive"
    assert (root / "unpacked/inner/one").read_bytes() == b"one"
    shutil.rmtree(elsewhere)
    assert fetch(root, MADE) == root / "made.zip"
    assert not list(root.glob("*.part"))


def test_a_shared_address_that_has_it_not_is_named(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv("HDML_ARCHIVES", elsewhere.as_uri())
    with pytest.raises(DataError, match=r"other.zip not found in .*root or file://.*elsewhere, nor .* gone: put it at"):
        fetch(tmp_path / "root", Archive("other.zip", note="gone"))
    monkeypatch.setenv("HDML_ARCHIVES", "nonsense://bucket")
    with pytest.raises(DataError, match="made.zip can't be fetched from HDML_ARCHIVES nonsense://bucket: "):
        fetch(tmp_path / "root", MADE)
