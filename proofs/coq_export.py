"""The link between layer 3 and the code: Coq is given what the shipped functions compute, and checks it.

The shipped functions run on arrays whose elements are Coq *text*: adding two elements writes "(x + y)", a sum over
samples writes "(\\sum_(k < n.+1) ...)". `shipped_file` puts each result beside the definition of `coq/Vcposim.v` that the
theorems are about, as a lemma that the two are equal. If a shipped formula changes, the lemma is no longer true and Coq
says so.
"""
# ruff: noqa: E501 (statements and proofs in Coq)

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from proofs.symbolic import Algebra, Length, Parameter, SymbolicArray
from vcposim.arrays import expectation, namespace, sum_of_others
from vcposim.baselines import leverage, weighted_mean_of_others
from vcposim.batch import Batch, DenseScores
from vcposim.diagnostics import chi2_of_weights, ess_of_weights
from vcposim.estimators import Estimator
from vcposim.moments import batch_sums, trace_covariance
from vcposim.weights import Weighting


@dataclass(frozen=True)
class Text:
    """A Coq term."""

    text: str

    def _binary(self, op: str, other: Text) -> Text:
        return Text(f"({self.text} {op} {other.text})")

    def __add__(self, other: Text) -> Text:
        return self._binary("+", other)

    def __sub__(self, other: Text) -> Text:
        return self._binary("-", other)

    def __mul__(self, other: Text) -> Text:
        return self._binary("*", other)

    def __truediv__(self, other: Text) -> Text:
        return self._binary("/", other)


class CoqText:
    """Terms are Coq text over an ordered field; sums are big operators over ordinals."""

    def __init__(self) -> None:
        self.names = itertools.count()

    def number(self, value: Any) -> Text:
        """A rational constant, or the text of a parameter or length; floats are read in decimal."""
        if isinstance(value, Parameter):
            return value.term  # type: ignore[no-any-return]
        if isinstance(value, Length):
            return Text(f"{value.term}%:R")
        if isinstance(value, Text):
            return value
        exact = Fraction(str(value)) if isinstance(value, float) else Fraction(value)
        whole = Text(str(exact.numerator) if exact.numerator in (0, 1) else f"{exact.numerator}%:R")
        return whole if exact.denominator == 1 else whole / Text(f"{exact.denominator}%:R")

    def false(self) -> Text:
        """The boolean."""
        return Text("false")

    def first(self) -> str:
        """The ordinal 0."""
        return "ord0"

    def add(self, element: Callable[[Any], Text], length: Any) -> Text:
        """A big sum over `length` ordinals, under a bound name that is not used yet."""
        k = f"k{next(self.names)}"
        return Text(f"(\\sum_({k} < {length}) {element(k).text})")

    def add_before(self, element: Callable[[Any], Text], index: Any, length: Any) -> Text:
        """The big sum over ordinals below `index`."""
        k = f"k{next(self.names)}"
        return Text(f"(\\sum_({k} < {length} | ({k} < {index})%N) {element(k).text})")

    def mirrored(self, index: Any, length: Any) -> str:
        """MathComp's `rev_ord`."""
        return f"(rev_ord {index})"

    def where(self, test: Text, yes: Text, no: Text) -> Text:
        """An if."""
        return Text(f"(if {test.text} then {yes.text} else {no.text})")

    def minimum(self, x: Text, y: Text) -> Text:
        """`Num.min`."""
        return Text(f"(Num.min {x.text} {y.text})")

    def maximum(self, x: Text, y: Text) -> Text:
        """`Num.max`."""
        return Text(f"(Num.max {x.text} {y.text})")

    def power(self, x: Text, exponent: Any) -> Text:
        """A natural power."""
        return Text(f"({x.text} ^+ {exponent})")

    def compare(self, name: str, x: Text, y: Any) -> Text:
        """A boolean comparison; `name` is the operator."""
        return x._binary(name, y)

    def logic(self, name: str, x: Text, y: Text) -> Text:
        """A conjunction, the only connective that the shipped functions use."""
        return x._binary("&&", y)

    def exp(self, x: Text) -> Text:
        """Refused: an ordered field has none."""
        raise NotImplementedError("Coq text has no exp")

    def sqrt(self, x: Text) -> Text:
        """Refused: an ordered field has none."""
        raise NotImplementedError("Coq text has no square root")


ALGEBRA: Algebra = CoqText()
SAMPLES, COORDINATES = Length("n.+1"), Length("d")


def samples(name: str) -> SymbolicArray:
    """The array (n+1,) with elements `name k`."""
    return SymbolicArray(ALGEBRA, (SAMPLES,), lambda k: Text(f"({name} {k})"))


