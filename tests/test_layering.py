"""Arrows between modules point down only: the layers of docs/design.md, read from the imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Upper modules may import lower ones. A folder stands for all modules in it.
ENGINE = [
    "cli", "training", "analysis", "coverage", "inference", "encoding", "model", "loading", "selftest", "contributions",
    "capture", "generation", "sampling", "observers", "storage", "extraction", "manager", "instrument", "interventions",
    "hooks", "reductions", "activations", "architectures", "attention", "hook_points", "token_text", "options",
    "errors",
]  # fmt: skip
PACKAGES = {
    "mlx_hooks": {"forbidden": {"flask", "waitress", "requests", "api_server", "neuroscope_bridge"}},
    "neuroscope_bridge": {"forbidden": {"mlx", "mlx_lm", "flask", "mlx_hooks", "api_server"}},
    "api_server": {"forbidden": {"requests", "neuroscope_bridge"}, "allowed": {"neuroscope_bridge.payload"}},
}
# The command line starts the server and writes the Smalltalk interface: it stands above all packages.
COMMAND_LINE = {"api_server", "neuroscope_bridge"}


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, inside functions too; what only types need is left out."""
    package = path.relative_to(ROOT).with_suffix("").parts
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {_module(module, alias.name) for alias in node.names}
    return found


def _module(package: str, name: str) -> str:
    """What ``from package import name`` imports: the submodule where there is one, else the package."""
    folder = ROOT / package.replace(".", "/")
    is_module = (folder / f"{name}.py").exists() or (folder / name).is_dir()
    return f"{package}.{name}" if is_module else package


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def violations(package: str) -> list[str]:
    rule = PACKAGES[package]
    found = []
    for path in sources(package):
        is_command_line = path.parent == ROOT / "mlx_hooks" / "cli"
        forbidden = rule["forbidden"] - (COMMAND_LINE if is_command_line else set())
        wrong = {name for name in imports(path) if name.split(".")[0] in forbidden} - rule.get("allowed", set())
        found += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(wrong)]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package: str) -> None:
    assert sources(package)
    assert violations(package) == []


def engine_layer(module: str) -> int | None:
    """Place of an engine module from the top, 0; the package itself stands above all; None outside the engine."""
    parts = module.split(".")
    if parts[0] != "mlx_hooks":
        return None
    return ENGINE.index(parts[1]) if len(parts) > 1 and parts[1] in ENGINE else -1


def upward_imports() -> list[str]:
    wrong = []
    for path in sources("mlx_hooks"):
        own = engine_layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if own == -1:
            assert path.name == "__init__.py", f"{path} has no place in the layers"
            continue
        layers = {name: engine_layer(name) for name in imports(path)}
        # The command line stands above the package's own face.
        wrong += [
            f"{path.name} imports {name}"
            for name, layer in layers.items()
            if layer is not None and layer < own and not (own == 0 and layer == -1)
        ]
    return wrong


def test_inside_the_engine_arrows_point_down() -> None:
    assert upward_imports() == []


def test_importing_the_bridge_loads_no_mlx() -> None:
    import subprocess
    import sys

    code = "import sys, neuroscope_bridge; print([m for m in sys.modules if m.split('.')[0] in ('mlx', 'flask')])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


def test_importing_the_engine_loads_no_trainer() -> None:
    import subprocess
    import sys

    code = """if True:
        import sys, mlx_hooks
        heavy = ("mlx_lm.tuner", "mlx_hooks.training.evaluation", "sklearn", "matplotlib", "boto3")
        print([name for name in heavy if name in sys.modules])
        assert {*mlx_hooks.__all__} <= {*dir(mlx_hooks)}
        print(all(getattr(mlx_hooks, name).__name__ == name for name in ("MechIntCallback", "EvalMechIntRunner")))
        try: mlx_hooks.Nothing
        except AttributeError as error: print(error)"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.splitlines() == ["[]", "True", "module 'mlx_hooks' has no attribute 'Nothing'"]


def test_a_wrong_arrow_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, line in [("mlx_hooks", "def f():\n    from flask import Flask\n"), ("api_server", "import requests\n"),
                          ("neuroscope_bridge", "from mlx import core\n")]:  # fmt: skip
        (tmp_path / package).mkdir()
        (tmp_path / package / "x.py").write_text(line)
        monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
        assert violations(package)


@pytest.mark.parametrize(
    "line",
    [
        "from .cli import main",
        "from . import HookedModel",
        "import mlx_hooks",
        "from .model import x",
        "from . import model",
    ],
)
def test_an_arrow_that_runs_up_inside_the_engine_is_found(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlx_hooks").mkdir()
    for name in ("cli", "model"):
        (tmp_path / "mlx_hooks" / f"{name}.py").touch()
    (tmp_path / "mlx_hooks" / "hook_points.py").write_text(f"def f():\n    {line}\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert upward_imports()
