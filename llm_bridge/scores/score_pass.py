"""One backward under way: from what layers report to squared norms, parameter by parameter."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from llm_bridge.scores.calibration import Choice, Workspace, fastest, take
from llm_bridge.scores.chunks import Piece, Place, gathered
from llm_bridge.scores.inner import Differs, Inner
from llm_bridge.scores.layers import Recorder, Twin
from llm_bridge.scores.layout import Layout, Operands
from llm_bridge.scores.norms import (
    Loan,
    embedding_sq_norms,
    head_at_token,
    square_sum,
    square_sums,
    sum_dtype,
    tied_cross_term,
)
from llm_bridge.scores.routes import WHOLE, Route
from vcposim.errors import InputError

LIVE_LOOKS = 4
"""maps in a row whose rows are all live, from which on they are taken to be"""
_COUPLED: WeakSet[nn.Module] = WeakSet()
"""looped modules whose gradients on one trajectory alone do not add up to those on all"""
_IN_PIECES: Any = WeakTensorKeyDictionary()
"""of parameters the kinds of use that came in pieces of tokens (N, d)"""
_BY_ROW: Any = WeakTensorKeyDictionary()
"""of parameters the kinds of use that came several times in a way that could be another, and whether a compared pass
took them for one token (n, d) of each trajectory, or for pieces"""


@dataclass
class Uses:
    """What one graph does with each parameter: kinds of use, tokens embedded, rows of a module that is looped over.

    turned: those whose transpose is used in a product. others: by id, leaves of looped modules that the tape does not
    hold. places: when its nodes were made. leads: by kind and parameter, of each use the axes before the features, and
    when it was made. Read off the graph, so that other forwards may come between.
    """

    kind: dict[nn.Parameter, list[str]] = field(default_factory=dict)
    token: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    rows: dict[nn.Parameter, list[tuple[Place, int]]] = field(default_factory=dict)
    turned: set[nn.Parameter] = field(default_factory=set)
    others: set[int] = field(default_factory=set)
    places: set[Place | None] = field(default_factory=set)
    leads: dict[tuple[str, nn.Parameter], list[tuple[tuple[int, ...], Place]]] = field(default_factory=dict)

    @classmethod
    def of(cls, nodes: Iterable[Any], tape: Recorder) -> "Uses":
        """From the nodes of a graph that `tape` put there; what lies in a reentrant checkpoint is not among them."""
        found = cls()
        for node in nodes:
            twin = getattr(node, "twin", None)
            if not isinstance(twin, Twin) or twin.tape is not tape or node.place is None:
                continue
            found.places.add(node.place)
            found.others.update(map(id, getattr(node, "others", ())))
            for use in node.uses if getattr(node, "lead", ()) else ():
                found.leads.setdefault(use, []).append((node.lead, node.place))
            for kind, param in node.uses:
                found.kind.setdefault(param, []).append(kind)
                if kind == "embedding":  # a tied head needs its tokens early
                    found.token[param] = node.token
                elif kind == "matrix" and node.transposed:
                    found.turned.add(param)
                elif kind == "local":
                    found.rows.setdefault(param, []).append((node.place, node.inner.rows))
        return found

    def parts(self, names: Mapping[int, str], rows: int, tokens: int) -> Sequence[frozenset[Hashable]]:
        """Of parameters used on several arrays how large these are, against `rows` and `tokens`, and in which order.

        Pieces of another size may be others: tokens in a row, or steps of all rows. The same, of a batch of another
        length, are those of the same size or the same share. names: of parameters, by id.
        """
        found = list[frozenset[Hashable]]()
        for (kind, param), uses in self.leads.items():
            leads, places = [lead for lead, _ in uses], [place for _, place in uses]
            if len(leads) > 1:
                order = sorted(places)  # in which calls were made, against that in which they are put together
                turn = places == order if places in (order, order[::-1]) else tuple(map(order.index, places))
                found.append(frozenset([(kind, names.get(id(param)), turn)]))
                size, dims = max(lead[0] for lead in leads), len(leads[0])
                use = kind, names.get(id(param)), rows, any(lead == (rows,) for lead in leads)
                share = tokens / size if dims == 1 else 0.0
                found.append(frozenset([(*use, size, 0.0), (*use, 0, share)] if share else [(*use, size, 0.0)]))
        return found

    def copied(self) -> "Uses":
        """The same, for another backward of the forward."""
        kind, rows = ({p: [*each] for p, each in x.items()} for x in (self.kind, self.rows))
        return Uses(kind, dict(self.token), rows, self.turned, self.others, self.places, self.leads)

    def are(self, param: nn.Parameter) -> list[str]:
        """Kinds of use, in alphabetical order."""
        return sorted(self.kind.get(param, []))


class ScorePass:
    """One backward under way: takes each layer's operands, adds to the norms, and keeps what the route needs.

    A parameter that is used several times in one forward has the sum of its uses as its gradient, and the norm of a
    sum needs cross terms. An embedding that is also the head is worked out (`tied_cross_term`); any other sum waits
    until all uses have come (`flush`) and is then formed trajectory by trajectory.
    """

    def __init__(
        self,
        layout: Layout,
        route: Route,
        uses: Uses,
        subset: Set[nn.Parameter] | None,
        method: str,
        work: Workspace,
        checked: bool = False,
        sketched: bool = False,
    ) -> None:
        self.layout, self.route, self._checked = layout, route, checked
        self.part: dict[nn.Parameter, Tensor] = {}
        self.chunked = False
        """whether calls of the model add up to the rows of the batch"""
        self.coarsest = torch.float64
        """the coarsest type in which an output gradient came, or of a parameter"""
        self._uses, self._subset, self._method, self._work = uses, subset, method, work
        self._sketched = sketched
        self._seen: dict[nn.Parameter, list[str]] = {}
        self._head: dict[nn.Parameter, tuple[Tensor, list[Tensor], Sequence[Tensor]]] = {}
        self._waiting: dict[nn.Parameter, list[_Use]] = {}
        self._piece: dict[nn.Parameter, dict[str, list[Piece]]] = {}
        self._full: set[tuple[str, nn.Parameter]] = set()
        self._gathering = False
        self._live_looks = 0
        self._choice: dict[Any, Choice] = {}

    def operands(self, name: str, grad: Tensor, x: Tensor) -> Operands:
        """A linear map's `grad` (..., out) and `x` (..., into), without rows that cannot matter.

        The further back, the more rows have a gradient: when several maps had all, no more is looked.
        """
        found = Operands.of(self.layout, name, grad, x, look=self._live_looks < LIVE_LOOKS)
        self._live_looks = self._live_looks + 1 if found.keep is None else 0
        return found

    def covers(self, place: Place | None) -> bool:
        """Whether a node made at `place` is of this pass' graph; inside a reentrant checkpoint it has none."""
        return place in self._uses.places

    def matrix(self, name: str, weight: nn.Parameter, operands: Operands, transposed: bool) -> None:
        """A linear map's weight: output gradients and inputs. Where gradients are off, as in a backward."""
        if not self._wants(weight):
            return
        self._full.add(("matrix", weight))
        layout = operands.layout
        grad, x = self._unmarked(self._whole(operands.grad), layout), self._whole(operands.x)
        left, right = (x, grad) if transposed else (grad, x)

        if self._alone("matrix", name, weight):
            self._product(weight, left, right, layout)
            if weight in self._uses.token and self._tied(weight):
                token = self.layout.flatten(name, self._uses.token[weight].unsqueeze(-1)).squeeze(1)
                at_token = head_at_token(layout.split(grad), self.layout.split(token))
                self._head[weight] = (token, at_token, layout.split(x))
        else:
            self._waiting.setdefault(weight, []).append((Loan.of(left), Loan.of(right), layout))

    def _product(self, weight: nn.Parameter, left: Tensor, right: Tensor, layout: Layout) -> None:
        shape = (layout.n, left.shape, right.shape[1], left.dtype, left.device, layout.owner is None)
        choice = self._choice.get(shape)
        if choice is None:
            choice = self._choice[shape] = fastest(self._method, left, right, layout, self.route, self._sketched)
        self._add(weight, take(choice, weight, left, right, layout, self.route, self._work))

    def vector(self, name: str, param: nn.Parameter, grad: Tensor, place: Place | None = None) -> None:
        """A bias or scale: `grad` (...) of one a position, or by some of the rows. Where gradients are off."""
        if not self._wants(param):
            return
        if not self.told("vector", name, param, grad):
            return self.later("vector", param, Piece(name, place, (grad,)))
        self._full.add(("vector", param))
        self._whole(grad)
        grad = self._unmarked(self.layout.flatten(name, grad), self.layout)
        each = self.layout.per_trajectory(grad.to(sum_dtype(grad.dtype)))
        self.route.vector(param, each)
        if self._alone("vector", name, param):
            self._add(param, square_sums(each))
        else:
            self._wait(param, lambda i: each[i])

    def embedding(
        self,
        name: str,
        weight: nn.Parameter,
        token: Tensor,
        grad: Tensor,
        padding: int | None,
        place: Place | None = None,
    ) -> None:
        """An embedding: `token` (...) and output gradients `grad` (..., d). Where gradients are off."""
        if not self._wants(weight):
            return
        if not self.told("embedding", name, weight, grad):
            return self.later("embedding", weight, Piece(name, place, (grad, token), padding))
        self._full.add(("embedding", weight))
        grad = self._unmarked(self._whole(self.layout.flatten(name, grad)), self.layout)
        token = token.reshape(-1)
        if padding is not None:
            grad = grad * (token != padding).unsqueeze(1)
        self.route.embedding(weight, token, grad)
        if self._alone("embedding", name, weight):
            self._add(weight, embedding_sq_norms(token, grad, self.layout, weight.shape[0]))
            if weight in self._head:
                at, gathered, hidden = self._head.pop(weight)
                assert torch.equal(at, token)
                self._add(weight, 2 * tied_cross_term(gathered, hidden, self.layout.split(grad)))
            return

        loan = Loan.of(grad)

        def block(i: int) -> Tensor:
            grad = loan.back()
            dense = torch.zeros(weight.shape, dtype=sum_dtype(grad.dtype), device=grad.device)
            return dense.index_add_(0, self.layout.split(token)[i], self.layout.split(grad)[i].to(dense.dtype))

        self._wait(weight, block)

    def local(self, name: str, inner: Inner, grad: Sequence[Tensor | None]) -> list[Tensor | None]:
        """A module run as a whole: a backward per trajectory through it. Returns its inputs' gradients.

        Where its rows turn out to depend on each other (it raises `Differs`, and takes it), the backwards go through
        all of them.
        """
        layout, params, first = self.layout, inner.param, self._first_row(inner, grad)
        if first is not None:
            layout = Layout(inner.rows, (inner.rows, layout.lead[1]), advise=layout.advise)
        for g in grad:
            if g is not None:  # an output without rows has a gradient that is everybody's
                if not inner.fed and layout.n > 1:
                    raise layout.mixed(name, g)
                layout.flatten(name, g if g.dim() >= 2 else g.unsqueeze(-1))
        own = range(layout.n) if first is None else range(first, first + layout.n)
        alone = [self._wants(p) and (first is not None or self._alone("local", name, p)) for p in params]
        square: list[list[Tensor]] = [[] for _ in params]
        kept: list[list[Tensor]] = [[] for _ in params]

        back = None if self.route.mark is None else 1 / self.route.mark

        def take_one(i: int, found: list[Tensor | None]) -> None:
            for k, (p, g) in enumerate(zip(params, found, strict=True)):
                g = torch.zeros_like(p) if g is None else self._whole(g)
                g = g if back is None else g * float(back[own[i]])
                square[k].append(square_sum(g))
                if not alone[k] and self._wants(p):
                    kept[k].append(g)

        def over(c: Tensor) -> list[Tensor | None]:
            return [None if g is None else g * layout.over(name, c, g) for g in grad]

        try:
            if layout.owner is not None or inner.twin.module in _COUPLED:
                raise Differs
            total: list[Tensor | float] = [0.0] * len(params)

            def add_one(i: int, found: list[Tensor | None]) -> None:
                take_one(i, found)
                for k, g in enumerate(found if self._checked else []):
                    total[k] = total[k] if g is None else total[k] + g

            given = inner.each(layout, grad, add_one)
            if self._checked and not all(map(_near, total, inner.grads(grad, params))):
                _COUPLED.add(inner.twin.module)
                raise Differs
        except Differs:
            for store in (*square, *kept):
                store.clear()
            one = torch.eye(layout.n, dtype=torch.float64, device=params[0].device)
            for i in range(layout.n):
                take_one(i, inner.grads(over(one[i]), params))
            given = inner.grads(grad, inner.input)
        for k, p in enumerate(params):
            if alone[k]:
                each = torch.stack(square[k])
                self._add(p, each.new_zeros(self.layout.n).index_copy_(0, torch.tensor(own, device=each.device), each))
            elif self._wants(p):
                self._wait(p, kept[k].__getitem__)

        def weighted(c: Tensor) -> list[Tensor | None]:
            c = c if back is None else c * back.to(c)
            return inner.grads(over(c[own.start : own.stop]), params)

        self.route.local(params, weighted)
        return given

    def _first_row(self, inner: Inner, grad: Sequence[Tensor | None]) -> int | None:
        """Of a call on some of the rows, where they begin; None for one on all, or where that is unknown.

        Known is it where the calls of one forward, in their order, add up to the rows of the batch.
        """
        if all(g is None or self.layout.tells(g if g.dim() >= 2 else g.unsqueeze(-1)) for g in grad):
            for g in grad:
                if g is not None:
                    self.told("local", inner.twin.name, inner.param[0], g)  # raises where it may be either
            return None
        rows = self._uses.rows.get(inner.param[0], [])
        only = all(self._uses.are(p) == ["local"] * len(rows) and self._uses.rows[p] == rows for p in inner.param)
        all_rows = sum(many for _, many in rows) == self.layout.n
        if not only or inner.when is None or not all_rows or self.layout.owner is not None:
            return None
        return sum(many for place, many in rows if place < inner.when)

    def told(self, kind: str, name: str, param: nn.Parameter, grad: Tensor) -> bool:
        """Whether the rows of `grad` (...) are those of all trajectories.

        Not if the model was run in chunks of rows, or earlier batches came as pieces (N, d): then n tokens of one are
        no look at one token of each. Raises `InputError` where they may be either, and no pass has told.
        """
        if self._gathering:
            return True
        flat, n = grad.dim() == 2, self.layout.n
        if (flat and self.chunked) or not self.layout.tells(grad):
            return False
        in_pieces = flat and kind in _IN_PIECES.get(param, ())
        often = flat and grad.shape[0] == n > 1 and len(self._uses.kind.get(param, ())) > 1
        if often and self.layout.owner is None and self._uses.are(param).count(kind) > 1:
            either = f"one token of each of {n} trajectories or {n} tokens in a row"
            return self._sure(kind, name, param, grad, not in_pieces, either)
        return not in_pieces

    def _sure(self, kind: str, name: str, param: nn.Parameter, grad: Tensor, by_row: bool, either: str) -> bool:
        """What calls are that could be one or the other: what a compared pass takes them for, and those after it.

        Raises `InputError` where no pass has told.
        """
        known = _BY_ROW.setdefault(param, {})
        if self._checked:
            known[kind] = by_row
        elif kind not in known:
            raise InputError(
                f"{name}: sees shape {tuple(grad.shape)} several times, {either}; have this pass compared, "
                f"verify='always', or {self.layout.advise(name)}"
            )
        return bool(known[kind])

    def later(self, kind: str, param: nn.Parameter, piece: Piece) -> None:
        """Keep what a call on some of the rows reports until all have come."""
        if self._wants(param):
            piece = piece._replace(loans=tuple(map(Loan.of, piece.arrays)))
            self._piece.setdefault(param, {}).setdefault(kind, []).append(piece)

    def _gather(self) -> None:
        """Report the calls on some of the rows as calls on all.

        Raises `InputError` where they do not add up to all rows.
        """
        pieces_of, self._piece, self._gathering = self._piece, {}, True
        for param, kinds in pieces_of.items():
            found: list[tuple[str, Piece]] = []
            for kind in ("matrix", "vector", "embedding"):  # a head before the embedding that it shares
                pieces = kinds.get(kind, [])
                for loan in (loan for piece in pieces for loan in piece.loans):
                    loan.back()
                whole = gathered(pieces, self.layout) if pieces else []
                if whole is None or (pieces and (kind, param) in self._full):
                    name, place, arrays = pieces[0][:3]
                    if place is None:
                        raise InputError(
                            f"{name}: sees some of the rows at a time inside a reentrant checkpoint, so it is unknown "
                            "which; give use_reentrant=False to checkpointing"
                        )
                    raise self.layout.mixed(name, arrays[0])
                if len(whole) > 1 or not all(piece.may_be_all for piece in pieces):
                    either = "those of a row or shared by all, in one order or another"
                    self._sure(kind, pieces[0].name, param, pieces[0].arrays[0], False, either)
                found += [(kind, piece) for piece in whole]
            self._uses.kind[param] = [kind for kind, _ in found] + ["whole"] * len(self._waiting.get(param, []))
            for kind, (name, _, (grad, *other), rest, *_) in found:
                if any(piece.arrays[0].dim() == 2 for piece in kinds[kind]):
                    _IN_PIECES.setdefault(param, set()).add(kind)
                if kind == "matrix":
                    if self._tied(param):
                        self._uses.token[param] = next(y.arrays[1] for k, y in found if k == "embedding")
                    self.matrix(name, param, Operands.of(self.layout, name, grad, other[0]), rest)
                elif kind == "vector":
                    self.vector(name, param, grad)
                else:
                    self.embedding(name, param, other[0], grad, rest)

    def flush(self) -> None:
        """Norms of the parameters with several uses, or with uses by some of the rows at a time.

        A sum of products left^T right is one product of their rows side by side; anything else is added up as blocks,
        a trajectory at a time.
        """
        self._gather()
        for param, uses in self._waiting.items():
            products = [(use[0].back(), use[1].back(), use[2]) for use in uses if isinstance(use, tuple)]
            others = [use for use in uses if not isinstance(use, tuple)]
            if not others:
                self._product(param, *_joined(products))
                continue
            for left, right, layout in products:
                self.route.matrix(param, left, right, layout, WHOLE)
            kind, square = sum_dtype(param.dtype), []
            for i in range(self.layout.n):
                total = param.new_zeros(param.shape, dtype=kind)
                for left, right, layout in products:
                    total += layout.split(left)[i].t() @ layout.split(right)[i]
                for block in others:
                    total += block(i).to(kind).view(param.shape)
                square.append(square_sum(total))
            self._add(param, torch.stack(square))
        self._waiting = {}

    def _add(self, param: nn.Parameter, square: Tensor) -> None:
        self._note(param.dtype)  # what comes of a cast one is rounded to it, and so is what was cast to it
        self.part[param] = self.part[param] + square if param in self.part else square

    def _wait(self, param: nn.Parameter, block: Callable[[int], Tensor]) -> None:
        self._waiting.setdefault(param, []).append(block)

    def _whole(self, grad: Tensor) -> Tensor:
        """As it is, or wider where products of its numbers would overflow; notes the type."""
        self._note(grad.dtype)
        return grad.float() if grad.dtype == torch.float16 else grad

    def _unmarked(self, grad: Tensor, layout: Layout) -> Tensor:
        """Rows `grad` (N, d) without the marks of the trajectories that they are taken for."""
        if self.route.mark is None:
            return grad
        return grad * layout.per_row(1 / self.route.mark.to(grad), len(grad))

    def _note(self, kind: torch.dtype) -> None:
        if kind is not self.coarsest and torch.finfo(kind).eps > torch.finfo(self.coarsest).eps:
            self.coarsest = kind

    def _wants(self, param: nn.Parameter) -> bool:
        return (self._subset is None or param in self._subset) and param.numel() > 0

    def _tied(self, param: nn.Parameter) -> bool:
        return self._uses.are(param) == ["embedding", "matrix"] and param not in self._uses.turned

    def _alone(self, kind: str, name: str, param: nn.Parameter) -> bool:
        """Whether this use has no cross terms but those that are worked out."""
        uses, seen = len(self._uses.kind.get(param, ())), self._seen.setdefault(param, [])
        if uses > 1 and not self._tied(param):
            return False
        seen.append(kind)
        if len(seen) > max(1, uses) and None not in self._uses.places:  # look-ups that all rows may share, and a head
            raise InputError(
                f"{name}: its parameters are used more often than can be told apart; {self.layout.advise(name)}"
            )
        if len(seen) > max(1, uses):  # a reentrant checkpoint shows no uses
            raise InputError(
                f"{name}: its parameters are used twice in one forward; give use_reentrant=False to checkpointing"
            )
        return True


def _near(a: Tensor | float, b: Tensor | None) -> bool:
    if b is None:
        return not isinstance(a, Tensor) or not bool(a.any())
    return float((b - a).norm()) <= torch.finfo(b.dtype).eps ** 0.5 * float(b.norm())


_Product = tuple[Tensor, Tensor, Layout]
_Use = tuple[Loan, Loan, Layout] | Callable[[int], Tensor]


def _joined(products: Sequence[_Product]) -> _Product:
    """Operands of several products with one weight as those of one: each trajectory's rows side by side."""
    if len(products) == 1:
        return products[0]
    n = products[0][2].n
    sides = []
    for side in (0, 1):
        rows = [use[2].split(use[:2][side]) for use in products]
        sides.append([torch.cat([each[i] for each in rows]) for i in range(n)])
    length = [len(x) for x in sides[0]]
    left, right = (torch.cat(side) for side in sides)
    if len(set(length)) == 1:
        return left, right, Layout(n, (n, length[0]))
    stop = [*accumulate(length)]
    run = tuple((end - size, end) for end, size in zip(stop, length, strict=True))
    many, where = torch.tensor(length, device=left.device), torch.arange(n, device=left.device)
    return left, right, Layout(n, (1, len(left)), run, where.repeat_interleave(many))
