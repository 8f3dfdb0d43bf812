"""Archives in the data root: found under their official names, fetched where they still can be, read in order.

What a machine's data root lacks it looks for in HDML_ARCHIVES: a folder that machines share, read from where it lies,
or an address such as s3://BUCKET/FOLDER or gs://BUCKET/FOLDER, from which each machine fetches what it needs, once.
"""

import hashlib
import http.client
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.request import urlopen

from tqdm import tqdm

from hdml_core.datasets.base import DataError
from hdml_core.datasets.locks import locked

BLOCK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """An official archive. One without an address is not to be had by program: `note` says from whom."""

    file: str
    address: str = ""
    md5: str = ""
    note: str = ""

    @property
    def folder(self) -> str:
        return self.file.partition(".")[0]


def find(root: Path, archive: Archive) -> Path | None:
    """Return the archive, or the folder that it unpacks to, as `held` finds them, or None."""
    return held(root, archive.file) or held(root, archive.folder)


def held(root: Path, name: str) -> Path | None:
    """Return a file or folder of the data root, or else of HDML_ARCHIVES, or None.

    Raises DataError where an address in HDML_ARCHIVES can't be read.
    """
    shared = os.environ.get("HDML_ARCHIVES", "")
    if (root / name).exists():
        return root / name
    if "://" not in shared:
        path = Path(shared) / name
        return path if shared and path.exists() else None
    with locked(root / "cache" / f"{name.replace('/', '-')}.lock"):
        return root / name if (root / name).exists() or _copy(shared, name, root / name) else None


def fetch(root: Path, archive: Archive) -> Path:
    """Return what `find` does, after a download if need be.

    An archive that the user put there is taken as it is, whatever its checksum (it may hold crops); what the manifest
    of its data set states must still hold. Raises DataError where there is none and none can be had.
    """
    shared = os.environ.get("HDML_ARCHIVES", "")
    if not (root.is_dir() or shared):
        raise DataError(f"data root {root} not found: make it, or set HDML_DATA to the folder that holds the archives")
    path = root / archive.file
    if found := find(root, archive):
        return found
    if not archive.address:
        places = f"{root} or {shared}" if shared else str(root)
        raise DataError(
            f"{archive.file} not found in {places}, nor its unpacked folder {archive.folder}; {archive.note}: "
            f"put it at {path}, or set HDML_DATA to the folder that holds it"
        )
    with locked(root / "cache" / f"{archive.file}.lock"):
        return path if path.exists() else _download(archive, path)


def _copy(address: str, name: str, path: Path) -> bool:
    """Fetch a file or folder from an address that machines share; return whether it is there."""
    from pyarrow import ArrowException, fs  # here: it takes a while, and few need it

    part = path.with_name(f"{path.name}.part")
    try:
        system, folder = fs.FileSystem.from_uri(address)
        there = f"{folder.rstrip('/')}/{name}"
        if system.get_file_info(there).type == fs.FileType.NotFound:
            return False
        part.parent.mkdir(parents=True, exist_ok=True)
        fs.copy_files(there, str(part), system, fs.LocalFileSystem())
        part.rename(path)
    except (OSError, ArrowException) as error:
        raise DataError(
            f"{name} can't be fetched from HDML_ARCHIVES {address}: {error}. Put it at {path}, or set another"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
    return True


def _download(archive: Archive, path: Path) -> Path:
    part = path.with_name(f"{path.name}.part")
    digest = hashlib.md5(usedforsecurity=False)
    by_hand = f"download {archive.address} by hand and put it at {path}"
    try:
        with urlopen(archive.address, timeout=60) as response, part.open("wb") as file:
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=size, desc=archive.file, unit="B", unit_scale=True, disable=None) as bar:
                while block := response.read(BLOCK):
                    digest.update(block)
                    file.write(block)
                    bar.update(len(block))
        if digest.hexdigest() != archive.md5:
            raise DataError(
                f"{archive.file} must have the MD5 checksum {archive.md5}, got {digest.hexdigest()} from "
                f"{archive.address}: {by_hand}"
            )
        part.rename(path)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{archive.file} not found in {path.parent}, its download failed ({error}): {by_hand}"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def identity(path: Path) -> list[str]:
    """Return name, size and modification time of an archive, or of every file in a folder."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(file.relative_to(path.parent).as_posix(), file.stat()) for file in files]
    return [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]


def members(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield (path inside, content) of an archive's files, or a folder's, in the order in which they are stored.

    Raises DataError where the archive is damaged.
    """
    try:
        for name, content in _stored(path, suffixes):
            yield PurePosixPath(name), content
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{path} is damaged or cut short ({error}): fetch it again") from error


def _stored(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if _wanted(file.name, suffixes) and file.is_file():
                yield file.relative_to(path).as_posix(), file.read_bytes()
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if _wanted(name, suffixes):
                    yield name, archive.read(name)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if _wanted(member.name, suffixes) and (content := archive.extractfile(member)):
                    yield member.name, content.read()


def _wanted(name: str, suffixes: tuple[str, ...]) -> bool:
    # Archives packed on a Mac hold a hidden twin (._name) of every file.
    return name.lower().endswith(suffixes) and not PurePosixPath(name).name.startswith(".")
