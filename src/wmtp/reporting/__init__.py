"""Reports for people: Markdown and HTML from plain data, and texts coloured by token weight."""

from wmtp.reporting.data import ProgramSample, ReportRun, Score, TokenView
from wmtp.reporting.report import ReportPaths, write_report
from wmtp.reporting.text import format_duration, format_number, format_percent
from wmtp.reporting.tokens import tokens_for_terminal

__all__ = [
    "ProgramSample",
    "ReportPaths",
    "ReportRun",
    "Score",
    "TokenView",
    "format_duration",
    "format_number",
    "format_percent",
    "tokens_for_terminal",
    "write_report",
]
