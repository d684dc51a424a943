"""The one line where autograd meets an estimator, and what goes wrong without its detach."""

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from llm_bridge.loss import mean_coefficient, surrogate, vocabulary_term  # noqa: E402
from llm_bridge.ratios import trajectory_batch  # noqa: E402
from llm_bridge.scores import ScoreTape  # noqa: E402
from tests.kit.statistical import assert_near, assert_rounding_only  # noqa: E402
from vcposim import vocabulary  # noqa: E402
from vcposim.batch import Batch, DenseScores  # noqa: E402
from vcposim.catalogue import entry  # noqa: E402
from vcposim.errors import InputError  # noqa: E402
from vcposim.moments import batch_sums  # noqa: E402
from vcposim.weights import Weighting  # noqa: E402

N, T, P = 5, 4, 6


class Model:
    """log pi_it = log sigmoid(<x_it, theta>): scores by hand, (n, t, p)."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(N, T, P, generator=generator, dtype=torch.float64)
        self.theta = torch.randn(P, generator=generator, dtype=torch.float64, requires_grad=True)
        self.behavior_log_prob = self.log_prob().detach() + 0.3 * torch.randn(N, T, generator=generator).double()
        self.mask = (torch.arange(T) < torch.tensor([4, 1, 3, 2, 4])[:, None]).double()
        self.reward = torch.tensor([1.0, 0.0, 0.5, 1.0, -1.0]).double()

    def log_prob(self):
        return torch.nn.functional.logsigmoid(self.x @ self.theta)

    def score(self):
        return (self.x * torch.sigmoid(-(self.x @ self.theta))[..., None]).detach()


def weight_with_graph(model: Model, log_prob):
    """Coefficients as a careless caller makes them: w_i (R_i - mean), w_i still attached to the graph."""
    log_w = ((log_prob - model.behavior_log_prob) * model.mask).sum(-1)
    return torch.exp(log_w) * (model.reward - model.reward.mean()) / N


def without_detach(coefficient, log_prob, mask):
    """The mutant: the ratio inside the coefficient is differentiated too."""
    return -(coefficient[:, None] * log_prob * mask).sum()


def gradient_of(loss_of: Callable, model: Model):
    model.theta.grad = None
    log_prob = model.log_prob()
    loss_of(weight_with_graph(model, log_prob), log_prob, model.mask).backward()
    return model.theta.grad


def check_no_gradient_through_weights(loss_of: Callable) -> None:
    model = Model()
    expected = -DenseScores(model.score() * model.mask[..., None], per_token=True).combine(
        weight_with_graph(model, model.log_prob()).detach()
    )
    assert_rounding_only(gradient_of(loss_of, model), expected, scale=1.0)


def test_gradient_never_flows_through_weights() -> None:
    check_no_gradient_through_weights(surrogate)


def test_dropping_the_detach_is_caught() -> None:
    with pytest.raises(AssertionError, match="off by"):
        check_no_gradient_through_weights(without_detach)


@pytest.mark.parametrize("name", ["reinforce", "sequence_is", "vcpo", "token_tis", "icepop", "grpo", "rloo"])
def test_gradient_is_the_kernels_estimate(name: str) -> None:
    model, estimator = Model(), entry(name).estimator
    log_prob = model.log_prob()
    batch = trajectory_batch(model.reward, log_prob, model.behavior_log_prob, model.mask)
    scored = Batch(
        reward=batch.reward, log_ratio=batch.log_ratio, token_mask=batch.token_mask,
        scores=DenseScores(model.score(), per_token=True),
    )  # fmt: skip
    c = estimator.coefficients(scored)
    surrogate(mean_coefficient(c, scored), log_prob, model.mask).backward()
    expected = batch_sums(scored, c).estimate
    assert_rounding_only(model.theta.grad, -expected, scale=1.0)
    assert float(expected.abs().max()) > 1e-3


def test_masked_tokens_have_no_gradient_whatever_they_hold() -> None:
    mask = torch.tensor([[1.0, 0.0]])
    log_prob = torch.tensor([[-1.0, float("nan")]], requires_grad=True)
    loss = surrogate(torch.tensor([2.0]), log_prob, mask)
    loss.backward()
    assert loss.item() == 2.0
    assert log_prob.grad.tolist() == [[-2.0, 0.0]]


def test_bfloat16_log_probs_are_summed_in_float32() -> None:
    log_prob = torch.full((1, 4096), -1.0078125, dtype=torch.bfloat16, requires_grad=True)
    loss = surrogate(torch.ones(1), log_prob, torch.ones(1, 4096))
    assert loss.item() == 4096 * 1.0078125
    loss.backward()
    assert log_prob.grad.dtype == torch.bfloat16


def test_mean_coefficient_averages_groups_that_have_a_trajectory() -> None:
    measure = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]])
    batch = Batch(reward=torch.ones(3, 2), log_ratio=torch.zeros(3, 2), measure=measure, unit=torch.ones(3, 1))
    assert mean_coefficient(torch.ones(3, 2), batch).tolist() == [[0.25, 0.25], [0.5, 0.0], [0.0, 0.0]]
    token = Batch(reward=torch.ones(3, 2), log_ratio=torch.zeros(3, 2, 5), measure=measure, unit=torch.ones(3, 1))
    c = Weighting("none", "token")(token).value
    assert torch.equal(mean_coefficient(c, token), mean_coefficient(torch.ones(3, 2), batch)[..., None].expand(3, 2, 5))


def test_refusals_name_the_shape() -> None:
    log_prob = torch.zeros(3, 4)
    with pytest.raises(InputError, match=r"coefficient: shape \(4,\)"):
        surrogate(torch.ones(4), log_prob, log_prob)
    with pytest.raises(InputError, match=r"coefficient: shape \(3, 1, 4\)"):
        surrogate(torch.ones(3, 1, 4), log_prob, log_prob)
    with pytest.raises(InputError, match="mask: shape"):
        surrogate(torch.ones(3), log_prob, log_prob[1:])


class Vocabulary(torch.nn.Module):
    """A bigram model: logits of the next token from the last one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(V, 3), torch.nn.Linear(3, V)
        self.double()

    def forward(self, token):
        return self.head(torch.tanh(self.embed(token)))


