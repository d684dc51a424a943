"""Working with finite sums: the steps that proofs are made of, each built from the rules of `logic.py`.

Nothing here is trusted: a mistake makes a proof fail, never a false theorem pass.

`expand` does what a reader does without thinking: multiply out under a sum, and pull out what does not depend on the
index, as in  sum_i p_i (R_i - b)^2 = sum_i p_i R_i^2 - 2 b sum_i p_i R_i + b^2 sum_i p_i. `prove` expands every
sum it meets and leaves the rest, plain arithmetic in a few sums, to the solver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache

from proofs.logic import (
    BOOL,
    INT,
    MATRIX,
    REAL,
    SEQUENCE,
    SUM,
    Formula,
    Refused,
    Theorem,
    arithmetic,
    canonical,
    children,
    generalize,
    induction,
    occurs,
    sum_empty,
    sum_next,
    variable,
    variables,
    z3,
)

# ---- writing formulas -------------------------------------------------------------------------------------------


def sequence(element: Callable[[Formula], Formula]) -> Formula:
    """The sequence i -> element(i)."""
    i = z3.FreshInt("i")
    return z3.Lambda([i], element(i))


def total(element: Callable[[Formula], Formula], length: Formula) -> Formula:
    """element(0) + ... + element(length - 1)."""
    return SUM(sequence(element), length)


def both(*formulas: Formula) -> Formula:
    """All of them hold."""
    return z3.And(*formulas)


def implies(premise: Formula, conclusion: Formula) -> Formula:
    """premise -> conclusion."""
    return z3.Implies(premise, conclusion)


def every(statement: Callable[[Formula], Formula], length: Formula) -> Formula:
    """statement(i) for all 0 <= i < length."""
    i = z3.FreshInt("i")
    return z3.ForAll([i], z3.Implies(z3.And(i >= 0, i < length), statement(i)))


# ---- polynomials in atoms ---------------------------------------------------------------------------------------

MonomialTerms = tuple[Formula, ...]


@dataclass
class _Polynomial:
    """sum of coefficient times product of atoms; atoms are terms that arithmetic does not look into."""

    terms: dict[tuple[int, ...], tuple[Fraction, MonomialTerms]] = field(default_factory=dict)

    def add(self, coefficient: Fraction, monomial: MonomialTerms) -> None:
        ordered = tuple(sorted(monomial, key=_name))
        key = tuple(a.get_id() for a in ordered)
        value = self.terms.pop(key, (Fraction(0), ordered))[0] + coefficient
        if value:
            self.terms[key] = (value, ordered)

    def plus(self, other: _Polynomial, scale: Fraction = Fraction(1)) -> _Polynomial:
        out = _Polynomial(dict(self.terms))
        for c, m in other.terms.values():
            out.add(scale * c, m)
        return out

    def times(self, other: _Polynomial) -> _Polynomial:
        out = _Polynomial()
        for c, m in self.terms.values():
            for d, n in other.terms.values():
                out.add(c * d, m + n)
        return out


@cache
def _sexpr(key: int, atom: Formula) -> str:
    return atom.sexpr()


def _name(atom: Formula) -> str:
    return _sexpr(atom.get_id(), atom)


def _value(t: Formula) -> Fraction:
    return Fraction(t.as_string())


def _is_one(t: Formula) -> bool:
    return z3.is_rational_value(t) and _value(t) == 1


def _constant(value: Fraction) -> _Polynomial:
    return _Polynomial({(): (value, ())} if value else {})


def _product(factors: Iterable[Formula]) -> Formula:
    out = None
    for f in factors:
        out = f if out is None else out * f
    return z3.RealVal(1) if out is None else out


# ---- expansion --------------------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Reads a term as a polynomial, collecting on the way the facts used and the conditions they need.

    `bound` are the indices that conditions must not mention.
    """

    bound: tuple[Formula, ...]
    facts: list[Theorem] = field(default_factory=list)
    conditions: list[Formula] = field(default_factory=list)

    def read(self, t: Formula) -> _Polynomial:
        kind = t.decl().kind()
        if z3.is_rational_value(t) or z3.is_int_value(t):
            return _constant(_value(t))
        if kind == z3.Z3_OP_TO_REAL and z3.is_int_value(t.arg(0)):
            return _constant(Fraction(t.arg(0).as_long()))
        if kind == z3.Z3_OP_ADD:
            return self._fold(children(t), Fraction(1))
        if kind == z3.Z3_OP_SUB:
            return self.read(t.arg(0)).plus(self._fold(children(t)[1:], Fraction(1)), Fraction(-1))
        if kind == z3.Z3_OP_UMINUS:
            return self._fold(children(t), Fraction(-1))
        if kind == z3.Z3_OP_MUL:
            out = _constant(Fraction(1))
            for child in children(t):
                out = out.times(self.read(child))
            return out
        if kind == z3.Z3_OP_DIV:
            return self._quotient(t)
        if kind == z3.Z3_OP_ITE:
            return self._choice(t)
        if t.decl().eq(SUM):
            return self._sum(t)
        return _Polynomial({(t.get_id(),): (Fraction(1), (t,))})

    def _atom(self, t: Formula) -> _Polynomial:
        return _Polynomial({(t.get_id(),): (Fraction(1), (t,))})

    def _fold(self, terms: list[Formula], sign: Fraction) -> _Polynomial:
        out = _Polynomial()
        for t in terms:
            out = out.plus(self.read(t), sign)
        return out

    def _outer(self, t: Formula) -> bool:
        return not any(occurs(i, t) for i in self.bound)

    def _quotient(self, t: Formula) -> _Polynomial:
        """x / d is x times 1/d."""
        x, d = children(t)
        inverse = _constant(1 / _value(d)) if z3.is_rational_value(d) else self._atom(z3.RealVal(1) / d)
        return inverse if _is_one(x) else self.read(x).times(inverse)

    def _choice(self, t: Formula) -> _Polynomial:
        """(where d = 0: a, else: b) is b, on condition d != 0, if d does not vary."""
        test = t.arg(0)
        if z3.is_eq(test) and test.arg(0).sort() == REAL and self._outer(test):
            self.conditions.append(z3.Not(test))
            return self.read(t.arg(2))
        return self._atom(t)

    def _sum(self, t: Formula) -> _Polynomial:
        inner = expansion(t, self.bound)
        if inner.theorem is not None:
            self.facts.append(inner.theorem)
        self.conditions.extend(inner.conditions)
        return inner.polynomial


