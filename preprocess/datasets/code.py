"""Which files of code a user's dataset consists of: its own, and those that it imports from beside.

A class of `file.py` may import modules of the same folder, one of `package.module` those of its
package. Both are found from the import statements, wherever in a file these are, without running
anything; what comes from elsewhere (the standard library, installed packages) is not looked at.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

_OURS = ("preprocess", "vlm_shards")
"""Modules of these packages count as themselves only: a change of one changes one dataset."""


def code_beside(path: Path, module: str) -> list[Path]:
    """Lists the files that a file of Python imports from beside it, and they again; sorted.

    Args:
      path: The file.
      module: The name that it was imported by, "package.module" or the one of a file alone.
    """
    top = module.partition(".")[0]
    if top in _OURS:
        return []
    depth = module.count(".") + (path.name == "__init__.py")
    root = path.parents[depth] if depth < len(path.parents) else path.parent
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        for name in _imports(file, root):
            if depth and name.partition(".")[0] != top:
                continue
            # `import a.b.c` runs a and a.b too.
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                base = root.joinpath(*parts[:end])
                for each in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
                    if each not in found and each != path and each.is_file():
                        found.add(each)
                        waiting.append(each)
    return sorted(found)


def _imports(file: Path, root: Path) -> Iterator[str]:
    """Gives the dotted names that a file imports, from `root` on."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # what cannot be read fails where it is imported
        return
    package = file.parent.relative_to(root).parts if file.is_relative_to(root) else ()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield base
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)
