"""A room imports its own floor and the floors before it, never in a circle; nothing in the package
sees `args`.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "moco_isl"
EVERYWHERE = {"errors", "dist", "files", "options", "schema", "ops", "commands"}
EVERYWHERE |= {"__version__", "__main__"}
FLOORS = [
    {"builder", "loader", "encoders", "losses", "bank"},  # what MoCo has, and the equations
    {"mining"},  # what a round shares
    {"miners", "objectives"},  # who finds the positives, and what is trained on them
    {"run", "data"},  # what any script needs, and what comes in
    {"training"},  # how a run goes
    {"evaluation", "export", "report", "mine", "isl"},  # how good it is; a loop of a user's own
    {"embed", "transfer"},  # features out; encoders on other images
    {"pretraining"},  # a pretraining from its flags to its end
    {"flags_page"},  # the flags of all of it
]


def rooms():
    """(room, file, the rooms it imports) of every file of the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        if file == PACKAGE / "__init__.py":
            continue
        imported = set()
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moco_isl":
                names = (
                    [node.module]
                    if "." in node.module
                    else [f"moco_isl.{alias.name}" for alias in node.names]
                )
            imported |= {name.split(".")[1] for name in names if name.startswith("moco_isl.")}
            imported |= {
                name
                for name in names
                if name.split(".")[0]
                in ("launch", "main_moco_isl", "main_knn", "main_lincls", "benchmarks", "studies")
            }
        yield file.relative_to(PACKAGE).parts[0].removesuffix(".py"), file.name, imported


def floor(room):
    return next(number for number, names in enumerate(FLOORS) if room in names)


def test_every_room_has_a_floor_and_imports_only_earlier_ones():
    for room, file, imported in rooms():
        if room in EVERYWHERE:
            assert imported <= EVERYWHERE, file
            continue
        for other in imported - EVERYWHERE - {room}:
            assert floor(other) <= floor(room), f"{room}/{file} imports {other}, a later floor"


def test_no_circles():
    graph = {}
    for room, _, imported in rooms():
        graph.setdefault(room, set()).update(imported - {room} - EVERYWHERE)
    done, open_ = set(), []

    def visit(room):
        assert room not in open_, f"a circle: {' -> '.join([*open_, room])}"
        if room not in done:
            open_.append(room)
            for other in graph.get(room, ()):
                visit(other)
            open_.pop()
            done.add(room)

    for room in graph:
        visit(room)


def test_nothing_but_the_command_line_sees_args():
    """What reads the command line, or is run by `python -m`, may; the method may not."""
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.parent.name == "run" or file.name in (
            *("options.py", "__main__.py", "command.py", "export.py", "mine.py", "transfer.py"),
            "pretraining.py",
        ):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.Lambda):
                names = [a.arg for a in node.args.args]
                where = f"{file.name}: {getattr(node, 'name', 'lambda')}(args)"
                assert "args" not in names, where
