"""Runs every Python snippet of the README, in order, each in a fresh namespace, and checks the claims it asserts."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[snippet.splitlines()[0][:40] for snippet in SNIPPETS])
@pytest.mark.usefixtures("package_compiler")
def test_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


def test_every_snippet_checks_something():
    assert SNIPPETS
    assert all("assert" in snippet for snippet in SNIPPETS)


def test_readme_stays_short():
    assert len(README.splitlines()) < 250
