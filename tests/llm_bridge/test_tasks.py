"""Tasks: oracles are right, mistakes are wrong, and nothing that a policy writes can stop a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_bridge.tasks import TASKS, load_task
from llm_bridge.tasks.base import STRIDE, Task
from llm_bridge.tasks.calculator import CalculatorError, calculate
from llm_bridge.tasks.tool import INSTRUCT, CalculatorTask, one_operation
from tests.kit.statistical import near
from vcposim.errors import InputError

STYLES = ("short", "instruct")
HOSTILE = (
    "",
    " ",
    "\0",
    "9" * 5000,
    "9**9**9**9",
    "__import__('os')",
    "((((" * 50,
    "<answer></answer>",
    "1/0",
    "{}",
    "nan",
)
ANY = [(name, style) for name in TASKS for style in STYLES]


def play(task: Task, index: int) -> tuple[list[str | None], float]:
    """The oracle's episode: the environment's replies, and the reward."""
    problem = task.problem(index)
    responses = task.demonstration(problem)
    replies = [task.reply(problem, responses[:turn]) for turn in range(1, len(responses) + 1)]
    return replies, task.reward(problem, responses)


@pytest.mark.parametrize(("name", "style"), ANY)
def test_the_oracle_is_rewarded_and_ends_the_episode_itself(name: str, style: str):
    task = load_task(name, style=style, seed=3)
    for index in range(25):
        replies, reward = play(task, index)
        assert reward == 1.0
        assert replies[-1] is None
        assert None not in replies[:-1]
        assert len(replies) <= task.max_turns


@pytest.mark.parametrize(("name", "style"), ANY)
def test_nothing_a_policy_writes_raises_or_pays(name: str, style: str):
    task = load_task(name, style=style)
    problem = task.problem(0)
    assert task.reward(problem, []) == 0.0
    for text in HOSTILE:
        assert task.reply(problem, [text]) is None or task.max_turns > 1
        assert task.reward(problem, [text]) == 0.0


@given(st.text(max_size=30), st.sampled_from(sorted(TASKS)), st.sampled_from(STYLES))
@pytest.mark.slow
def test_any_text_is_survived(text: str, name: str, style: str):
    task = load_task(name, style=style)
    problem = task.problem(1)
    assert task.reward(problem, [text]) in (0.0, 1.0)
    task.reply(problem, [text])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_another_problems_answer_is_mostly_wrong(name: str):
    """A verifier that accepts whatever is well-formed would be found here."""
    task = load_task(name)
    paid = [task.reward(task.problem(i), task.demonstration(task.problem(i + 1))) for i in range(40)]
    assert sum(paid) <= 30  # yes or no: about 20


@pytest.mark.parametrize("name", sorted(TASKS))
def test_problems_are_a_function_of_seed_and_index(name: str):
    again, other = load_task(name), load_task(name, seed=1)
    first = [load_task(name).problem(i).prompt for i in range(20)]
    assert first == [again.problem(i).prompt for i in range(20)]
    assert first != [other.problem(i).prompt for i in range(20)]
    assert first[1:] != [other.problem(i).prompt for i in range(19)]  # reasoning-gym's seeds are shifts of one sequence


def test_a_partial_score_is_no_reward():
    task = load_task("countdown")
    problem = task.problem(0)
    used = ",".join(map(str, problem.answer["metadata"]["numbers"]))
    assert problem.prompt.startswith(used)
    assert problem.answer["metadata"]["target"] != 0
    assert task.dataset.score_answer(used.replace(",", "-"), problem.answer) == near(0.05)  # type: ignore[attr-defined]
    assert task.reward(problem, [used.replace(",", "-")]) == 0.0


def test_countdown_wants_each_number_once():
    task = load_task("countdown")
    problem = task.problem(0)
    target = str(problem.answer["metadata"]["target"])
    (solution,) = task.demonstration(problem)
    assert task.reward(problem, [target]) == 0.0
    assert task.reward(problem, [f"{solution}+1-1"]) == 0.0
    assert task.reward(problem, [f"({solution})"]) == 1.0


def test_an_instructed_model_is_read_by_its_tags_or_its_last_words():
    task = load_task("addition", style="instruct")
    problem = task.problem(0)
    right = problem.answer["answer"]
    for text in (f"<answer>{right}</answer>", f"1 + 1 = 2, so it is {right}.", f"<answer> {right} </answer> or 7"):
        assert task.reward(problem, [text]) == 1.0
    for text in (f"{right} or 7", f"<answer>7</answer> {right}"):
        assert task.reward(problem, [text]) == 0.0


def test_a_chain_of_thought_is_as_long_as_asked_for_and_one_slip_spoils_it():
    task = load_task("running_sum", steps=200, modulus=7, seed=2)
    problem = task.problem(5)
    digits = [int(c) for c in problem.prompt[:-1]]
    (thought,) = task.demonstration(problem)
    assert len(digits) == len(thought) == 200
    assert thought == "".join(str(sum(digits[: i + 1]) % 7) for i in range(200))
    slipped = [(int(c) + (i >= 120)) % 7 for i, c in enumerate(thought)]
    assert task.reward(problem, ["".join(map(str, slipped))]) == 0.0
    assert task.reward(problem, [thought[1:]]) == task.reward(problem, [thought[-1]]) == 0.0
    with pytest.raises(InputError, match="modulus must be 2 to 10"):
        load_task("running_sum", modulus=11)


# ------------------------------------------------------------------------------------------------------------ tool use


def broken(text: str) -> object:
    raise RuntimeError("the tool is down")


def test_calls_are_answered_and_errors_survived():
    task = load_task("calculator", style="short")
    problem = task.problem(0)
    assert task.reply(problem, ["c12*7"]) == "=84;"
    assert [task.reply(problem, [text]) for text in ("c1+2+3", "c1/0", "c1+", "7")] == [
        "!too long;", "!zero;", "!syntax;", "!format;"
    ]  # fmt: skip
    assert task.reply(problem, ["c1+1"] * task.max_turns) is None


def test_a_tool_that_raises_is_an_error_message_and_the_episode_goes_on():
    whole = load_task("calculator", style="instruct")
    assert isinstance(whole, CalculatorTask)
    task = CalculatorTask("down", whole.dataset, INSTRUCT, {}, max_turns=4, tool=broken)
    problem = task.problem(0)
    said = "calc: 1 + 1"
    assert task.reply(problem, [said]) == "error: tool"
    assert task.reward(problem, [said, f"answer: {problem.answer['answer']}"]) == 1.0


def test_one_operation_a_call():
    assert one_operation("-3+5") == 2
    with pytest.raises(CalculatorError, match="too long"):
        one_operation("1+2+3")


@given(st.text(alphabet="0123456789+-*/() ", max_size=20))
def test_the_calculator_agrees_with_python_or_refuses(text: str):
    try:
        value = calculate(text)
    except CalculatorError:
        return
    assert float(value) == near(eval(text.strip()))  # the alphabet holds no names


@pytest.mark.parametrize(
    "text", ["9**9**9", "1//2", "a+1", "1.5+1", "(1,2)", "[1]", "f(1)", "True", "1 if 1 else 2", ""]
)
def test_the_calculator_refuses_all_else(text: str):
    with pytest.raises(CalculatorError, match="syntax"):
        calculate(text)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("aditon", {}, "did you mean 'addition'"),
        ("gym:spel_backward", {}, "did you mean 'gym:spell_backward'"),
        ("addition", {"style": "shrot"}, "did you mean 'short'"),
        ("addition", {"digit": 2}, "did you mean 'digits'"),
        ("calculator", {"style": "shrot"}, "did you mean 'short'"),
        ("addition", {"seed": -1}, "seed: -1"),
        ("addition", {"digits": 0}, "do not suit 'basic_arithmetic'"),
        ("calculator", {"terms": 1}, "do not suit 'chain_sum'"),
        ("gym:propositional_logic", {}, "does not know its own answer"),
    ],
)
def test_errors_say_what_to_do(name: str, options: dict, says: str):
    with pytest.raises(InputError) as error:
        load_task(name, **options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_verifier_that_accepts_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch):
    from reasoning_gym.algorithmic.spell_backward import SpellBackwardDataset

    assert play(load_task("gym:spell_backward"), 0)[1] == 1.0
    monkeypatch.setattr(SpellBackwardDataset, "score_answer", lambda self, answer, entry: 1.0)
    with pytest.raises(InputError, match="accepts nonsense"):
        load_task("gym:spell_backward")


def test_there_are_so_many_problems_and_no_more():
    task = load_task("addition")
    task.problem(STRIDE - 1)
    for index in (-1, STRIDE):
        with pytest.raises(InputError, match="is no problem"):
            task.problem(index)
