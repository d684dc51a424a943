"""The proof kernel: what a theorem of layer 2 is, and the only ways to obtain one.

A `Theorem` is a formula about real numbers, integers and sequences (maps from integers to reals) that holds for all
values of its free variables. Nothing outside this file can make one. The rules:

    arithmetic      a consequence of known theorems by arithmetic of real numbers, checked by z3
    propositional   a consequence of known theorems by "and", "or", "not", "implies" alone, checked by z3
    induction       P(0) and P(k) -> P(k + 1) give P(n) for all n >= 0
    sum_empty       sum(f, 0) = 0                         } the definition of a finite sum,
    sum_next        sum(f, n + 1) = sum(f, n) + f(n)      } f(0) + ... + f(n - 1)
    generalize      a free variable may be named in a "for all"
    theorem(...)    "for all x, P(x)" gives P(a)
    specialize      "(for all x, P(x)) implies P(a)"
    generalize_conclusion   A -> P(x), where A does not mention x, gives A -> (for all x, P(x))

What must be trusted: this file, z3's `simplify` and `substitute`, and its answers "unsatisfiable" to questions of real
arithmetic without quantifiers. The last are asked again of cvc5 (`second_opinion.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

try:
    import z3
except ModuleNotFoundError:  # the extra `proofs`; layer 1 works without
    z3 = None

Formula = Any
"""a z3 term or formula"""

_KEY = object()
_TIMEOUT_MS = 5_000
"""for one obligation; those in use take less than a tenth of a second"""


class Refused(ValueError):
    """A rule was applied where it does not apply; or the solver found a counterexample or gave up."""


class Theorem:
    """A proved formula. Immutable, and made by the rules of this module only.

    Raises `TypeError` for anybody else.
    """

    __slots__ = ("obligation", "parents", "rule", "statement")

    statement: Formula
    rule: str
    parents: tuple[Theorem, ...]
    obligation: str | None

    def __init__(
        self,
        key: object,
        statement: Formula,
        rule: str,
        parents: tuple[Theorem, ...] = (),
        obligation: str | None = None,
    ) -> None:
        if key is not _KEY:
            raise TypeError("a theorem comes from the rules of proofs.logic, and from nowhere else")
        for name, value in (("statement", statement), ("rule", rule), ("parents", parents), ("obligation", obligation)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a theorem does not change")

    def __repr__(self) -> str:
        return f"|- {self.statement}"

    def __call__(self, *values: Formula) -> Theorem:
        """The statement with `values` for the variables of its leading "for all"."""
        return Theorem(_KEY, _instance(self.statement, values), "instance", (self,))


def _instance(statement: Formula, values: tuple[Formula, ...]) -> Formula:
    if not (z3.is_quantifier(statement) and statement.is_forall() and len(values) == statement.num_vars()):
        raise Refused(f"{len(values)} values for {statement}")
    cast = [_cast(v, statement.var_sort(i)) for i, v in enumerate(values)]
    return z3.substitute_vars(statement.body(), *reversed(cast))


def _cast(value: Formula, sort: Formula) -> Formula:
    if not z3.is_expr(value):
        value = z3.RealVal(value) if sort == z3.RealSort() else z3.IntVal(value)
    if value.sort() != sort:
        raise Refused(f"{value} is no {sort}")
    return value


# ---- the language -----------------------------------------------------------------------------------------------

INT: Any = None
REAL: Any = None
BOOL: Any = None
SEQUENCE: Any = None
MATRIX: Any = None
TENSOR: Any = None
SUM: Any = None
EXP: Any = None
SQRT: Any = None
if z3 is not None:
    INT, REAL, BOOL = z3.IntSort(), z3.RealSort(), z3.BoolSort()
    SEQUENCE = z3.ArraySort(INT, REAL)
    MATRIX = z3.ArraySort(INT, SEQUENCE)
    TENSOR = z3.ArraySort(INT, MATRIX)
    SUM = z3.Function("sum", SEQUENCE, INT, REAL)
    EXP = z3.Function("exp", REAL, REAL)
    SQRT = z3.Function("sqrt", REAL, REAL)

_variables: dict[int, Formula] = {}


def variables(names: str, sort: Formula) -> list[Formula]:
    """New free variables, one for each word; they may be generalized, nothing else may."""
    made = [z3.FreshConst(sort, prefix=name) for name in names.split()]
    _variables.update((v.get_id(), v) for v in made)
    return made


def variable(name: str, sort: Formula) -> Formula:
    """One new free variable."""
    return variables(name, sort)[0]


_children: dict[int, tuple[Formula, list[Formula]]] = {}
_free: dict[int, tuple[Formula, frozenset[int]]] = {}
# caches are keyed by the identity of a term and hold the term, so that its identity is not given to another


def children(t: Formula) -> list[Formula]:
    """The arguments of a term, or the body of a binder."""
    known = _children.get(t.get_id())
    if known is None:
        known = _children[t.get_id()] = (t, [t.body()] if z3.is_quantifier(t) else t.children())
    return known[1]


def constants(t: Formula) -> frozenset[int]:
    """The identities of all constants (variables, numerals) mentioned in a term."""
    known = _free.get(t.get_id())
    if known is None:
        parts = children(t)
        own = frozenset() if parts or z3.is_var(t) else frozenset({t.get_id()})
        known = _free[t.get_id()] = (t, own.union(*map(constants, parts)))
    return known[1]


def occurs(variable: Formula, term: Formula) -> bool:
    """Whether a free variable is mentioned in a term."""
    return variable.get_id() in constants(term)


# ---- rules ------------------------------------------------------------------------------------------------------


def generalize(theorem: Theorem, *over: Formula) -> Theorem:
    """|- P(x) gives |- for all x, P(x).

    Raises `Refused` for what is no variable.
    """
    for v in over:
        if v.get_id() not in _variables:
            raise Refused(f"{v} is not a variable")
    return Theorem(_KEY, z3.ForAll(list(over), theorem.statement), "generalize", (theorem,)) if over else theorem


def generalize_conclusion(theorem: Theorem, over: Formula) -> Theorem:
    """|- A -> P(x), x not in A, gives |- A -> (for all x, P(x)).

    Raises `Refused` for another form, or a premise that mentions x.
    """
    if not z3.is_implies(theorem.statement) or over.get_id() not in _variables:
        raise Refused(f"no implication about a variable {over}: {theorem}")
    premise, conclusion = theorem.statement.children()
    if occurs(over, premise):
        raise Refused(f"{over} is mentioned in the premise {premise}")
    return Theorem(_KEY, z3.Implies(premise, z3.ForAll([over], conclusion)), "generalize_conclusion", (theorem,))


def specialize(forall: Formula, *values: Formula) -> Theorem:
    """|- (for all x, P(x)) -> P(values)."""
    return Theorem(_KEY, z3.Implies(forall, _instance(forall, values)), "specialize")


def sum_empty(f: Formula) -> Theorem:
    """|- sum(f, 0) = 0."""
    return Theorem(_KEY, SUM(f, z3.IntVal(0)) == 0, "definition of sum")


def sum_next(f: Formula, n: Formula) -> Theorem:
    """|- n >= 0 -> sum(f, n + 1) = sum(f, n) + f(n)."""
    return Theorem(_KEY, z3.Implies(n >= 0, SUM(f, n + 1) == SUM(f, n) + f[n]), "definition of sum")


def induction(n: Formula, statement: Formula, base: Theorem, step: Theorem) -> Theorem:
    """From |- P(0) and |- n >= 0 and P(n) -> P(n + 1): |- n >= 0 -> P(n).

    Raises `Refused` for theorems of another form.
    """
    if n.get_id() not in _variables:
        raise Refused(f"{n} is not a variable")
    if not base.statement.eq(z3.substitute(statement, (n, z3.IntVal(0)))):
        raise Refused(f"not the base of {statement}: {base}")
    if not step.statement.eq(z3.Implies(z3.And(n >= 0, statement), z3.substitute(statement, (n, n + 1)))):
        raise Refused(f"not the step of {statement}: {step}")
    return Theorem(_KEY, z3.Implies(n >= 0, statement), "induction", (base, step))


def arithmetic(goal: Formula, *facts: Theorem) -> Theorem:
    """|- goal, because `facts` and not goal contradict each other by real arithmetic alone.

    Raises `Refused` for facts that are no theorems, or where they do not.
    """
    for fact in facts:
        if not isinstance(fact, Theorem):
            raise Refused(f"not a theorem: {fact}")
    abstract = _Abstraction()
    claims = [abstract(canonical(t)) for t in (*(f.statement for f in facts), z3.Not(goal))]
    claims += abstract.congruences()
    answer, text = _contradiction(claims)
    if answer != z3.unsat:
        raise Refused(f"not proved ({answer}): {goal}")
    return Theorem(_KEY, goal, "arithmetic", facts, text)


def propositional(goal: Formula, *facts: Theorem) -> Theorem:
    """|- goal, from `facts` by propositional logic: what stands between the connectives is taken as it is.

    Raises `Refused` for facts that are no theorems, or where it does not follow.
    """
    if not all(isinstance(fact, Theorem) for fact in facts):
        raise Refused("not a theorem")
    atoms: dict[int, Formula] = {}

    def outline(t: Formula) -> Formula:
        if not z3.is_quantifier(t) and t.decl().kind() in _CONNECTIVES:
            return rebuild(t, [outline(c) for c in children(t)])
        plain = canonical(t)
        return atoms.setdefault(plain.get_id(), z3.FreshConst(BOOL, prefix="atom"))

    answer, text = _contradiction([*(outline(f.statement) for f in facts), z3.Not(outline(goal))])
    if answer != z3.unsat:
        raise Refused(f"does not follow: {goal}")
    return Theorem(_KEY, goal, "propositional", facts, text)


def _contradiction(claims: list[Formula]) -> tuple[Any, str]:
    text = ""
    for make in (z3.Solver, lambda: z3.Then("simplify", "solve-eqs", "qfnra-nlsat").solver()):
        solver = make()
        solver.set("timeout", _TIMEOUT_MS)
        solver.add(*claims)
        text = text or solver.to_smt2()
        try:
            answer = solver.check()
        except z3.Z3Exception:
            answer = z3.unknown
        if answer != z3.unknown:
            break
    return answer, text


# ---- from formulas to plain arithmetic --------------------------------------------------------------------------

_bound: list[Formula] = []
_canonical: dict[int, tuple[Formula, Formula, int]] = {}


def canonical(term: Formula) -> Formula:
    """The same term simplified, its bound variables named by nesting depth: equal up to names becomes equal."""
    return _rename(z3.simplify(_rename(term)[0]))[0]


def _rename(term: Formula) -> tuple[Formula, int]:
    """The renamed term and its nesting depth."""
    known = _canonical.get(term.get_id())
    if known is None:
        known = _canonical[term.get_id()] = (term, *_renamed(term))  # holding `term` keeps its id from being reused
    return known[1], known[2]


def _renamed(t: Formula) -> tuple[Formula, int]:
    if z3.is_quantifier(t):
        return _renamed_binder(t)
    if not children(t):
        return t, 0
    parts = [_rename(child) for child in children(t)]
    unchanged = all(new.get_id() == old.get_id() for (new, _), old in zip(parts, children(t), strict=True))
    return (t if unchanged else rebuild(t, [new for new, _ in parts])), max(depth for _, depth in parts)


def _renamed_binder(t: Formula) -> tuple[Formula, int]:
    own = [z3.FreshConst(t.var_sort(i), prefix="b") for i in range(t.num_vars())]
    body, depth = _rename(z3.substitute_vars(t.body(), *reversed(own)))
    if t.is_lambda() and z3.is_select(body) and body.arg(1).eq(own[0]) and not occurs(own[0], body.arg(0)):
        return body.arg(0), depth  # the sequence i -> f(i) is f
    names = [_bound_variable(depth, i, v.sort()) for i, v in enumerate(own)]
    body = z3.substitute(body, *zip(own, names, strict=True))
    binder = z3.Lambda if t.is_lambda() else z3.ForAll if t.is_forall() else z3.Exists
    return binder(names, body), depth + 1


_names: dict[tuple[int, int, str], Formula] = {}


def _bound_variable(depth: int, position: int, sort: Formula) -> Formula:
    key = (depth, position, str(sort))
    if key not in _names:
        _names[key] = z3.FreshConst(sort, prefix=f"bound{depth}")  # fresh: nobody can have it free in a formula
    return _names[key]


def rebuild(t: Formula, arguments: list[Formula]) -> Formula:
    """The operation of `t` on other arguments."""
    kind = t.decl().kind()
    if kind == z3.Z3_OP_AND:
        return z3.And(*arguments)
    if kind == z3.Z3_OP_OR:
        return z3.Or(*arguments)
    if kind == z3.Z3_OP_ADD:
        return z3.Sum(*arguments)
    if kind == z3.Z3_OP_MUL:
        return z3.Product(*arguments)
    return t.decl()(*arguments)


class _Abstraction:
    """Replaces every term that is not arithmetic (a sum, an element, a "for all") by a plain variable.

    To prove the more general statement is enough. Two replaced terms that differ in their arguments only are equal
    where the arguments are; `congruences` says so. A quotient x / d is x times the inverse of d, a number of which only
    d inverse = 1 is known, and that only where d is not zero: nothing can be proved about a division by zero.
    """

    def __init__(self) -> None:
        self.done: dict[int, tuple[Formula, Formula]] = {}  # holding the term keeps its id from being reused
        self.heads: dict[Any, list[tuple[list[Formula], Formula]]] = {}
        self.inverses: dict[int, tuple[Formula, Formula]] = {}

    def __call__(self, t: Formula) -> Formula:
        if t.get_id() not in self.done:
            self.done[t.get_id()] = (t, self._replaced(t))
        return self.done[t.get_id()][1]

    def _replaced(self, t: Formula) -> Formula:
        if z3.is_quantifier(t):
            return z3.FreshConst(BOOL, prefix="fact")
        parts = children(t)
        if not parts and _is_number(t):
            return t
        if t.decl().kind() == z3.Z3_OP_DIV and not z3.is_rational_value(parts[1]):
            return self(parts[0]) * self._inverse(self(parts[1]))
        if parts and t.decl().kind() in _ARITHMETIC and all(map(_is_number, parts)):
            return rebuild(t, [self(c) for c in parts])
        name = z3.FreshConst(t.sort(), prefix="x")
        head, arguments = _head(t)
        self.heads.setdefault(head, []).append(([self(a) for a in arguments], name))
        return name

    def _inverse(self, d: Formula) -> Formula:
        known = self.inverses.get(d.get_id())
        if known is None:
            known = self.inverses[d.get_id()] = (d, z3.FreshConst(REAL, prefix="inverse"))
            self.heads.setdefault("inverse", []).append(([d], known[1]))
        return known[1]

    def congruences(self) -> Iterator[Formula]:
        for d, inverse in self.inverses.values():
            yield z3.Or(d == 0, d * inverse == 1)
        for same in self.heads.values():
            for i, (xs, x) in enumerate(same):
                for ys, y in same[:i]:
                    equal = [z3.simplify(a == b) for a, b in zip(xs, ys, strict=True)]
                    if not any(z3.is_false(e) for e in equal):
                        yield z3.Implies(z3.And(*equal), x == y)


def _head(t: Formula) -> tuple[Any, list[Formula]]:
    """What stays fixed and what varies: f(i)(j) is f at (i, j), sum(f, n) is sum(f) at n, exp(x) is exp at x."""
    if z3.is_select(t):
        head, arguments = _head(t.arg(0)) if z3.is_select(t.arg(0)) else (("element", t.arg(0).get_id()), [])
        return head, [*arguments, t.arg(1)]
    if z3.is_app(t) and t.decl().eq(SUM):
        return ("sum", t.arg(0).get_id()), [t.arg(1)]
    if children(t) and all(map(_is_number, children(t))):
        return ("function", t.decl().get_id()), children(t)
    return ("opaque", t.get_id()), []


def _is_number(t: Formula) -> bool:
    """A real number, an integer or a truth value, in contrast to a sequence."""
    return t.sort_kind() in (z3.Z3_REAL_SORT, z3.Z3_INT_SORT, z3.Z3_BOOL_SORT)


_CONNECTIVES = frozenset(getattr(z3, f"Z3_OP_{name}", -1) for name in ("AND", "OR", "NOT", "IMPLIES"))
_ARITHMETIC = frozenset(
    getattr(z3, f"Z3_OP_{name}", -1)
    for name in [
        "TRUE",
        "FALSE",
        "EQ",
        "DISTINCT",
        "ITE",
        "AND",
        "OR",
        "NOT",
        "IMPLIES",
        "ANUM",
        "LE",
        "GE",
        "LT",
        "GT",
        "ADD",
        "SUB",
        "UMINUS",
        "MUL",
        "DIV",
        "TO_REAL",
    ]
)


def ancestry(theorem: Theorem) -> Iterator[Theorem]:
    """The theorem and everything it was derived from, each once."""
    todo, seen = [theorem], set()
    while todo:
        t = todo.pop()
        if id(t) not in seen:
            seen.add(id(t))
            yield t
            todo.extend(t.parents)


def obligations(theorem: Theorem) -> set[str]:
    """Every question that a solver answered for this theorem, as SMT-LIB text: what cvc5 is asked again."""
    return {t.obligation for t in ancestry(theorem) if t.obligation}
