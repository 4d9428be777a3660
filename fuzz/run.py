"""Coverage-guided fuzzing of a reader (needs the package atheris; Linux):

    python -m fuzz.run gguf CORPUS_DIR -max_total_time=300

Inputs that widen the coverage are added to CORPUS_DIR; a finding is written to the working folder.
Move it to fuzz/findings/<reader>/, where tests/test_fuzz.py runs it from then on, as it runs
fuzz/corpus.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["memlm"]):
    import memlm.io
    import memlm.models.load  # noqa: F401
    from fuzz import readers


def main() -> None:
    name, corpus = sys.argv[1:3]
    Path(corpus).mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(readers.seeds(name)):
        (Path(corpus) / f"seed-{i}").write_bytes(seed)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as work:
        folder = Path(work) / "model"
        folder.mkdir()
        readers.surroundings(name, folder)
        sound = {file.name: file.read_bytes() for file in folder.iterdir()}

        def one(data: bytes) -> None:
            for file in folder.iterdir():
                if file.name not in sound:
                    file.unlink()
            try:
                readers.READERS[name](folder, data)
            except readers.REFUSALS:
                pass

        atheris.Setup([sys.argv[0], *sys.argv[2:], "-timeout=20", "-rss_limit_mb=2048"], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
