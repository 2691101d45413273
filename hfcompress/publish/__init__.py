"""What others get to see of a compressed model: its card, its picture and its tables."""

from __future__ import annotations

from hfcompress.publish.card import write_model_card
from hfcompress.publish.facts import Facts, load_facts
from hfcompress.publish.hub import Pushed, push
from hfcompress.publish.mixin import ModelCardMixin
from hfcompress.publish.plots import plot_size_against_quality
from hfcompress.publish.report import write_report
from hfcompress.publish.result import print_result
from hfcompress.publish.tables import inspection_tables, measurement_table, stage_table

__all__ = [
    "Facts",
    "ModelCardMixin",
    "Pushed",
    "inspection_tables",
    "load_facts",
    "measurement_table",
    "plot_size_against_quality",
    "print_result",
    "push",
    "stage_table",
    "write_model_card",
    "write_report",
]
