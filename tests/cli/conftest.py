"""A command line, run in this process."""

import shlex

import pytest

from cgm.cli import main
from cgm.training import progress


@pytest.fixture
def cgm(capsys, monkeypatch):
    """Runs a command line: exit code, stdout, stderr without the lines of what lasts long."""
    monkeypatch.setattr(progress, "TICK_SECONDS", 3600.0)

    def run(line, *more):
        capsys.readouterr()
        return main([*shlex.split(line), *map(str, more)]), *capsys.readouterr()

    return run