V = 5
FORMS = {
    "score_centering": lambda a, one, p, q: vocabulary.score_centering(a, one, p, q),
    "score_centering, truncated": lambda a, one, p, q: vocabulary.score_centering(a, one, p, q, lambda r: r.clip(0, 1)),
    "kl_pull": lambda a, one, p, q: vocabulary.kl_pull(p, q),
    "distributional_ipo": lambda a, one, p, q: vocabulary.distributional_ipo(a, one, p, q, 0.3, 0.5),
}


def whole_vocabulary(form):
    """A batch of tokens, and coefficients (n, t, v) of a form, in torch and in NumPy."""
    model, generator = Vocabulary(), torch.Generator().manual_seed(1)
    token = torch.randint(V, (N, T + 1), generator=generator)
    logits = model(token[:, :-1])
    log_prob = torch.log_softmax(logits, -1)
    log_q = torch.log_softmax(logits.detach() + torch.randn(logits.shape, generator=generator).double(), -1)
    one = torch.nn.functional.one_hot(token[:, 1:], V).double()
    advantage = torch.randn(N, generator=generator).double()[:, None].expand(N, T)
    mask = (torch.arange(T) < torch.tensor([4, 1, 3, 2, 4])[:, None]).double()
    given = (advantage, one, log_prob.detach().exp(), log_q.exp())
    c = FORMS[form](*given)
    assert_near(c.numpy(), FORMS[form](*(x.numpy() for x in given)))
    return model, log_prob, c, mask


@pytest.mark.parametrize("form", FORMS)
def test_vocabulary_coefficients_have_their_gradient_and_their_norms(form: str) -> None:
    """Against explicit scores, one backward for every token of the vocabulary at every position."""
    model, log_prob, c, mask = whole_vocabulary(form)
    params = list(model.parameters())
    score = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(x, params, retain_graph=True)])
            for x in log_prob.reshape(-1)
        ]
    ).reshape(N, T, V, -1)
    per_trajectory = torch.einsum("nt,ntv,ntvp->np", mask, c, score)
    one = torch.ones(N).double()
    found = torch.autograd.grad(surrogate(one, vocabulary_term(c, log_prob), mask), params, retain_graph=True)
    assert_rounding_only(torch.cat([g.flatten() for g in found]), -per_trajectory.sum(0), scale=1.0)
    tape_model = Vocabulary()
    with ScoreTape(tape_model) as tape:
        token = torch.randint(V, (N, T + 1), generator=torch.Generator().manual_seed(1))
        log_prob = torch.log_softmax(tape_model(token[:, :-1]), -1)
        norms = tape.score_sq_norms(vocabulary_term(c, log_prob), mask)
        tape.backward(one)
    assert_rounding_only(norms, (per_trajectory**2).sum(-1), scale=1.0)
    taped = torch.cat([p.grad.flatten() for p in tape_model.parameters()])
    assert_rounding_only(taped, -per_trajectory.sum(0), scale=1.0)


def test_forms_are_gradients_of_what_they_say() -> None:
    """KL and the quadratic divergence by autograd, at every position; nothing is sampled."""
    model, log_prob, *_ = whole_vocabulary("kl_pull")
    log_q = torch.log_softmax(torch.randn(log_prob.shape, generator=torch.Generator().manual_seed(3)).double(), -1)
    p, q = log_prob.detach().exp(), log_q.exp()
    kl = (log_prob.exp() * (log_prob - log_q)).sum()
    quadratic = (q * (log_prob - log_q) ** 2).sum()
    none = p * 0
    for loss, c in (
        (kl, vocabulary.kl_pull(p, q)),
        (0.5 * quadratic, vocabulary.distributional_ipo(p[..., 0] * 0, none, p, q, 1.0, 0.5)),
    ):
        want = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        found = torch.autograd.grad(-vocabulary_term(c, log_prob).sum(), list(model.parameters()), retain_graph=True)
        for g, w in zip(found, want, strict=True):
            assert_rounding_only(g, w, scale=1.0)
            assert w.abs().max() > 1e-3


def test_a_vocabulary_term_refuses_what_does_not_fit_and_ignores_what_has_no_coefficient() -> None:
    log_prob = torch.tensor([[[0.0, -torch.inf]]], requires_grad=True)
    term = vocabulary_term(torch.tensor([[[2.0, 0.0]]]), log_prob)
    assert term.tolist() == [[0.0]]
    (gradient,) = torch.autograd.grad(term.sum(), log_prob)
    assert gradient.tolist() == [[[2.0, 0.0]]]
    with pytest.raises(InputError, match=r"coefficient: shape \(1, 1\) is not that of log_prob"):
        vocabulary_term(torch.ones(1, 1), log_prob)