def scores(name: str) -> SymbolicArray:
    """The array (n+1, d) with elements `name k j`."""
    return SymbolicArray(ALGEBRA, (SAMPLES, COORDINATES), lambda k, j: Text(f"({name} {k} {j})"))


def scalar(text: str) -> SymbolicArray:
    """A Coq term as an array without axes."""
    return SymbolicArray(ALGEBRA, (), lambda: Text(text))


HEADER = """(* GENERATED by proofs/coq_export.py from the functions of vcposim: not to be edited. *)
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp Require Import ring.
From Proofs Require Import Vcposim.
Set Implicit Arguments. Unset Strict Implicit. Unset Printing Implicit Defensive.
Import GRing.Theory Num.Theory Order.Theory.
Local Open Scope ring_scope.
Section Shipped.
Variables (R : realFieldType) (n d : nat).
Variables (mu w r x : 'I_n.+1 -> R) (g : 'I_n.+1 -> 'I_d -> R) (b u c : R).
Lemma plus_same (y z : R) : (y + z == y) = (z == 0).
Proof. by rewrite -subr_eq0 addrC addKr. Qed.
"""


def _lemma(name: str, statement: str, proof: str) -> str:
    return f"\nLemma {name} : {statement}.\nProof.\n{proof}\nQed.\n"


def shipped_file() -> str:
    """The text of Shipped.v."""
    batch = Batch(
        reward=samples("r"), ratio=samples("w"), scores=DenseScores(scores("g")), measure=samples("mu"), unit=scalar("u")
    )  # fmt: skip
    return "".join([HEADER, *_weights(), *_others(), *_gradients(batch), *_baselines(batch), "End Shipped.\n"])


def _weights() -> list[str]:
    w, mu = samples("w"), samples("mu")
    cut = Weighting("truncate", cap=Parameter(Text("c")))  # type: ignore[arg-type]
    value = cut(Batch(reward=samples("r"), ratio=w, measure=mu, unit=scalar("u"))).value
    return [
        _lemma("ess_shipped", f"S2 w != 0 -> {ess_of_weights(w).term.text} = ess w",
               "have -> : \\sum_(k < n.+1) w k * w k = S2 w by apply: eq_bigr => k _; rewrite expr2.\n"
               "by move=> /negPf ->; rewrite /ess expr2."),
        _lemma("chi2_shipped", f"{chi2_of_weights(w, mu).term.text} = chi2 mu w",
               "by apply: eq_bigr => k _; rewrite expr2 mulrC."),
        _lemma("truncate_shipped", f"forall i : 'I_n.+1, {value.at('i').text} = Num.min (w i) c", "by []."),
    ]  # fmt: skip


def _others() -> list[str]:
    return [
        _lemma("others_shipped", "forall (y : 'I_n.+1 -> R) (i : 'I_n.+1), "
               f"{sum_of_others(samples('y')).at('i').text} = \\sum_(k | k != i) y k",
               "move=> y i; rewrite [X in _ + X](reindex_inj rev_ord_inj) /= [RHS](bigID (fun k : 'I_n.+1 => (k < i)%N)) /=.\n"
               "congr (_ + _); apply: eq_big => k; rewrite ?rev_ordK //; rewrite -(inj_eq val_inj) /=.\n"
               "  by rewrite neq_ltn andb_orl andbb [(i < k)%N && _]andbC; case: ltngtP.\n"
               "have -> : (n.+1 - k.+1 < n.+1 - i.+1)%N = (i < k)%N.\n"
               "  by rewrite !subSS -(ltn_add2r k) subnK ?leq_ord // -(ltn_add2r i) addnAC subnK ?leq_ord // ltn_add2l.\n"
               "by case: ltngtP."),
    ]  # fmt: skip


def _gradients(batch: Batch) -> list[str]:
    c = Estimator(baseline=Parameter(Text("b")), baseline_shift=0, epsilon=0).coefficients(batch)  # type: ignore[arg-type]
    contribution = (c.at("i") * Text("(g i j)")).text
    any_c = SymbolicArray(ALGEBRA, (SAMPLES,), lambda k: Text(f"(x {k})"))
    return [
        _lemma("estimate_shipped", f"forall (i : 'I_n.+1) (j : 'I_d), {contribution} = est w r g b i j", "by move=> i j; rewrite /est; ring."),
        _lemma("mean_shipped", f"forall j : 'I_d, {batch_sums(batch, any_c).estimate.at('j').text} = E mu (fun i => x i * g i j)",
               "by move=> j; rewrite mulr1; apply: eq_bigr => k _; ring."),
        _lemma("trcov_shipped", f"{trace_covariance(scores('g'), samples('mu')).term.text} = trcov mu g",
               "rewrite /trcov /E /norm2; apply: eq_bigr => i _; rewrite mulrC; congr (_ * _).\n"
               "apply: eq_bigr => j _; rewrite expr2.\n"
               "by have -> : \\sum_(k < n.+1) g k j * mu k = \\sum_k mu k * g k j by apply: eq_bigr => k _; rewrite mulrC."),
    ]  # fmt: skip


