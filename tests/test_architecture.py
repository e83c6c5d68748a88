"""The house checks its own walls: floors, rooms, the picture of them, and the size of every file."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cvft", "pipeline", "jobs")
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(*PACKAGES, cache_dir=None)


@pytest.fixture(scope="module")
def picture():
    """Rooms (name -> module names) and arrows (importer -> imported) as ARCHITECTURE.md draws them."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = {
        room: set(re.findall(r"`([\w.]+)`", modules))
        for room, modules in re.findall(r"^\| \*\*(\w+)\*\* \| (.+?) \|", text, flags=re.MULTILINE)
    }
    drawing = text.split("```mermaid")[1].split("```")[0]
    arrows = set()
    for sources, targets in re.findall(r"^\s*([\w &]+?) --> ([\w &]+?)$", drawing, flags=re.MULTILINE):
        arrows |= {(a.strip(), b.strip()) for a in sources.split("&") for b in targets.split("&")}
    return rooms, arrows


def _module_room(rooms):
    return {module: room for room, modules in rooms.items() for module in modules}


def _real_modules(graph):
    """Modules and packages as the picture names them: a package of ours below the floors counts as one."""
    names = {".".join(module.split(".")[:2]) for module in graph.modules if "." in module}
    return {name for name in names if not name.startswith("jobs.")} | {"jobs"}


def test_the_floors_and_the_purity_of_cvft_hold():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout), done.stdout


def test_every_module_has_one_room_in_the_picture(graph, picture):
    rooms, _ = picture
    listed = [module for modules in rooms.values() for module in modules]
    assert len(listed) == len(set(listed))
    assert set(listed) == _real_modules(graph)


def test_the_picture_equals_the_imports(graph, picture):
    rooms, arrows = picture
    room_of = _module_room(rooms)

    def room(module):
        return "jobs" if module.split(".")[0] == "jobs" else room_of.get(".".join(module.split(".")[:2]))

    real = {
        (room(importer), room(imported))
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
        if room(importer) and room(imported) and room(importer) != room(imported)
    }
    assert sorted(arrows) == sorted(real)


def test_no_modules_import_each_other_in_a_circle(graph):
    remaining = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    while free := [module for module, imported in remaining.items() if not imported & remaining.keys()]:
        for module in free:
            del remaining[module]
    assert not remaining


def _sources():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = tracked.stdout.split() or [
        str(path.relative_to(ROOT)) for part in PACKAGES for path in Path(part).rglob("*.py")
    ]
    return [ROOT / name for name in names]


def test_no_file_is_too_long():
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in _sources()}
    assert {path: length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_too_long():
    too_long = {}
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    too_long[f"{path.relative_to(ROOT)}:{node.name}"] = length
    assert too_long == {}


def test_the_top_level_holds_what_the_owner_fixed_and_customary_root_files():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    assert folders - {".ci"} == {"pipeline", "jobs", "cvft", "infra", "tests"}
