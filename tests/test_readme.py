"""The README's examples run as they stand, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_first_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)
    exec(compile(example, "README.md", "exec"), {})
    assert "w4_matmul" in capsys.readouterr().out
    assert (tmp_path / "packed.pt").stat().st_size < 6e6  # 8.4 million weights


def test_example_without_torch():
    example = re.search(r"### Without torch.*?```python\n(.*?)```", TEXT, re.DOTALL).group(1)
    check = """
import sys
w = arrays.dequantize(packed)
assert np.abs(y - 2 * x @ w.T).max() < 0.02 * np.abs(w).sum(1).max()  # of 1/254 from each product
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", example + check], cwd=ROOT, check=True)


def test_links():
    targets = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(targets) > 15
    for target in targets:
        assert (ROOT / target).exists(), target
