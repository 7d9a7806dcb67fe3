"""The page of all flags: python -m moco_isl.flags_page docs/flags.md"""

import sys

from moco_isl import mine, transfer
from moco_isl.embed import command as embedding
from moco_isl.evaluation import options as judging
from moco_isl.evaluation.detection import command as detecting
from moco_isl.miners import MINERS
from moco_isl.options import Flag, flags_of
from moco_isl.run.flags import Groups
from moco_isl.training import options as training

HEAD = """# Flags

`python -m moco_isl.flags_page docs/flags.md` writes this page from the code: edit it there. Where
the default depends on other flags, the last column says it. *resume*: a run that is resumed may be
given another value (main_knn.py resumes nothing; `python -m moco_isl.embed` goes on by itself).
"""
COLUMNS = ["| flag | default | takes | resume | what it does |", "|---|---|---|---|---|"]

Tables = dict[str, list[Flag]]  # the flags under each title


def page() -> str:
    """A section a script, with a table a group of flags; a group of two scripts stands once."""
    scripts = {
        "main_moco_isl.py": of_groups(training.GROUPS) | of_miners(),
        "main_lincls.py": of_groups(judging.PROBE_GROUPS),
        "main_knn.py": of_groups(judging.KNN_GROUPS),
        "moco_isl.evaluation.detection": of_groups(detecting.GROUPS),
        "moco_isl.mine": of_groups(mine.GROUPS),
        "moco_isl.transfer": of_groups(transfer.GROUPS),
        "moco_isl.embed": of_groups(embedding.GROUPS),
    }
    parts = [HEAD]
    shown: Tables = {}
    for script, tables in scripts.items():
        parts.append(f"## {script}\n")
        again = [title for title, flags in tables.items() if shown.get(title) == flags]
        if again:
            links = ", ".join(f"[{title}](#{title.replace(' ', '-')})" for title in again)
            parts.append(f"It takes these flags of above, too: {links}.\n")
        parts += [table(title, flags) for title, flags in tables.items() if title not in again]
        shown |= tables
    return "\n".join(parts)


def of_groups(groups: Groups) -> Tables:
    """The flags of dataclasses by group; what dataclasses of a group share is one flag."""
    by_name = lambda kinds: {flag.name: flag for kind in kinds for flag in flags_of(kind).values()}
    return {title: list(by_name(kinds).values()) for title, kinds in groups.items()}


def of_miners() -> Tables:
    """The flags of each miner that not all runs have."""
    common = {flag.name for kind in training.KINDS for flag in flags_of(kind).values()}
    return {
        f"--miner {name}": [flag for flag in flags_of(kind).values() if flag.name not in common]
        for name, kind in MINERS.items()
        if flags_of(kind)
    }


def table(title: str, flags: list[Flag]) -> str:
    lines = [f"### {title}", "", *COLUMNS]
    for flag in flags:
        names = ", ".join(f"`{name}`" for name in flag.names)
        if flag.metavar and not flag.names[0].startswith("-"):
            names = f"`{flag.metavar}`"
        resume = "yes" if flag.may_change else ""
        cells = [names, *map(plain, (flag.default_text, flag.range, resume, flag.help))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def plain(text: str) -> str:
    """A text such that Markdown sees neither a cell's end nor HTML in it."""
    return text.replace("|", r"\|").replace("<", "&lt;")


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(page())
