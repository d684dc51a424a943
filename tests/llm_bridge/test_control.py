"""The brake around real optimizers: exact scale, exact restoration, and never a full step on a broken batch."""

import copy
import io
import math
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from llm_bridge.control import EssStepScale, family_exponent  # noqa: E402
from llm_bridge.ratios import log_ratio, present  # noqa: E402
from tests.kit.statistical import SINGLE, assert_near, near  # noqa: E402
from vcposim.diagnostics import ess_fraction  # noqa: E402
from vcposim.errors import InputError  # noqa: E402

HALF = torch.tensor([0.0, -math.inf])
"""two trajectories, one without weight: ESS fraction 1/2"""
LR = (0.1 + 1e-17, 3e-7)


def parameters(seed: int = 0, size: int = 4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64)) for _ in range(2)]


def fill(params, seed: int = 1, value: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        drawn = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = drawn if value is None else torch.full_like(p, value)


def two_groups(params, kind=torch.optim.AdamW, **options):
    return kind([{"params": params[:1], "lr": LR[0]}, {"params": params[1:], "lr": LR[1]}], **options)


# --- the law ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "scale"),
    [(torch.optim.AdamW, 0.5**0.5), (torch.optim.Adam, 0.5**0.5), (torch.optim.NAdam, 0.5**0.5),
     (torch.optim.RMSprop, 0.5**0.5), (torch.optim.Adafactor, 0.5**0.5), (torch.optim.SGD, 0.5)],
)  # fmt: skip
def test_a_scaled_step_is_the_optimizers_step_at_the_scaled_lr(kind, scale: float) -> None:
    ours, plain = parameters(), parameters()
    optimizer, twin = two_groups(ours, kind, weight_decay=0.3), two_groups(plain, kind, weight_decay=0.3)
    brake = EssStepScale(optimizer)
    for step in range(3):
        fill(ours, step)
        fill(plain, step)
        brake.observe(HALF)
        assert brake.step().step_scale == scale
        for group, lr in zip(twin.param_groups, LR, strict=True):
            group["lr"] = lr * scale
        twin.step()
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)  # also the decoupled weight decay of AdamW, which is lr * weight_decay


def test_decoupled_weight_decay_is_scaled_along() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)
    brake = EssStepScale(optimizer)
    fill(params, value=0.0)  # no gradient: decay alone moves the parameters
    brake.observe(HALF)
    brake.step()
    for p, old in zip(params, before, strict=True):
        assert_near(p, old * (1 - 0.1 * 0.5**0.5 * 0.5))


def test_microbatches_add_up_to_their_union() -> None:
    x = torch.tensor([0.3, -2.0, 5.0, 1.0, 0.0, -300.0, 4.5])
    brake = EssStepScale(torch.optim.SGD(parameters(), lr=1.0))
    for part in (x[:2], x[2:2], x[2:6], x[6:]):
        brake.observe(part)
    assert brake.step().ess_fraction == near(float(ess_fraction(x.double())))


def test_observations_are_for_one_step() -> None:
    brake = EssStepScale(torch.optim.SGD(parameters(), lr=1.0))
    brake.observe(torch.tensor([0.0, 50.0]))
    brake.step()
    brake.observe(torch.zeros(3))
    assert brake.step().ess_fraction == 1.0
    with pytest.warns(RuntimeWarning, match="no trajectory was observed"):
        assert brake.step().step_scale == 0.0


# --- restoration ------------------------------------------------------------------------------------------------------


def lrs(optimizer) -> list[str]:
    return [float(group["lr"]).hex() for group in optimizer.param_groups]


def test_lr_is_restored_to_the_bit_after_a_step_and_after_an_exception() -> None:
    params = parameters()
    optimizer = two_groups(params)
    brake = EssStepScale(optimizer)
    weights = torch.tensor([0.0, 1.0, 3.0])
    scale = float(ess_fraction(weights.double())) ** 0.5
    # an lr that scaling and dividing back would lose the last bit of
    optimizer.param_groups[0]["lr"] = next(x for x in np.linspace(0.01, 0.1).tolist() if x * scale / scale != x)
    before, seen = lrs(optimizer), []

    def fail() -> None:
        seen.append(lrs(optimizer))
        raise ArithmeticError("the step failed")

    for advance in (None, fail):
        fill(params)
        brake.observe(weights)
        if advance is None:
            brake.step()
        else:
            with pytest.raises(ArithmeticError, match="the step failed"):
                brake.step(advance)
        assert lrs(optimizer) == before
    assert seen == [[(float.fromhex(x) * scale).hex() for x in before]]  # scaled in between


