"""The README's first example runs as it stands, and its links lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_first_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)
    exec(compile(example, "README.md", "exec"), {})
    assert "w4_matmul" in capsys.readouterr().out
    assert (tmp_path / "packed.pt").stat().st_size < 6e6  # 8.4 million weights


def test_links():
    targets = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(targets) > 15
    for target in targets:
        assert (ROOT / target).exists(), target
