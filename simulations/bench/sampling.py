"""Time to sample one update's rollouts from a character model: 8 problems x 8 samples x at most 12 tokens, one thread.

    python -m simulations.bench.sampling

Prints median, best and worst of the repeats, in milliseconds of wall time.
"""

import statistics
import time

import torch

from llm_bridge.models.language_model import CharTokenizer, LanguageModel, char_llama
from llm_bridge.rollouts import sample
from llm_bridge.tasks import load_task

SIZES = ({"hidden": 64, "layers": 2}, {"hidden": 96, "layers": 2}, {"hidden": 96, "layers": 3})


def milliseconds(lm: LanguageModel, repeats: int = 21) -> list[float]:
    """Sorted times of `sample` on addition, after one call to warm up; untrained, so nearly all use all 12 tokens."""
    task, times = load_task("addition"), []
    for seed in range(repeats + 1):
        started = time.perf_counter()
        sample(lm, task, range(8), group_size=8, max_new_tokens=12, seed=seed)
        times.append(1e3 * (time.perf_counter() - started))
    return sorted(times[1:])


def main() -> None:
    """Prints one line a model size."""
    torch.set_num_threads(1)
    for size in SIZES:
        lm = LanguageModel(char_llama(CharTokenizer(), **size), CharTokenizer(), "char")
        t = milliseconds(lm)
        spread = f"{statistics.median(t):.0f} ms ({t[0]:.0f} to {t[-1]:.0f})"
        print(f"{lm.model.num_parameters():,} parameters: {spread}")


if __name__ == "__main__":
    main()
