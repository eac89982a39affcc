"""What the README shows is run as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example_runs_as_printed(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    first, history, rest = done.stdout.splitlines()
    assert first == "paid 2 True"
    assert history == "[(1, '@start', None), (2, 'pay', 'billing')]"
    assert rest.startswith("{'cancelled': 1, 'paid': 1, 'shipped': 1} [Snapshot(order:1001 state='paid'")
