"""The kit judges: the catalogue passes, planted wrong estimators die by the law named for them, messages reproduce."""

import os
import pickle
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vcposim.testing.kit
from tests.kit.statistical import assert_near
from vcposim.batch import Batch
from vcposim.catalogue import CATALOGUE
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.testing import LAWS, Violation, check_estimator, laws_of, reproduce
from vcposim.testing.laws import bfloat16
from vcposim.testing.strategies import NUMPY, strings_of
from vcposim.weights import Weighting


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.slow
def test_the_catalogue_keeps_its_word(name: str):
    """Every universal law that applies, and what the entry claims: shift, unbiasedness, its host at lag 0."""
    report = check_estimator(name, examples=5)
    assert report.keys() == LAWS.keys()
    assert report["permutation"] == report["finite"] == report["padding"] == "holds"
    assert (report["shift"] == "holds") == CATALOGUE[name].shift_invariant


@pytest.mark.parametrize("name", [name for name, one in CATALOGUE.items() if one.breaks])
def test_a_law_that_an_entry_says_it_breaks_is_broken_by_it(name: str):
    for law in CATALOGUE[name].breaks:
        assert LAWS[law].universal
        others = [other for other, one in LAWS.items() if one.universal and other != law]
        with pytest.raises(Violation, match=law):
            check_estimator(CATALOGUE[name].estimator, without=others)
        assert check_estimator(name, without=others)[law] == "not claimed"


def w(batch: Batch) -> Any:
    return np.exp(np.minimum(batch.log_ratio, 300))


def mean(x: Any) -> Any:
    return x.mean(axis=-1, keepdims=True)


def correct(batch: Batch) -> Any:
    n = batch.reward.shape[-1]
    return w(batch) * (batch.reward - mean(batch.reward)) * n / (n - 1)


def sum_for_mean(batch):
    return batch.reward.shape[-1] * correct(batch)


def truncated(batch):
    return np.minimum(w(batch), 2) * (batch.reward - mean(batch.reward))


def uncorrected(batch):
    return batch.reward - mean(batch.reward)


def geometric_for_sequence(batch):
    return np.exp(batch.log_ratio / 2) * batch.reward


def baseline_with_an_epsilon(batch):
    a = w(batch) ** 2
    return w(batch) * (batch.reward - (a * batch.reward).sum(-1, keepdims=True) / (a.sum(-1, keepdims=True) + 1e-3))


def draws_its_own_noise(batch, generator=np.random.default_rng(0)):  # noqa: B008  (a shared state is the point)
    return w(batch) * batch.reward * generator.choice([1.0, 2.0])


def nan_is_masked_in_place_of_the_weight(batch):
    """where(ratio out of band, 1, ratio): a NaN is in no band, so it counts in full"""
    return np.where((batch.log_ratio > -2) & (batch.log_ratio < 2), w(batch), 1.0) * batch.reward


def sum_of_token_ratios(batch):
    """unsloth-zoo#870"""
    return (
        np.exp(np.minimum(batch.on_tokens(batch.log_ratio), 300) * 1.0).sum(-1, where=batch.token_mask > 0)
        * batch.reward
    )


def length_normalised(batch):
    """TRL#5814"""
    return np.exp(np.minimum(batch.on_tokens(batch.log_ratio).sum(-1) / batch.token_length(), 300)) * batch.reward


def wrong_shape(batch):
    return batch.reward.sum(axis=-1)


TOKENS = {"needs": ["tokens"]}

WRONG: list[tuple[Any, str, dict[str, Any]]] = [
    (sum_for_mean, "unbiased", {}),
    (truncated, "unbiased", {}),
    (uncorrected, "unbiased", {}),
    (geometric_for_sequence, "unbiased", {}),
    (baseline_with_an_epsilon, "shift", {}),
    (draws_its_own_noise, "deterministic", {"without": ["permutation", "groups", "padding", "float32", "bfloat16"]}),
    (nan_is_masked_in_place_of_the_weight, "nan", {}),
    (sum_of_token_ratios, "unbiased", TOKENS),
    (sum_of_token_ratios, "levels", TOKENS),
    (length_normalised, "unbiased", TOKENS),
    (length_normalised, "levels", TOKENS),
    (wrong_shape, "permutation", {}),
]


WRONG += [
    (law.wrong.coefficients, name, {f.name: x for f in fields(law.wrong)[1:] if (x := getattr(law.wrong, f.name))})
    for name, law in LAWS.items()
]