def test_restoring_after_an_exception_in_someone_elses_step() -> None:
    optimizer = two_groups(parameters())
    brake, before = EssStepScale(optimizer), lrs(optimizer)
    brake.observe(HALF)
    seen = []

    def fail_inside() -> None:
        with brake.applied():
            seen.extend(lrs(optimizer))
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert seen == [float(x * 0.5**0.5).hex() for x in LR]
    assert lrs(optimizer) == before
    brake.observe(HALF)
    brake.apply()
    brake.observe(HALF)
    with pytest.raises(InputError, match="scaled already"):
        brake.apply()
    brake.restore()
    brake.restore()
    assert lrs(optimizer) == before


def test_tensor_lr_is_scaled_in_place_and_once_if_shared() -> None:
    params = parameters()
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer = torch.optim.Adam([{"params": params[:1]}, {"params": params[1:]}], lr=lr, foreach=False)
    for group in optimizer.param_groups:
        group["lr"] = lr
    brake = EssStepScale(optimizer)
    brake.observe(HALF)
    with brake.applied():
        assert all(group["lr"] is lr for group in optimizer.param_groups)
        assert float(lr) == 0.1 * 0.5**0.5
    assert all(group["lr"] is lr for group in optimizer.param_groups)
    assert float(lr) == 0.1


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6),
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.7),  # chains on the current lr
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=list(LR), total_steps=6),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    ],
)
def test_schedulers_see_the_unscaled_lr(schedule) -> None:
    params, twins = parameters(), parameters()
    optimizer, twin = two_groups(params), two_groups(twins)
    brake, scheduler, plain = EssStepScale(optimizer), schedule(optimizer), schedule(twin)
    for step in range(5):
        fill(params, step)
        fill(twins, step)
        brake.observe(torch.tensor([0.0, float(step)]))
        brake.step()
        twin.step()
        scheduler.step()
        plain.step()
        assert lrs(optimizer) == lrs(twin)
    assert not torch.equal(params[0], twins[0])  # and still the steps were scaled


def test_someone_elses_step_with_a_gradient_scaler() -> None:
    params = parameters()
    optimizer = two_groups(params)
    brake = EssStepScale(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))
    fill(params)
    before = [p.detach().clone() for p in params]
    with pytest.warns(RuntimeWarning, match="skipped"):
        brake.step(lambda: scaler.step(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    brake.observe(HALF)
    brake.step(lambda: scaler.step(optimizer))
    assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=True))


# --- broken batches ---------------------------------------------------------------------------------------------------


def tokens(*total: float, t: int = 10):
    """Token log-probs of both policies (float32) whose log-ratio sums are `total`."""
    log_prob = torch.tensor(total)[:, None].expand(-1, t) / t
    return log_prob, torch.zeros_like(log_prob), torch.ones_like(log_prob)


def reference_scale(log_w) -> float:
    """What the reference code does, in float32: absolute epsilon, Python's min, which returns 1.0 for NaN."""
    w = torch.exp(log_w)
    rho = float(w.sum() ** 2 / (w.pow(2).sum() + 1e-8)) / len(w)
    return min(1.0, rho) ** 0.5


FINITE = {
    "sums of +200 and -200": ((200.0, -200.0, 0.0, 150.0), 0.25),
    "all +200": ((200.0, 200.0, 200.0), 1.0),
    "all -200": ((-200.0, -200.0), 1.0),
    "equal tiny weights 1e-6": ((math.log(1e-6),) * 256, 1.0),
    "thousands of nats": ((9000.0, 9000.0, -9000.0, -9000.0), 0.5),
}


