"""Sentences with a sentiment: 10,604 movie snippets of Rotten Tomatoes, each rated by 20 people
from -4 to 4 (Hutto and Gilbert, VADER, ICWSM 2014), from vaderSentiment's source package."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from memlm import data

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def movie_snippets() -> list[tuple[str, float]]:
    """(snippet, mean rating).  Taken from the cache, or downloaded into it: pip reads a source
    package's name from its setup.py, which thereby runs."""
    path = data.cache_folder() / ARCHIVE
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:"]
            subprocess.run(
                [*command, "vaderSentiment==3.3.2"], cwd=folder, check=True, stdout=sys.stderr
            )
            (Path(folder) / ARCHIVE).rename(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{path}: is not the file that was recorded")
    with tarfile.open(path) as outer:
        inner = io.BytesIO(outer.extractfile(INNER).read())
    with tarfile.open(fileobj=inner) as archive:
        lines = archive.extractfile(FILE).read().decode("utf-8", "replace").splitlines()
    rows = [line.split("\t") for line in lines]
    return [(text, float(rating)) for _, rating, text in rows]
