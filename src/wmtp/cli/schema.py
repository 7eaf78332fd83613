"""`wmtp schema`: the JSON schema of the settings files."""

from __future__ import annotations

import json
import sys


def schema() -> None:
    """Print the JSON schema of config and recipe, for editors."""
    from wmtp.settings import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n")
