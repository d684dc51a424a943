"""A second solver on every obligation: cvc5 is asked again what z3 answered.

An obligation is a question of real and integer arithmetic without quantifiers, as SMT-LIB text: is this set of claims
contradictory? cvc5 shares no code with z3. It tries its strategies one after the other, in a process that is stopped
when their time is over."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue

STRATEGIES = (
    ({"nl-ext-tplanes": "true", "tlimit-per": "150"}, 5.0),
    ({"nl-ext": "none", "nl-cov": "true"}, 3.0),
    ({"nl-cov": "true", "tlimit-per": "2000"}, 10.0),
)
"""options of cvc5, and the seconds after which its process is stopped (coverings alone ignore a time limit)"""


def available() -> bool:
    """Whether cvc5 is installed."""
    return importlib.util.find_spec("cvc5") is not None


def _answer(text: str, options: dict[str, str]) -> str:
    import cvc5

    solver = cvc5.Solver(cvc5.TermManager())
    for name, value in options.items():
        solver.setOption(name, value)
    solver.setLogic("QF_NIRA")
    parser = cvc5.InputParser(solver)
    parser.setStringInput(cvc5.InputLanguage.SMT_LIB_2_6, text, "obligation")
    last = ""
    while not (command := parser.nextCommand()).isNull():
        last = str(command.invoke(solver, parser.getSymbolManager())).strip() or last
    return last if last in ("sat", "unsat") else "unknown"


def _serve(pipe: Connection) -> None:
    """A worker: (text, options) in, answer out, until told to stop."""
    while (question := pipe.recv()) is not None:
        pipe.send(_answer(*question))


class _Worker:
    """cvc5 in a process of its own, started again if it has to be stopped."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()

    def ask(self, text: str, options: dict[str, str], seconds: float) -> str:
        self.pipe.send((text, options))
        if self.pipe.poll(seconds):
            return str(self.pipe.recv())
        self.process.kill()
        self._start()
        return "unknown"

    def opinion(self, text: str) -> str:
        """`unsat` (cvc5 agrees), `sat` (it does not), or `unknown`."""
        for options, seconds in STRATEGIES:
            answer = self.ask(text, options, seconds)
            if answer != "unknown":
                return answer
        return "unknown"

    def stop(self) -> None:
        self.pipe.send(None)
        self.process.join()


class SecondOpinion:
    """Asks cvc5 while other work goes on: `ask` as obligations come, `answers` at the end."""

    def __init__(self, workers: int = 2) -> None:
        self.questions: SimpleQueue[str | None] = SimpleQueue()
        self.asked: set[str] = set()
        self.said: dict[str, str] = {}
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def _work(self) -> None:
        worker = None  # until there is a question
        while (text := self.questions.get()) is not None:
            worker = worker or _Worker()
            self.said[text] = worker.opinion(text)
        if worker is not None:
            worker.stop()

    def ask(self, texts: Iterable[str]) -> None:
        """Put the obligations that are new in the queue."""
        for text in sorted(set(texts) - self.asked):
            self.asked.add(text)
            self.questions.put(text)

    def answers(self) -> dict[str, str]:
        """Wait for the rest; obligation -> `unsat`, `sat` or `unknown`."""
        for _ in self.threads:
            self.questions.put(None)
        for thread in self.threads:
            thread.join()
        return self.said