@dataclass(frozen=True)
class Expansion:
    """|- conditions -> sum = polynomial in simpler sums."""

    polynomial: _Polynomial
    conditions: tuple[Formula, ...]
    theorem: Theorem | None
    """None where the sum is as simple as it gets"""


_known: dict[tuple[int, ...], tuple[Formula, Expansion]] = {}


def expansion(term: Formula, bound: tuple[Formula, ...] = ()) -> Expansion:
    """What sum(f, n) is, multiplied out, with everything that does not depend on the index pulled out."""
    term = canonical(term)
    key = (term.get_id(), *(i.get_id() for i in bound))
    if key not in _known:
        _known[key] = (term, _expand(term, bound))
    return _known[key][1]


def _expand(term: Formula, bound: tuple[Formula, ...]) -> Expansion:
    f, length = term.children()
    k = _index(len(bound), f)
    reader = _Reader((*bound, k))
    body = reader.read(canonical(f[k]))
    parts = [_split(c, m, k) for c, m in body.terms.values()]
    sums = {inner.get_id(): inner for _, inner in parts if inner is not None}
    out = _Polynomial()
    for outer, inner in parts:
        simple = canonical(SUM(inner, length)) if inner is not None else z3.ToReal(length)
        out.add(outer[0], (*outer[1], simple))
    if not reader.conditions and len(out.terms) == 1:
        ((coefficient, monomial),) = out.terms.values()
        if coefficient == 1 and len(monomial) == 1 and monomial[0].eq(term):
            return Expansion(out, (), None)
    conditions = tuple(reader.conditions)
    right = _sum_of(
        [
            _product([_number(outer[0]), *outer[1], SUM(inner, k) if inner is not None else z3.ToReal(k)])
            for outer, inner in parts
        ]
    )
    statement = z3.Implies(_all(conditions), SUM(f, k) == right)
    every_sum = [f, *sums.values()]
    base = arithmetic(z3.substitute(statement, (k, z3.IntVal(0))), *map(sum_empty, every_sum))
    step = arithmetic(_step(k, statement), *(sum_next(g, k) for g in every_sum), *reader.facts)
    theorem = generalize(induction(k, statement, base, step), k)(length)
    return Expansion(out, (*conditions, length >= 0), theorem)