@pytest.mark.parametrize(("wrong", "killer", "setting"), WRONG, ids=[f"{f.__name__}--{law}" for f, law, _ in WRONG])
@pytest.mark.slow
def test_a_wrong_estimator_dies_by_the_law_named_for_it(wrong: Any, killer: str, setting: dict[str, Any]):
    claims = [] if LAWS[killer].universal or killer in ("lag_zero", "dominance") else [killer]
    with pytest.raises(Violation) as caught:
        check_estimator(wrong, claims, **setting)
    message = str(caught.value)
    assert message.startswith(f"{wrong.__name__} breaks {killer!r}: {LAWS[killer].statement}")
    assert f"source: {LAWS[killer].source}" in message
    size = re.search(r"counterexample \((\d+) (samples|arms|strings)\)", message)
    assert size, message
    assert 1 <= int(size[1]) <= 4
    if wrong is not draws_its_own_noise:  # which never repeats itself
        replay(message, wrong)


def replay(message: str, wrong: Any) -> None:
    """The printed line, run as it stands, breaks the same law."""
    line = message.split("reproduce: ")[1]
    names = {"vcposim": vcposim, "Estimator": Estimator, "Weighting": Weighting, wrong.__name__: wrong}
    with pytest.raises(Violation) as caught:
        eval(line, names)
    assert str(caught.value).split("\n")[2:4] == message.split("\n")[2:4]


NEWCOMER = """
import numpy as np
import pytest
from vcposim.testing import laws_of

def weight(batch):
    return np.exp(np.minimum(batch.log_ratio, 300))

def leave_one_out_with_itself(batch):
    return weight(batch) * (batch.reward - batch.reward.mean(-1, keepdims=True))

def normalized_after_weighting(batch):
    c = weight(batch) * (batch.reward - batch.reward.mean(-1, keepdims=True))
    return c / (np.sqrt((c * c).mean(-1, keepdims=True)) + 1e-6)

@pytest.mark.parametrize("law", laws_of(leave_one_out_with_itself, claims=["unbiased"], examples=10))
def test_first(law):
    law()

@pytest.mark.parametrize("law", laws_of(normalized_after_weighting, claims=["weight_scale"], examples=10))
def test_second(law):
    law()
"""


@pytest.mark.slow
def test_three_lines_catch_a_newcomer(tmp_path: Path):
    """A parametrized test of three lines, run by pytest: wrong estimators fail by name, on four samples at most."""
    (tmp_path / "test_mine.py").write_text(NEWCOMER)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    failed = re.findall(r"FAILED test_mine.py::(\S+)", done.stdout)
    assert {"test_first[unbiased]", "test_second[weight_scale]"} <= set(failed), done.stdout
    sizes = [int(n) for n in re.findall(r"counterexample \((\d+) (?:samples|arms)\)", done.stdout)]
    assert sizes
    assert max(sizes) <= 4


def test_laws_of_are_the_laws_it_must_keep():
    law = laws_of("rloo", claims=["weight_scale"], without=["padding"], examples=30)
    names = [trial.__name__ for trial in law]
    assert {"weight_scale", "shift", "one_token", "levels", "permutation"} <= set(names)
    assert not {"padding", "unbiased", "no_leak", "token_mask"} & set(names)
    with pytest.raises(Violation, match="'rloo' breaks 'weight_scale'"):
        law[names.index("weight_scale")]()
    law[names.index("shift")]()


def test_a_violation_travels_between_processes():
    with pytest.raises(Violation) as caught:
        check_estimator("sequence_tis", ["unbiased"])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_rounding_to_bfloat16_is_pytorchs():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32) * np.float32(2.0) ** np.arange(-60, 40).repeat(
        100
    )
    x = np.concatenate([x, [0.0, -0.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8]]).astype(np.float32)
    assert np.array_equal(bfloat16(x), torch.tensor(x).to(torch.bfloat16).float().numpy())


def test_an_exception_is_a_violation_with_its_cause():
    def fragile(batch):
        return batch.reward / batch.reward.tolist()["no"]

    with pytest.raises(Violation, match="it raised TypeError: list indices must be integers") as caught:
        check_estimator(fragile)
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.slow
def test_a_correct_estimator_passes_and_the_report_says_what_it_does_not_claim():
    report = check_estimator(correct, ["shift", "reward_scale", "weight_scale", "unbiased"], without=["padding"])
    assert report["unbiased"] == report["groups"] == "holds"
    assert report["padding"] == report["lag_zero"] == "not claimed"
    assert report["token_mask"] == "does not apply"


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["a trajectory", "a token"])
def test_a_correct_sequence_weight_keeps_its_claims_on_token_ratios(shape: str):
    def by_hand(batch):
        c = np.exp(np.minimum(batch.on_tokens(batch.log_ratio).sum(-1), 300)) * batch.reward
        return c if shape == "a trajectory" else c[..., None] * batch.token_mask

    report = check_estimator(by_hand, ["unbiased", "levels"], **TOKENS)
    assert report["unbiased"] == report["levels"] == "holds"