@pytest.mark.parametrize("case", FINITE)
def test_overflow_cases_of_the_reference_code_have_their_correct_ess(case: str) -> None:
    total, rho = FINITE[case]
    log_prob, behavior, mask = tokens(*total)
    brake = EssStepScale(torch.optim.AdamW(parameters(), lr=0.1))
    brake.observe(log_ratio(log_prob, behavior, mask), present(mask))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = brake.step()
    assert record.ess_fraction == near(rho, allow=SINGLE)
    assert record.step_scale == near(rho**0.5, allow=SINGLE)
    assert record.reason == ""
    wrong = reference_scale(torch.tensor(total))
    assert abs(wrong - rho**0.5) > 0.1 or case == "all +200", "the reference code gets this case right"


def test_the_reference_code_takes_a_full_step_on_overflow() -> None:
    assert reference_scale(torch.tensor([200.0, -200.0, 0.0, 150.0])) == 1.0  # NaN: what this brake is for


BROKEN = {
    "NaN log-ratio": (torch.tensor([0.0, float("nan"), 0.1]), None, "NaN"),
    "behavior probability zero": (torch.tensor([0.0, math.inf]), None, "inf"),
    "nothing has weight": (torch.tensor([-math.inf, -math.inf]), None, "every ratio is zero"),
    "all rows masked": (torch.zeros(4), torch.zeros(4), "no trajectory"),
    "no rows": (torch.zeros(0), None, "no trajectory"),
    "nothing observed": (None, None, "no trajectory"),
}