def _baselines(batch: Batch) -> list[str]:
    a = batch.scored().sq_norm(batch.ratio)
    named = lambda name: Estimator(baseline=name, baseline_shift=0).baseline_value(batch)  # noqa: E731
    even = SymbolicArray(ALGEBRA, (SAMPLES,), lambda k: Text("u"))
    loo = weighted_mean_of_others(samples("r"), samples("x"), even, scalar("u"))
    y = samples("y")
    left_out = (sum_of_others(y * even) + y * (even - scalar("u"))).at("i").text
    share = leverage(samples("x"), samples("mu"), scalar("u"))
    one = batch.reward * 0 + 1
    mean = lambda y: batch.scored().combine(batch.ratio * (batch.measure * y))  # noqa: E731
    xp = namespace(one)
    inner, square = (xp.sum(mean(y) * mean(one), axis=-1).term.text for y in (batch.reward, one))
    return [
        _lemma("weight_shipped", f"forall i : 'I_n.+1, {a.at('i').text} = a w g i",
               "by move=> i; rewrite /a /norm2 mulr_sumr; apply: eq_bigr => j _; ring."),
        _lemma("noise_shipped", f"{expectation(a, batch.measure).term.text} = D mu w g",
               "by apply: eq_bigr => k _; rewrite weight_shipped mulrC."),
        _lemma("lever_shipped", f"{expectation(a * batch.reward, batch.measure).term.text} = E mu (fun i => a w g i * r i)",
               "by apply: eq_bigr => k _; rewrite weight_shipped mulrC."),
        _lemma("opob_shipped", f"D mu w g != 0 -> {named('opob').term.text} = opob mu w r g",
               "by rewrite noise_shipped lever_shipped => /negPf ->."),
        _lemma("mean_ws_shipped", f"forall j : 'I_d, {mean(one).at('j').text} = mean_ws mu w g j",
               "by move=> j; apply: eq_bigr => k _; ring."),
        _lemma("mean_wrs_shipped", f"forall j : 'I_d, {mean(batch.reward).at('j').text} = mean_wrs mu w r g j",
               "by move=> j; apply: eq_bigr => k _; ring."),
        _lemma("inner_shipped", f"{inner} = inner mu w r g",
               "by apply: eq_bigr => j _; rewrite mean_ws_shipped mean_wrs_shipped."),
        _lemma("square_shipped", f"{square} = norm2 (mean_ws mu w g)",
               "by apply: eq_bigr => j _; rewrite !mean_ws_shipped expr2."),
        _lemma("best_shipped", f"spread mu w g != 0 -> {_best_text(batch)} = best mu w r g", _BEST_PROOF),
        _lemma("leverage_shipped", f"E mu x != 0 -> forall i : 'I_n.+1, {share.at('i').text} = u * x i / E mu x",
               "have -> : \\sum_(k < n.+1) x k * mu k = E mu x by apply: eq_bigr => k _; rewrite mulrC.\n"
               "by move=> /negPf -> i; rewrite [x i * u]mulrC."),
        _lemma("left_out_shipped", f"forall (y : 'I_n.+1 -> R) (i : 'I_n.+1),\n  {left_out} = u * \\sum_(k | k != i) y k",
               "move=> y i; have e := others_shipped (fun k => y k * u) i; cbv beta in e.\n"
               "by rewrite e subrr mulr0 addr0 -mulr_suml mulrC."),
        _lemma("loo_shipped", f"u != 0 -> forall i : 'I_n.+1, \\sum_(k | k != i) x k != 0 ->\n  {loo.at('i').text}\n"
               "  = (\\sum_(k | k != i) x k * r k) / (\\sum_(k | k != i) x k)", _LOO_PROOF),
    ]  # fmt: skip


def _best_text(batch: Batch) -> str:
    text: str = Estimator(baseline="opob_truncated", baseline_shift=0).baseline_value(batch).term.text
    return text


_BEST_PROOF = """move=> s0; rewrite plus_same noise_shipped lever_shipped inner_shipped square_shipped.
by rewrite -/(spread mu w g) (negPf s0)."""
_LOO_PROOF = """move=> u0 i x0.
have e1 := left_out_shipped (fun k => x k * r k) i; cbv beta in e1.
rewrite e1 left_out_shipped mulf_eq0 (negPf u0) (negPf x0) /=.
by rewrite -mulf_div divff // mul1r."""
