"""The house as it is built: who may import whom, and what occurs nowhere."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    "protocol",
    "crypto",
    "tasks",
    "client",
    "server",
    "deploy",
    "audit",
    "scenarios",
    "console",
    "fedseal",
]
MAX_LINES = 400
CATALOGUES = {"protocol.errors"}
"""Modules that grow with what they list, one short class per entry, and have no logic to lose track of."""
ROOMS: dict[str, set[str]] = {
    "server.flower": set(),
    "server.listeners": {"flower", "home", "store"},
    "server.cohort": {"exchange", "store"},
    "server.rounds": {"cohort", "exchange", "store"},
    "audit.evidence": set(),
    "audit.collecting": {"evidence"},
    "audit.statistics": {"evidence"},
    "audit.laboratory": {"evidence", "statistics"},
    "audit.checks": {"evidence", "facts", "statistics", "words"},
    "audit.pages": {"checks", "statistics", "words"},
}
"""The rooms of packages that have some, and what else of its package each may import."""
SECRET_MODULES = {"crypto.measuring", "crypto.secret", "crypto.sealing"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> dict[str, Path]:
    paths = [ROOT / "fedseal.py"]
    for package in ORDER[:-1]:
        paths += sorted((ROOT / package).rglob("*.py"))
    return {name_of(path): path for path in paths}


FILES = source_files()


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def absolute(module: str, node: ast.ImportFrom) -> str:
    """The imported module's full name; a leading dot counts from the importing package."""
    if node.level == 0:
        return node.module or ""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    base = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


@cache
def all_imports(module: str) -> frozenset[str]:
    """Every dotted name that a module imports, at the top, inside a function or for types only."""
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(names)


@cache
def own_imports(module: str) -> frozenset[str]:
    """The modules of this project that an import statement names, without the packages they are in."""
    return frozenset(name for name in all_imports(module) if name in FILES and name != module)


