"""Records of `simulations.bench.scores`, one JSON line a measurement, and the tables made of them.

A case may be measured in several sittings; ratios of the same case, machine and setting are pooled.
"""

import datetime
import json
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

JsonRow = dict[str, Any]


def machine(device: torch.device) -> JsonRow:
    """What a number depends on besides the code: processor, library, day."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"machine": name, "torch": torch.__version__, "date": datetime.datetime.now().date().isoformat()}


def processor() -> str:
    """The processor's name, family and model, vector width and caches, as far as the system tells.

    A hypervisor may hide the name; family and model still tell the generation.
    """
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    except OSError:
        return platform.processor() or platform.machine()
    told = {key.strip(): value.strip() for key, value in reversed(lines)}
    wide = "AVX-512" if "avx512f" in told.get("flags", "") else "AVX2" if "avx2" in told.get("flags", "") else "no AVX2"
    cache = ", ".join(f"L{level} {size}" for level in (2, 3) if (size := _cache(level)))
    model = f"family {told.get('cpu family')} model {told.get('model')}"
    return f"{told.get('model name')} ({model}, {wide}, {cache}), one thread"


def _cache(level: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size")
    return path.read_text().strip() if path.exists() else ""


def append(path: str, row: JsonRow) -> None:
    """Add one line."""
    with Path(path).open("a") as file:
        file.write(json.dumps({key: _rounded(value) for key, value in row.items()}) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return round(value, 4) if isinstance(value, float) else value


def load(path: str) -> list[JsonRow]:
    """All lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def half_spread(values: list[float]) -> float:
    """Half the interquartile range."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return (high - low) / 2


def markdown(rows: Iterable[JsonRow]) -> str:
    """A table per machine and setting: of time, then of memory."""
    rows = list(rows)
    parts = []
    for key, title, cell in (("ratios", "Time", _ratio), ("peak", "Peak memory", _peak)):
        kept = [row for row in rows if key in row]
        for place in dict.fromkeys(_place(row) for row in kept):
            parts.append(_table([row for row in kept if _place(row) == place], key, title, cell))
    return "\n\n".join(parts)


def _place(row: JsonRow) -> str:
    words = [row["machine"], row["device"], row["dtype"], f"torch {row['torch']}", f"prompt {row['prompt']:g}"]
    words += ["gradient checkpointing"] if row["checkpointing"] else []
    return ", ".join([*words, row["note"]] if row.get("note") else words)


def _table(rows: list[JsonRow], key: str, title: str, cell: Any) -> str:
    dates = sorted({row["date"] for row in rows})
    columns: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        for method, value in row[key].items():
            columns.setdefault(row["case"], {}).setdefault(method, []).append((row, value))
    methods = list(dict.fromkeys(method for column in columns.values() for method in column))
    methods = [method for method in methods if key == "ratios" or method != "plain"]
    head = [f"{title}. {_place(rows[0])}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}", ""]
    head += [f"| over plain | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    body = [f"| {m} | {' | '.join(cell(column, m) for column in columns.values())} |" for m in methods]
    return "\n".join(head + body)


def _ratio(column: dict[str, list[Any]], method: str) -> str:
    """Median, half the interquartile range, number of pairs; of several processes how far their medians are apart."""
    found = [value for _, value in column.get(method, [])]
    if not found:
        return ""
    refused = [value for value in found if isinstance(value, str)]
    pooled = [x for value in found if isinstance(value, list) for x in value]
    if not pooled:
        return refused[0].split(":")[0]
    each = [statistics.median(value) for value in found if isinstance(value, list)]
    apart = f" in {len(each)} processes, {min(each):.3f} to {max(each):.3f}" if len(each) > 1 else ""
    return f"{statistics.median(pooled):.3f} ± {half_spread(pooled):.3f} ({len(pooled)}{apart})"


def _peak(column: dict[str, list[Any]], method: str) -> str:
    """Ratio to plain's peak, and the excess in gradients of the model."""
    if method not in column:
        return ""
    row, value = column[method][-1]
    if isinstance(value, str):
        return value.split(":")[0]
    floor = row["peak"]["plain"]
    return f"{value / floor:.2f} x, {(value - floor) / row['gradient']:+.2f} gradients"
