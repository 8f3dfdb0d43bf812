"""Small images and archives, made up in the official layouts."""

import io
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


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


def annotations(column: str, names: Sequence[str], classes: Sequence[int]) -> bytes:
    """A .mat file with the struct array of the official ones of Cars196."""
    table = np.zeros(len(names), dtype=[(column, object), ("class", object), ("bbox_x1", object)])
    table[column], table["class"], table["bbox_x1"] = names, classes, 1
    buffer = io.BytesIO()
    savemat(buffer, {"annotations": table})
    return buffer.getvalue()


def cars(per_class: int, classes: int) -> tuple[dict[str, bytes], bytes]:
    """Files of car_ims.tgz, and cars_annos.mat, of so many cars; the order of the images is not that of the classes."""
    names = [f"car_ims/{number:06d}.jpg" for number in range(per_class * classes)]
    numbers = [number % classes + 1 for number in range(per_class * classes)]
    files = {name: image_file(i) for i, name in enumerate(names)}
    return files, annotations("relative_im_path", names, numbers)


def products(per_class: int = 2, classes: int = 4) -> dict[str, bytes]:
    """Files of Stanford_Online_Products.zip; the classes that train are not the first of the folder's names."""
    top, header = "Stanford_Online_Products", "image_id class_id super_class_id path\n"
    files, rows = {}, {"train": [], "test": []}
    for number in range(per_class * classes):
        product = number // per_class + 1
        path = f"sofa_final/{1 + classes - number // per_class:03d}_{number % per_class}.JPG"
        rows["train" if product <= classes // 2 else "test"].append(f"{number + 1} {product} 1 {path}\n")
        files[f"{top}/{path}"] = image_file(number)
    for side, lines in rows.items():
        files[f"{top}/Ebay_{side}.txt"] = (header + "".join(lines)).encode()
    files[f"{top}/sofa_final/not_listed.JPG"] = b"no image"
    return files
