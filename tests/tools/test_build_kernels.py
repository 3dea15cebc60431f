"""`inflash build-kernels`: it builds, checks and says so; without a compiler it says that in one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inflash.errors import InflashError
from inflash.pipeline import native_library
from inflash.tools import cli


@pytest.mark.parametrize("compiler", ["", "no-such-compiler"])
def test_without_a_compiler_it_is_bad_input(compiler: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["build-kernels"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("inflash: error: ") and captured.err.count("\n") == 1 and "C++ compiler" in captured.err
    assert captured.out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_it_builds_and_checks(tmp_path: Path) -> None:
    try:
        native_library._compiler()
    except InflashError as error:
        pytest.skip(str(error))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "INFLASH_KERNELS": "auto"}
    command = [sys.executable, "-m", "inflash.tools.cli", "build-kernels"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    (library,) = (tmp_path / "inflash").iterdir()
    assert str(library) in ended.stdout
    assert ended.stdout.count("agrees with XLA") == 10
