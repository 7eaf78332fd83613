"""Reports for people: Markdown and HTML from plain data, and texts coloured by token weight."""

from wmtp.reporting.data import (
    BenchmarkDetail,
    GenerationRef,
    ProblemVerdicts,
    ProgramSample,
    ReportRun,
    ReportTable,
    Score,
    TemperatureScores,
    TokenView,
)
from wmtp.reporting.generations import GeneratedProgram, write_generation_pages
from wmtp.reporting.report import ReportPaths, write_report
from wmtp.reporting.text import format_duration, format_number, format_percent
from wmtp.reporting.tokens import tokens_for_terminal

__all__ = [
    "BenchmarkDetail",
    "GeneratedProgram",
    "GenerationRef",
    "ProblemVerdicts",
    "ProgramSample",
    "ReportPaths",
    "ReportRun",
    "ReportTable",
    "Score",
    "TemperatureScores",
    "TokenView",
    "format_duration",
    "format_number",
    "format_percent",
    "tokens_for_terminal",
    "write_generation_pages",
    "write_report",
]
