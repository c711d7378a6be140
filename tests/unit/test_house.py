"""The house's own rules that no linter knows: no circle of imports, those for type checking included."""

from __future__ import annotations

from collections.abc import Iterator

import grimp

ROOMS = ("app", "deployments", "cluster")


def circles(graph: grimp.ImportGraph) -> Iterator[list[str]]:
    """The strongly connected components of more than one module (Tarjan, SIAM J. Comput. 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        index[module] = low[module] = len(index)
        stack.append(module)
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            if imported not in index:
                yield from visit(imported)
                low[module] = min(low[module], low[imported])
            elif imported in stack:
                low[module] = min(low[module], index[imported])
        if low[module] == index[module]:
            members = []
            while not members or members[-1] != module:
                members.append(stack.pop())
            if len(members) > 1:
                yield sorted(members)

    for module in sorted(graph.modules):
        if module not in index:
            yield from visit(module)


def test_no_circle_of_imports():
    graph = grimp.build_graph(*ROOMS, cache_dir=None)
    assert list(circles(graph)) == []


def test_a_circle_would_be_found():
    graph = grimp.ImportGraph()
    for importer, imported in [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]:
        graph.add_import(importer=importer, imported=imported)
    assert list(circles(graph)) == [["a", "b", "c"]]
