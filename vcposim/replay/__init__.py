"""Rollouts dumped by a training framework: reading them, and what each estimator would have done with them."""

from vcposim.replay.as_json import to_json
from vcposim.replay.checks import Finding
from vcposim.replay.corrections import Correction, CorrectionRanking, rank
from vcposim.replay.dumps import Dump
from vcposim.replay.layouts import LAYOUTS, ColumnLayout
from vcposim.replay.metrics import LoggedRun, read_metrics
from vcposim.replay.names import parse_columns
from vcposim.replay.reading import read_dump
from vcposim.replay.replay import Replay, ReplayOptions, replay, summary, verdict
from vcposim.replay.tracks import Slice, Track, first_alarms, tracks

__all__ = [
    "LAYOUTS",
    "ColumnLayout",
    "Correction",
    "CorrectionRanking",
    "Dump",
    "Finding",
    "LoggedRun",
    "Replay",
    "ReplayOptions",
    "Slice",
    "Track",
    "first_alarms",
    "parse_columns",
    "rank",
    "read_dump",
    "read_metrics",
    "replay",
    "summary",
    "to_json",
    "tracks",
    "verdict",
]
