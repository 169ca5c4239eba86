"""Runs `torch-nvfp4` in processes of their own without importing torch for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SERVER = ROOT / "tests" / "command_server.py"


class Server:
    """Starts a command in a child for each request; its files `out` and `err` lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, *sys.path])), "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.stdin.close()
        assert self.process.wait(60) == 0

    def start(self, *args, stdout="out", stderr="err", encoding="utf-8", before="", **env):
        files = {
            key: str(self.folder / name) if name and not name.startswith("/") else name
            for key, name in (("stdout", stdout), ("stderr", stderr))
        }
        request = {"args": [str(arg) for arg in args], "encoding": encoding, "before": before, "env": env} | files
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        """(exit code, stdout, stderr) of the command that was started last."""
        code = int(self.process.stdout.readline())
        texts = [
            (self.folder / name).read_text(errors="replace") if (self.folder / name).exists() else ""
            for name in ("out", "err")
        ]
        return code, *texts

    def run(self, *args, **options):
        for name in ("out", "err"):
            (self.folder / name).unlink(missing_ok=True)
        self.start(*args, **options)
        return self.end()
