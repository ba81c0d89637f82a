"""The structure of the code: no import cycles, no names of methods in the core, short functions."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import metacv

ROOT = Path(metacv.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
METHODS = re.compile("maml|reptile|protonet|relationnet", re.IGNORECASE)
NAMES_METHODS = {"help.py", "upgrade.py"}  # usage examples, and names in earlier checkpoints
VERSION_1 = re.compile(r"MetacvError|\bas_now\b|\bnorm=(?!\w*[.(])")


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Modules of metacv that a file imports, also within its functions."""
    modules = {module(other) for other in FILES}
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= whole if whole <= modules else {node.module}
    return (names & modules) - {module(path)}


def test_imports_have_no_cycles():
    graph = {module(path): imports(path) for path in FILES}
    assert graph["metacv.train"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_core_names_no_method():
    core = [path for path in ROOT.glob("*.py") if path.name not in NAMES_METHODS]
    named = [f"{path.name}: {line}" for path in core for line in path.read_text().splitlines() if METHODS.search(line)]
    assert core
    assert named == []


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_function_has_more_than_60_lines(path):
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if f.end_lineno and f.end_lineno - f.lineno >= 60] == []


def test_command_line_has_fewer_than_150_lines():
    assert len((ROOT / "cli.py").read_text().splitlines()) < 150


def test_no_names_of_version_1_remain_outside_upgrade():
    files = [path for path in FILES if path.name != "upgrade.py"]
    left = [
        f"{path.name}: {line}" for path in files for line in path.read_text().splitlines() if VERSION_1.search(line)
    ]
    assert left == []
