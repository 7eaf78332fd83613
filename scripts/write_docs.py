"""Writes the pages that are made from the code: the settings reference."""

from __future__ import annotations

from pathlib import Path

from wmtp.settings import render_reference

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    (ROOT / "docs/reference/settings.md").write_text(render_reference(), encoding="utf-8")
