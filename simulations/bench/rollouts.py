"""How fast and in how much memory does `vcposim replay` read dumps, against the bare parser?

    python -m simulations.bench.rollouts [--sizes 10 100 1000] [--tokens 2000] [--folder DIR] [--json FILE]

Each size is a file of that many MB of token lists (2,000 tokens a response, rounded to 6 digits, as dumps are), as JSON
lines, gzip and Parquet (float32). Every reading is a fresh process, so that its peak resident memory is its own; the
clocks start once it has imported what it needs:

    parser      orjson.loads of each line, and nothing else (for Parquet: its batches, and nothing else)
    read_dump   everything up to the numbers of each trajectory, checks of the tokens included
    replay      the whole command, figure left out: what is above it does not grow with the file

`--parsers` compares JSON parsers instead, each on the same lines: what the choice of orjson rests on.
"""

import argparse
import gzip
import importlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

GROUP = 8


def rows(tokens: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Endless responses; log-ratios of a trajectory have a standard deviation of 0.01 nats a token."""
    rng, i = np.random.default_rng(seed), 0
    while True:
        sampler = -rng.gamma(0.5, 0.8, tokens)
        learner = np.minimum(sampler + 0.01 * rng.standard_normal(tokens), 0)
        yield {
            "group": i // GROUP,
            "reward": float(i % 2),
            "behavior_log_prob": np.round(sampler, 6).tolist(),
            "log_prob": np.round(learner, 6).tolist(),
        }
        i += 1


def write(folder: Path, megabytes: int, kind: str, tokens: int = 2000) -> Path:
    """A file of about that size, kept if it is there; gzip is sized before compression."""
    path = folder / f"rollouts_{megabytes}_{tokens}.{kind}"
    if path.exists():
        return path
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema(
            {"group": pa.int64(), "reward": pa.float64()}
            | dict.fromkeys(("behavior_log_prob", "log_prob"), pa.list_(pa.float32()))
        )
        count = megabytes * 1_000_000 // (tokens * 8)
        source = rows(tokens)
        with pq.ParquetWriter(path, schema) as writer:
            for done in range(0, count, 512):
                part = [next(source) for _ in range(min(512, count - done))]
                writer.write_table(pa.Table.from_pylist(part, schema=schema))
        return path
    with gzip.open(path, "wt", compresslevel=1) if kind == "jsonl.gz" else path.open("w") as file:
        size = 0
        for row in rows(tokens):
            if size >= megabytes * 1_000_000:
                break
            line = json.dumps(row) + "\n"
            file.write(line)
            size += len(line)
    return path


def parser_only(path: Path) -> int:
    """The bare parser: values are made, and dropped."""
    count = 0
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(batch_size=256):
                count += batch.num_rows
        return count
    import orjson

    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:  # type: ignore[attr-defined]
        for line in file:
            orjson.loads(line)
            count += 1
    return count


def read_only(path: Path) -> int:
    """`read_dump`, and nothing after."""
    from vcposim.replay import read_dump

    return int(read_dump(path).group.size)


def whole(path: Path) -> int:
    """The command."""
    from vcposim.commands.main import main

    return main(["replay", str(path), "--no-figure", "--json"])


WORK: dict[str, Callable[[Path], int]] = {"parser": parser_only, "read_dump": read_only, "replay": whole}
IMPORTS = {"parser": "json", "read_dump": "vcposim.replay", "replay": "vcposim.commands.replay"}
"""beside the parser's own library"""


def measured(name: str, path: Path) -> dict[str, float]:
    """What `timed` says in a process that does nothing else."""
    code = (
        "import sys, json; from pathlib import Path; from simulations.bench import rollouts as b; "
        f"print(json.dumps(b.timed({name!r}, Path({str(path)!r}))), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stderr.splitlines()[-1])
    return found


def timed(name: str, path: Path) -> dict[str, float]:
    """In this process: seconds of CPU (all threads) and of the clock, and the peak resident memory in MB.

    The peak is read from the process's own memory map: `ru_maxrss` is inherited from whoever started it.
    """
    for module in ("pyarrow.parquet" if path.suffix == ".parquet" else "orjson", IMPORTS[name]):
        importlib.import_module(module)
    start, clock = time.process_time(), time.perf_counter()
    WORK[name](path)
    seconds, clock = time.process_time() - start, time.perf_counter() - clock
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"seconds": seconds, "clock": clock, "peak_mb": int(peak[1]) / 1024 if peak else float("nan")}


def compare_parsers(folder: Path) -> list[dict[str, Any]]:
    """MB/s of JSON parsers on the same lines; those that are not installed are left out."""
    lines = write(folder, 25, "jsonl").read_bytes().splitlines()
    size = sum(map(len, lines)) / 1e6
    found = []
    for module, call in (("json", "loads"), ("orjson", "loads"), ("msgspec.json", "decode")):
        try:
            loads = getattr(importlib.import_module(module), call)
        except ImportError:
            continue
        start = time.perf_counter()
        for line in lines:
            loads(line)
        found.append({"parser": module, "mb_per_s": size / (time.perf_counter() - start)})
    return found


def main(argv: list[str] | None = None) -> None:
    """Write the files, read them, print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sizes", type=int, nargs="+", default=[10, 100], metavar="MB")
    options.add_argument("--tokens", type=int, default=2000, help="of a response")
    options.add_argument("--repeats", type=int, default=1, help="readings of which the median is taken")
    options.add_argument("--kinds", nargs="+", default=["jsonl", "jsonl.gz", "parquet"])
    options.add_argument("--folder", type=Path, default=Path("results/bench_rollouts"))
    options.add_argument("--json", type=Path, metavar="FILE", help="write the records there as well")
    options.add_argument("--parsers", action="store_true", help="compare JSON parsers and leave")
    a = options.parse_args(argv)
    a.folder.mkdir(parents=True, exist_ok=True)
    if a.parsers:
        for row in compare_parsers(a.folder):
            print(f"{row['parser']:12} {row['mb_per_s']:6.0f} MB/s")
        return
    records = []
    print("| file | MB | work | CPU seconds | clock | of the parser's CPU | of its clock | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in a.kinds:
        for size in a.sizes:
            path = write(a.folder, size, kind, a.tokens)
            runs = [{name: measured(name, path) for name in WORK} for _ in range(a.repeats)]
            found = {
                name: {key: statistics.median(run[name][key] for run in runs) for key in runs[0][name]} for name in WORK
            }
            for name, got in found.items():
                base = found["parser"]
                records.append({"kind": kind, "mb": size, "tokens": a.tokens, "work": name, **got})
                print(
                    f"| {kind} | {size} | {name} | {got['seconds']:.2f} | {got['clock']:.2f} "
                    f"| {base['seconds'] / got['seconds']:.2f} | {base['clock'] / got['clock']:.2f} "
                    f"| {got['peak_mb']:.0f} |",
                    flush=True,
                )
    if a.json is not None:
        a.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