@pytest.mark.parametrize(
    ("claim", "setting", "remedy"),
    [
        ("one_token", TOKENS, "claim levels instead"),
        ("lag_zero", {}, "name one as host"),
        ("dominance", {}, "it needs rivals to compare with"),
        ("no_leak", {}, "judge it on torch's"),
        ("least_variance", TOKENS, "drop the claim"),
        ("token_mask", {}, "pass needs"),
        ("groups", {"needs": ["grouped"]}, "it spans prompts"),
    ],
)
def test_a_claim_that_cannot_be_tried_is_no_claim_kept(claim: str, setting: dict[str, Any], remedy: str):
    with pytest.raises(InputError, match=f"claims: '{claim}' does not apply to correct: .*{remedy}"):
        check_estimator(correct, [claim], **setting)


def test_every_law_that_may_not_apply_says_what_it_takes():
    assert {name for name, law in LAWS.items() if law.otherwise} == {
        *("one_token", "lag_zero", "dominance", "no_leak", "least_variance", "token_mask", "groups")
    }


def test_strings_know_their_gradient():
    """Over every batch of one draw, w R s has the gradient as its mean; and a sampler that is the learner weighs 1."""
    third = ["1/3", "2/3"]
    for stops, reward in ((False, [0, 1, 2, 5]), (True, [3, 1, -1])):
        problem = strings_of(
            target=[["1/2", "1/2"], third, ["1/5", "4/5"]], behavior=[third, ["1/2", "1/2"], third], reward=reward,
            stops=stops,
        )  # fmt: skip
        batch, mass = problem.all_batches(1, NUMPY)
        assert mass.sum() == 1
        c = np.exp(batch.log_ratio.sum(-1)) * batch.reward
        got = (c[..., None, None] * batch.scored().score * mass.astype(float)[:, None, None, None]).sum((0, 1, 2))
        assert_near(got, problem.gradient.astype(float))


def test_judging_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    line = "from vcposim.testing import check_estimator; check_estimator('rloo', examples=3)"
    environment = {k: v for k, v in os.environ.items() if k != "HYPOTHESIS_STORAGE_DIRECTORY"}
    subprocess.run([sys.executable, "-c", line], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []


def test_opob_has_the_least_variance_and_dominates():
    rivals = ["sequence_is", Estimator(baseline="group_mean"), correct]
    report = check_estimator(Estimator(baseline="opob"), ["least_variance"], dominates=rivals[:2], examples=20)
    assert report["least_variance"] == report["dominance"] == "holds"


@pytest.mark.slow
def test_torch_functions_are_judged_too():
    torch = pytest.importorskip("torch")

    def right(batch: Batch) -> Any:
        n = batch.reward.shape[-1]
        weight = torch.exp(torch.clamp(batch.log_ratio, max=40.0))
        return weight * (batch.reward - batch.reward.mean(dim=-1, keepdim=True)) * n / (n - 1)

    def wrong(batch: Batch) -> Any:
        return torch.exp(torch.clamp(batch.log_ratio, max=40.0)) * (batch.reward - batch.reward.mean())

    report = check_estimator(right, ["shift", "unbiased"], without=["padding"], convert=torch.tensor, examples=20)
    assert report["unbiased"] == "holds"
    with pytest.raises(Violation, match="wrong breaks 'groups'"):
        check_estimator(wrong, convert=torch.tensor, without=["padding"])


def test_a_violation_of_a_catalogue_name_can_be_pasted():
    with pytest.raises(Violation) as caught:
        check_estimator("sequence_tis", ["unbiased"])
    assert "reproduce: vcposim.testing.reproduce('unbiased', 'sequence_tis', target=" in str(caught.value)


def test_reproduce_is_silent_where_the_law_holds():
    reproduce("shift", "rloo", reward=[0, 1], ratio=[1, "1/2"], score=[[1], ["-1/3"]], length=[1, 2])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: check_estimator("rlooo"), "estimator: unknown name 'rlooo'; did you mean 'rloo'"),
        (lambda: check_estimator("rloo", ["unbias"]), "claims: unknown name 'unbias'; did you mean 'unbiased'?"),
        (lambda: check_estimator("rloo", without=["pading"]), "claims: unknown name 'pading'; did you mean 'padding'?"),
        (lambda: check_estimator(3), "estimator: 3 is no Estimator, catalogue name or function of a Batch"),  # type: ignore[arg-type]
        (lambda: check_estimator("rloo", convert="torhc"), "convert: 'torhc' is no array library installed here"),
        (lambda: check_estimator("nowhere:f"), "estimator: no module 'nowhere' in "),
        (lambda: laws_of("rloo", host="gropo"), "estimator: unknown name 'gropo'; did you mean 'grpo'"),
        (lambda: reproduce("shifts", "rloo"), "law: unknown name 'shifts'; did you mean 'shift'?"),
    ],
)
def test_wrong_questions_are_refused_in_one_line(call: Any, says: str):
    with pytest.raises(InputError) as caught:
        call()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
