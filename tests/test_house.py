"""The rules of the house: who may import whom, how long a file is, what an import costs, what the wheel holds."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import inflash

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("storage", "kernels", "pipeline", "tools")
PRODUCT = [
    ROOT / "__init__.py",
    ROOT / "errors.py",
    *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))),
]
MAX_LINES = 400

FORBIDDEN = {
    "storage": {"inflash.kernels", "inflash.pipeline", "inflash.tools", "jax", "jaxlib"},
    "kernels": {
        *("inflash.storage", "inflash.pipeline", "inflash.tools"),
        *(
            "os",
            "io",
            "pathlib",
            "mmap",
            "shutil",
            "socket",
            "subprocess",
            "multiprocessing",
            "tempfile",
            "zarr",
            "orbax",
            "safetensors",
        ),
    },
    "pipeline": {"inflash.tools"},
    "tools": set(),
}
HEAVY = ("jax", "jaxlib", "zarr", "orbax", "tensorstore", "tokenizers")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("inflash", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that a file imports anywhere, functions and TYPE_CHECKING included."""
    package = module_name(path).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_in(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def loaded_by(code: str) -> set[str]:
    """Which of `HEAVY` and numpy a fresh interpreter has loaded after running `code`."""
    report = f"import sys; print(*sorted({(*HEAVY, 'numpy')} & sys.modules.keys()), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=60, cwd="/")
    assert run.returncode == 0, run.stderr
    return set(run.stderr.split())


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    files = [path for path in PRODUCT if path.is_relative_to(ROOT / folder)]
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in files
        for line, name in imports(path)
        if is_in(name, FORBIDDEN[folder])
    ]
    assert not wrong


def test_kernels_open_no_files() -> None:
    calls = [
        f"{path.name}:{node.lineno}"
        for path in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("open", "print", "input")
    ]
    assert not calls


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_inside_the_package_are_relative(path: Path) -> None:
    """An absolute `import storage` would need bare top-level names, and `import inflash` another copy of the package."""
    names = {"inflash", *FOLDERS, "errors"}
    tree = ast.parse(path.read_text())
    absolute = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    absolute += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in absolute if is_in(name, names)]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_the_folders_own_init_files_are_empty() -> None:
    """Code there would run in every process that imports one module of the folder."""
    for path in PRODUCT:
        if path.name == "__init__.py" and path.parent != ROOT:
            assert path.read_bytes() == b"", path


def test_the_face_imports_neither_jax_nor_numpy() -> None:
    assert loaded_by("import inflash; dir(inflash); inflash.__version__; inflash.InflashError") == set()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["bench", "--help"],
        ["generate", "--help"],
        ["profile", "--help"],
        ["bench", "kernels", "--help"],
    ],
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
from inflash.tools.cli import main
try:
    main({words})
except SystemExit as end:
    assert end.code == 0
"""
    assert loaded_by(code) == set()


def test_a_loader_process_imports_nothing_heavy() -> None:
    """What a spawned loader unpickles is in this module, so this is what each of them costs in memory."""
    assert not loaded_by("import inflash.pipeline.loader") & set(HEAVY)


def test_the_face_hands_out_its_names() -> None:
    assert set(inflash.__all__) <= set(dir(inflash))
    for name in inflash.__all__:
        assert getattr(inflash, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        inflash.Nothing  # noqa: B018


def test_no_bare_top_level_names() -> None:
    """Installed or editable, only `inflash` is importable from elsewhere: Hugging Face ships a package called kernels."""
    code = f"""
import importlib.util, inflash
for name in {(*FOLDERS, "errors")}:
    spec = importlib.util.find_spec(name)
    assert spec is None or not str(spec.origin).startswith({str(ROOT)!r}), spec
"""
    loaded_by(code)


def test_every_package_is_declared() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {"inflash": "."}
    assert set(settings["packages"]) == {module_name(path) for path in PRODUCT if path.name == "__init__.py"}


@pytest.mark.integration
def test_the_wheel_holds_only_inflash(tmp_path: Path) -> None:
    """Built from a copy, because setuptools writes into the tree that it builds."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("__init__.py", "errors.py", "py.typed", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(copy)]
    subprocess.run(command, check=True, timeout=120)
    (wheel,) = tmp_path.glob("inflash-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    product = {f"inflash/{path.relative_to(ROOT)}" for path in PRODUCT}
    data = {f"inflash/{path.relative_to(ROOT)}" for path in (ROOT / "tools" / "embedded").glob("*")} | {
        "inflash/py.typed",
        "inflash/kernels/native.cc",
        "inflash/kernels/native_many.h",
        "inflash/kernels/native_rows.h",
        "inflash/tools/profile_report.html",
    }
    assert {name for name in names if ".dist-info/" not in name} == product | data
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