_indices: list[Formula] = []


def _index(level: int, f: Formula) -> Formula:
    """The index of sums at a nesting level: always the same, so that what is known of an inner sum is found again."""
    while len(_indices) <= level:
        _indices.append(variable("k", INT))
    return variable("k", INT) if occurs(_indices[level], f) else _indices[level]


def _split(c: Fraction, monomial: MonomialTerms, k: Formula) -> tuple[tuple[Fraction, MonomialTerms], Formula | None]:
    """A monomial as (what does not depend on k) and (the sequence of what does)."""
    inner = [a for a in monomial if occurs(k, a)]
    outer = tuple(a for a in monomial if not occurs(k, a))
    if not inner:
        return (c, outer), None
    i = z3.FreshInt("i")
    return (c, outer), canonical(z3.Lambda([i], z3.substitute(_product(inner), (k, i))))


def _number(value: Fraction) -> Formula:
    return z3.RealVal(f"{value.numerator}/{value.denominator}")


def _all(conditions: Iterable[Formula]) -> Formula:
    kept = list(conditions)
    return z3.And(*kept) if kept else z3.BoolVal(True)


def _sum_of(terms: list[Formula]) -> Formula:
    return z3.Sum(*terms) if len(terms) > 1 else terms[0] if terms else z3.RealVal(0)


def _step(n: Formula, statement: Formula) -> Formula:
    return z3.Implies(z3.And(n >= 0, statement), z3.substitute(statement, (n, n + 1)))


# ---- proofs -----------------------------------------------------------------------------------------------------


def prove(goal: Formula, *facts: Theorem, over: Iterable[Formula] = ()) -> Theorem:
    """|- goal, from `facts` and the expansion of every sum in sight; then for all `over`."""
    expansions: dict[int, Theorem] = {}
    todo = [canonical(t) for t in (goal, *(f.statement for f in facts))]
    seen: set[int] = set()
    while todo:
        t = todo.pop()
        if t.get_id() in seen or z3.is_quantifier(t):
            continue
        seen.add(t.get_id())
        todo.extend(children(t))
        if t.decl().eq(SUM):
            found = expansion(t)
            if found.theorem is not None:
                expansions[t.get_id()] = found.theorem
                todo.append(canonical(found.theorem.statement))
    return generalize(arithmetic(goal, *facts, *expansions.values()), *over)


def sums_of_length(statement: Formula, n: Formula) -> list[Formula]:
    """The sequences f of the terms sum(f, n) in a statement."""
    found: dict[int, Formula] = {}
    todo, seen = [statement], set()
    while todo:
        t = todo.pop()
        if t.get_id() in seen or z3.is_quantifier(t):
            continue
        seen.add(t.get_id())
        if t.decl().eq(SUM) and t.arg(1).eq(n):
            found[t.arg(0).get_id()] = t.arg(0)
        todo.extend(children(t))
    return list(found.values())


def induct(
    statement: Callable[[Formula], Formula],
    *,
    over: Iterable[Formula] = (),
    base: Iterable[Theorem] = (),
    step: Callable[[Formula], Iterable[Theorem]] = lambda k: (),
    expand: bool = False,
) -> Theorem:
    """|- for all `over` and n, n >= 0 -> statement(n); the sums in the statement unroll by themselves.

    `expand` has the sums inside the statement's sums multiplied out, too.
    """
    n = variable("n", INT)
    claim = statement(n)
    sums = sums_of_length(claim, n)
    conclude = prove if expand else arithmetic
    first = conclude(z3.substitute(claim, (n, z3.IntVal(0))), *map(sum_empty, sums), *base)
    then = conclude(_step(n, claim), *(sum_next(f, n) for f in sums), *step(n))
    return generalize(induction(n, claim, first, then), *over, n)


