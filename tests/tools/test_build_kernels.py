"""`inflash build-kernels`: it builds, checks and says so; without a compiler it says that in one sentence."""

from pathlib import Path

import pytest

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


def test_it_builds_and_checks(build_output: str, built: Path) -> None:
    (library,) = (built / "inflash").iterdir()
    assert str(library) in build_output
    assert build_output.count("agrees with XLA") == 10