def loaded(module: str) -> frozenset[str]:
    """What is in memory once a module is: its imports, their packages, and so on."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in reached or name not in FILES:
            continue
        reached.add(name)
        waiting += own_imports(name)
        waiting.append(name.rpartition(".")[0])
    return frozenset(reached)


def package_of(module: str) -> str:
    return module.partition(".")[0]


def in_package(package: str) -> list[str]:
    """The modules of a package, of which there is at least one."""
    modules = [name for name in FILES if package_of(name) == package]
    assert modules
    return modules


def called(node: ast.Call) -> str:
    """The dotted name of what is called; a question mark stands for a part that is computed."""
    parts, function = [], node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    parts.append(function.id if isinstance(function, ast.Name) else "?")
    return ".".join(reversed(parts))


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            yield called(node), node


def has_true_keyword(node: ast.Call, name: str) -> bool:
    return any(
        keyword.arg == name and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        for keyword in node.keywords
    )


def test_the_house_is_complete() -> None:
    assert {package_of(module) for module in FILES} == set(ORDER)
    assert {"protocol.plan", "crypto.secret", "client.rounds", "server.rounds.runner"} <= FILES.keys()
    for module in FILES:
        assert module == "fedseal" or package_of(module) in FILES, f"{module} is in no package"


def test_no_code_lies_outside_the_house() -> None:
    ignored = {"tests", "docs", "build", "dist"}
    folders = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("[a-z]*/*.py")}
    assert folders - ignored <= set(ORDER)
    assert {path.name for path in ROOT.glob("*.py")} == {"fedseal.py"}


def test_a_package_imports_only_what_is_below_it() -> None:
    upward = [
        f"{module} imports {name}"
        for module in FILES
        for name in own_imports(module)
        if ORDER.index(package_of(name)) > ORDER.index(package_of(module))
    ]
    assert not upward


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    package, _, own = room.partition(".")
    inside = [name for name in FILES if name.startswith(f"{room}.")]
    assert len(inside) > 1
    for module in inside:
        named = {name.split(".")[1] for name in own_imports(module) if name.startswith(f"{package}.")}
        assert named <= ROOMS[room] | {own}, module


def test_every_room_is_on_the_list() -> None:
    assert {name for name, path in FILES.items() if path.name == "__init__.py" and "." in name} == set(
        ROOMS
    )


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {name for name, path in FILES.items() if path.name == "__init__.py"}
    assert set(listed["tool"]["setuptools"]["packages"]) == folders


def test_server_and_client_never_import_each_other() -> None:
    for own, other in (("server", "client"), ("client", "server")):
        for module in in_package(own):
            assert not {name for name in loaded(module) if package_of(name) == other}, module


def test_the_coordinator_never_loads_what_uses_secret_keys() -> None:
    for module in in_package("server"):
        assert not loaded(module) & SECRET_MODULES, module


def test_the_names_of_the_secret_modules_are_up_to_date() -> None:
    """Whatever in crypto reaches the secret side is on the list above."""
    using = {"crypto.measuring", "crypto.secret"}
    reaching = {name for name in FILES if package_of(name) == "crypto" and loaded(name) & using}
    assert reaching == SECRET_MODULES


def test_the_protocol_needs_no_torch() -> None:
    heavy = {"torch", "opacus", "tenseal"}
    for module in in_package("protocol"):
        for name in loaded(module):
            assert not {package_of(imported) for imported in all_imports(name)} & heavy, module


@pytest.mark.parametrize(
    "modules",
    [
        # a coordinator waits for weeks, and torch is large; only the process of a run loads it
        "server.process, server.watch, server.runs, server.addresses",
        # torch takes seconds, and who makes a home, reads a ledger or is not let in trains nothing
        "scenarios.federation, console.ledger, client.owner, client.node",
    ],
)
def test_what_trains_nothing_loads_no_torch(modules: str) -> None:
    code = f"import sys, {modules}; print(sorted({{'torch', 'opacus', 'scipy'}} & sys.modules.keys()))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert shown.stdout == "[]\n"


@pytest.mark.parametrize("package", ORDER)
def test_the_modules_of_a_package_have_no_cycle(package: str) -> None:
    members = {name for name in FILES if package_of(name) == package}
    left = {name: own_imports(name) & members for name in members}
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"cycle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_nothing_unpickles() -> None:
    banned = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for module in FILES:
        assert not {package_of(name) for name in all_imports(module)} & banned, module
        for name, node in calls(module):
            place = f"{module}, line {node.lineno}"
            assert not has_true_keyword(node, "allow_pickle"), place
            if name == "torch.load" or (name == "load" and "torch.load" in all_imports(module)):
                assert has_true_keyword(node, "weights_only"), place
            assert name != "torch.jit.load", place


def test_nothing_is_evaluated() -> None:
    banned = {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"}
    found = [
        f"{module}, line {node.lineno}"
        for module in FILES
        for name, node in calls(module)
        if name in banned
    ]
    assert not found


def test_no_module_of_the_house_is_imported_by_a_computed_name() -> None:
    """Else an import could pass the tests above by."""
    for module in FILES:
        for name, node in calls(module):
            if name.rpartition(".")[2] == "import_module":
                target, place = node.args[0], f"{module}, line {node.lineno}"
                assert isinstance(target, ast.Constant), place
                assert package_of(str(target.value)) not in ORDER, place


def test_a_module_is_short() -> None:
    lengths = {
        module: len(path.read_text(encoding="utf-8").splitlines())
        for module, path in FILES.items()
        if module not in CATALOGUES
    }
    assert {module: lines for module, lines in lengths.items() if lines > MAX_LINES} == {}


def test_a_module_says_what_it_is() -> None:
    assert [module for module in FILES if not ast.get_docstring(tree(module))] == []


@pytest.mark.parametrize(
    ("module", "statement", "expected"),
    [
        ("client.rounds", "from . import state", {"client", "client.state"}),
        ("client.rounds", "from .state import RunState", {"client.state", "client.state.RunState"}),
        ("client", "from .state import RunState", {"client.state", "client.state.RunState"}),
        ("client.rounds", "from crypto import secret", {"crypto", "crypto.secret"}),
    ],
)
def test_no_spelling_of_an_import_is_overlooked(module: str, statement: str, expected: set[str]) -> None:
    (node,) = ast.parse(statement).body
    assert isinstance(node, ast.ImportFrom)
    base = absolute(module, node)
    assert {base} | {f"{base}.{alias.name}" for alias in node.names} == expected