def pointwise(
    f: Formula,
    g: Formula,
    length: Formula,
    *,
    by: Callable[[Formula], Iterable[Theorem]] = lambda i: (),
    given: Formula | None = None,
    expand: bool = True,
) -> Theorem:
    """|- given and length >= 0 -> sum(f) = sum(g), because f(i) = g(i) for 0 <= i < length (if `given`)."""
    given = z3.BoolVal(True) if given is None else given
    i = variable("i", INT)
    conclude = prove if expand else arithmetic
    same = generalize(conclude(z3.Implies(z3.And(given, i >= 0, i < length), f[i] == g[i]), *by(i)), i)
    rule = induct(
        lambda n: z3.Implies(z3.And(given, n <= length), SUM(f, n) == SUM(g, n)),
        step=lambda k: [same(k)],
    )
    return arithmetic(z3.Implies(z3.And(given, length >= 0), SUM(f, length) == SUM(g, length)), rule(length))


def nonnegative(
    f: Formula,
    length: Formula,
    *,
    by: Callable[[Formula], Iterable[Theorem]] = lambda i: (),
    given: Formula | None = None,
) -> Theorem:
    """|- given and length >= 0 -> sum(f) >= 0, because f(i) >= 0 for 0 <= i < length (if `given`)."""
    given = z3.BoolVal(True) if given is None else given
    i = variable("i", INT)
    each = generalize(prove(z3.Implies(z3.And(given, i >= 0, i < length), f[i] >= 0), *by(i)), i)
    rule = induct(lambda n: z3.Implies(z3.And(given, n <= length), SUM(f, n) >= 0), step=lambda k: [each(k)])
    return arithmetic(z3.Implies(z3.And(given, length >= 0), SUM(f, length) >= 0), rule(length))


@cache
def delta() -> Theorem:
    """|- for all f, v, n >= 0: sum_i<n f(i) [i = v] = f(v) where 0 <= v < n, else 0."""
    f, v = variable("f", SEQUENCE), variable("v", INT)
    return induct(
        lambda n: (
            total(lambda i: f[i] * z3.If(i == v, z3.RealVal(1), z3.RealVal(0)), n)
            == z3.If(z3.And(v >= 0, v < n), f[v], z3.RealVal(0))
        ),
        over=[f, v],
    )


@cache
def exchange() -> Theorem:
    """|- for all a, n, m >= 0: sum_i<n sum_j<m a(i)(j) = sum_j<m sum_i<n a(i)(j)."""
    a, m = variable("a", MATRIX), variable("m", INT)
    row = lambda i: sequence(lambda j: a[i][j])  # noqa: E731
    left = sequence(lambda i: SUM(row(i), m))
    upto = lambda n: sequence(lambda j: total(lambda i: a[i][j], n))  # noqa: E731

    def base() -> list[Theorem]:
        zero = pointwise(
            upto(z3.IntVal(0)),
            sequence(lambda j: z3.RealVal(0)),
            m,
            by=lambda j: [sum_empty(sequence(lambda i: a[i][j]))],
        )
        return [zero, expansion(SUM(sequence(lambda j: z3.RealVal(0)), m)).theorem]

    def step(k: Formula) -> list[Theorem]:
        grown = sequence(lambda j: total(lambda i: a[i][j], k) + a[k][j])
        one_more = pointwise(
            upto(k + 1), grown, m, given=k >= 0, by=lambda j: [sum_next(sequence(lambda i: a[i][j]), k)]
        )
        return [one_more, expansion(SUM(grown, m)).theorem]

    return induct(lambda n: z3.Implies(m >= 0, SUM(left, n) == SUM(upto(n), m)), over=[a, m], base=base(), step=step)


__all__ = [
    "BOOL",
    "INT",
    "MATRIX",
    "REAL",
    "Refused",
    "both",
    "delta",
    "every",
    "exchange",
    "expansion",
    "implies",
    "induct",
    "nonnegative",
    "pointwise",
    "prove",
    "sequence",
    "total",
    "variables",
]
