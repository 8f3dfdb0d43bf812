"""Small images and archives, made up in the official layouts."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def image_file(seed: int, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (20, 14)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def birds(per_class: int = 2, classes: int = 4) -> dict[str, bytes]:
    """Files of CUB_200_2011.tgz: class folders, and the hidden twins that a Mac adds."""
    files = {"CUB_200_2011/images.txt": b"", "CUB_200_2011/images/001.Bird/._Bird_0.jpg": b"twin"}
    for bird in range(1, classes + 1):
        for number in range(per_class):
            path = f"CUB_200_2011/images/{bird:03d}.Bird/Bird_{number}.jpg"
            files[path] = image_file(100 * bird + number, mode="L" if number else "RGB")
    return files