@pytest.mark.parametrize("trainer", ["step", "apply"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("reference", [1.0, "first", "running"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_batch_changes_nothing_but_the_log(case: str, reference, kind, trainer: str) -> None:
    log_w, here, why = BROKEN[case]
    params = parameters()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = two_groups(params, kind, weight_decay=0.1, **options)
    brake = EssStepScale(optimizer, reference=reference)
    fill(params)
    brake.observe(torch.zeros(4))
    brake.step()  # so that the optimizer has moments to lose
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    fill(params, value=float("nan"))  # a NaN log-ratio makes NaN coefficients, and lr 0 times NaN is NaN
    if log_w is not None:
        brake.observe(log_w, here)
    with pytest.warns(RuntimeWarning, match=f"step 2 skipped: .*{why}"):
        brake.step() if trainer == "step" else brake.apply()
    if trainer == "apply":
        assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
        optimizer.step()
        brake.restore()
    record = brake.record
    assert record is not None
    assert record.step_scale == 0.0
    assert why in record.reason
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert str(optimizer.state_dict()) == str(state)
    assert math.isnan(record.scalars()["vcpo/ess_fraction"])
    brake.observe(HALF)
    fill(params)
    assert 0 < brake.step().step_scale <= 0.75  # the broken batch left no trace in the reference either


# --- reference --------------------------------------------------------------------------------------------------------


def rho(fraction: float, n: int = 100):
    """n trajectories with that ESS fraction."""
    x = torch.full((n,), -math.inf)
    x[: round(n * fraction)] = 0.0
    return x


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (0.5, [1.0, 0.4, 1.0, 0.2]),
        ("first", [1.0, 0.2 / 0.8, 0.6 / 0.8, 0.1 / 0.8]),
        ("running", [1.0, 0.2 / 0.8, 1.0, 0.1 / ((0.8 + 0.2 + 0.6) / 3)]),
    ],
)
def test_reference(reference, expected: list[float]) -> None:
    brake = EssStepScale(torch.optim.SGD(parameters(), lr=1.0), reference=reference)
    found = []
    for fraction in (0.8, 0.2, 0.6, 0.1):
        brake.observe(rho(fraction))
        found.append(brake.step().step_scale)
    assert_near(found, expected, scale=0)


def test_a_poor_first_reference_is_announced() -> None:
    brake = EssStepScale(torch.optim.SGD(parameters(), lr=1.0), reference="first")
    brake.observe(rho(0.1))
    with pytest.warns(RuntimeWarning, match=r"first ESS fraction is 0\.1"):
        brake.step()


# --- checkpoints and settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [0.7, "first", "running"])
def test_checkpoints_continue_exactly(reference) -> None:
    batches = [torch.tensor([0.0, 0.5 * k, -0.8 * (k % 4)]) for k in range(8)]

    def run(resume_at: int | None) -> list[float]:
        brake = EssStepScale(torch.optim.AdamW(parameters(), lr=0.1), reference=reference)
        scale = []
        for k, batch in enumerate(batches):
            brake.observe(batch[:1])
            if k == resume_at:  # in the middle of accumulating, as far as it can be
                file = io.BytesIO()
                torch.save(brake.state_dict(), file)
                file.seek(0)
                brake = EssStepScale(torch.optim.AdamW(parameters(), lr=0.1), reference=reference)
                brake.load_state_dict(torch.load(file, weights_only=True))
            brake.observe(batch[1:])
            record = brake.step()
            assert record.step == k + 1
            scale.append(record.step_scale)
        return scale

    assert run(4) == run(None)
    assert len(set(run(None))) > 3


def test_checkpoint_between_steps_holds_the_unscaled_lr() -> None:
    optimizer = two_groups(parameters())
    brake = EssStepScale(optimizer)
    brake.observe(HALF)
    brake.step()
    assert [group["lr"] for group in optimizer.state_dict()["param_groups"]] == list(LR)
    assert brake.state_dict()["pending"] is None


def test_refusals() -> None:
    sgd = torch.optim.SGD(parameters(), lr=1.0)
    other = EssStepScale(sgd, exponent=0.5).state_dict()
    calls = {
        "reference: unknown name 'frist'; did you mean 'first'": lambda: EssStepScale(sgd, reference="frist"),
        r"reference: 1\.5": lambda: EssStepScale(sgd, reference=1.5),
        "exponent: -1": lambda: EssStepScale(sgd, exponent=-1.0),
        "exponent: LBFGS is of no known family": lambda: EssStepScale(torch.optim.LBFGS(parameters())),
        "log_ratio: shape": lambda: EssStepScale(sgd).observe(torch.zeros(2, 3)),
        "present": lambda: EssStepScale(sgd).observe(torch.zeros(2), torch.zeros(3)),
        "exponent: 1.0 here, 0.5 in the checkpoint": lambda: EssStepScale(sgd).load_state_dict(other),
        "state_dict: no 'exponent'": lambda: EssStepScale(sgd).load_state_dict({}),
    }
    for message, call in calls.items():
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_family_looks_through_wrappers() -> None:
    class Wrapped:
        def __init__(self, optimizer) -> None:
            self.optimizer = optimizer

    class MyAdam(torch.optim.AdamW):
        pass

    assert family_exponent(Wrapped(torch.optim.SGD(parameters(), lr=1.0))) == 1.0
    assert family_exponent(MyAdam(parameters())) == 0.5


class AveragesItsMicroBatches(EssStepScale):
    """The mutant: an ESS fraction for each micro-batch, and their mean for the step."""

    def observe(self, log_ratio, present=None):
        x = torch.exp(2 * log_ratio.double())
        self.fractions = [*getattr(self, "fractions", []), float(torch.exp(log_ratio.double()).mean() ** 2 / x.mean())]
        super().observe(log_ratio, present)

    def step(self, advance=None):
        super().step(advance)
        return sum(self.fractions) / len(self.fractions)


def test_micro_batches_are_merged_and_not_averaged():
    """An ESS of 0.9 over the batch is 1.0 in every micro-batch of one: a brake that averages never brakes."""
    log_ratio = torch.log(torch.tensor([2.0, 2.0, 1.0, 1.0], dtype=torch.float64))  # (sum w)^2 / (n sum w^2) = 36 / 40
    for cut in (1, 2, 4):
        brakes = [
            make(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0))
            for make in (EssStepScale, AveragesItsMicroBatches)
        ]
        for part in log_ratio.split(cut):
            for brake in brakes:
                brake.observe(part)
        true, averaged = (brake.step() for brake in brakes)
        assert true.ess_fraction == near(0.9)
        assert true.step_scale == near(0.9)
        assert averaged == near(0.9 if cut == 4 else 1.0)
