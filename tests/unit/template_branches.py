"""Which branches of Jinja templates are rendered: each is marked where it begins when it is compiled.

A branch is the body of an ``if``, of its ``elif`` and ``else`` (also where it is not written), the body and
the ``else`` of a ``for``, each side of a conditional expression, and the body of a macro.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, nodes

_MARK = f"{__name__}.rendered"
_seen: set[str] = set()


def rendered(branch: str, value: Any = "") -> Any:
    """Note that a branch is rendered; called by the compiled templates."""
    _seen.add(branch)
    return value


class WatchedEnvironment(Environment):
    """Compiles templates so that they say which branches they render.

    Attributes:
        branches: All branches of the templates that were compiled: template, line, kind.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.branches: set[str] = set()
        _seen.clear()

    def unseen(self) -> list[str]:
        """Return the branches that were never rendered, in order."""
        return sorted(self.branches - _seen)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        ends = {id(one) for node in template.find_all(nodes.If) for one in node.elif_}
        for node in list(template.find_all((nodes.If, nodes.For, nodes.CondExpr, nodes.Macro))):
            self._watch(str(name), node, ends)
        return template

    def _watch(self, name: str, node: nodes.Node, ends: set[int]) -> None:
        place = f"{name}:{node.lineno:03}"
        if isinstance(node, nodes.CondExpr):
            node.expr1 = self._call(f"{place} yes of {_text(node.test)}", node.lineno, node.expr1)
            if node.expr2 is not None:
                node.expr2 = self._call(f"{place} no of {_text(node.test)}", node.lineno, node.expr2)
            return
        if isinstance(node, nodes.If):
            node.body = [self._mark(f"{place} if {_text(node.test)}", node.lineno), *node.body]
            if id(node) not in ends:
                node.else_ = [self._mark(f"{place} else of {_text(node.test)}", node.lineno), *node.else_]
        elif isinstance(node, nodes.For):
            node.body = [self._mark(f"{place} for", node.lineno), *node.body]
            if node.else_:
                node.else_ = [self._mark(f"{place} else of for", node.lineno), *node.else_]
        elif isinstance(node, nodes.Macro):
            node.body = [self._mark(f"{place} macro {node.name}", node.lineno), *node.body]

    def _mark(self, branch: str, line: int) -> nodes.Node:
        return nodes.ExprStmt(self._call(branch, line), lineno=line)

    def _call(self, branch: str, line: int, *arguments: nodes.Expr) -> nodes.Call:
        self.branches.add(branch)
        function = nodes.ImportedName(_MARK, lineno=line)
        named = [nodes.Const(branch, lineno=line), *arguments]
        return nodes.Call(function, named, [], None, None, lineno=line)


def _text(test: nodes.Node) -> str:
    """Return a condition's own spelling, shortened; lines may hold several conditions."""
    return str(test)[:300]
