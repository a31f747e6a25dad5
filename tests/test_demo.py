"""The demo, shortened to one epoch: the real scripts, the real digits."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_demo_trains_validates_and_draws(tmp_path):
    command = [sys.executable, str(ROOT / "demo.py"), "--output", str(tmp_path / "demo"), "--epochs", "1"]
    for _ in range(2):  # the second time over the first one's results
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    run = tmp_path / "demo" / "mobilenetv3_ditac"
    for name in ("last.pth.tar", "summary.csv", "activations.png"):
        assert (run / name).is_file()
        assert name in done.stdout
