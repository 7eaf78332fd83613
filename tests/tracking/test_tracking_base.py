"""Names, flat parameters, code version, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp.tracking import experiment_name, flatten_params, git_commit


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        (["mbpp"], "mtp/a/mbpp"),
        (["mbpp", "contest"], "mtp/a/mbpp+contest"),
        (["builtin:microcode"], "mtp/a/microcode"),
        (["data/own.jsonl.gz", "s3://b/x/train.parquet", "org/set/"], "mtp/a/own+train+set"),
        ([".jsonl"], "mtp/a/.jsonl"),
    ],
)
def test_an_experiment_is_named_by_algorithm_and_sources(sources: list[str], name: str) -> None:
    assert experiment_name("a", sources) == name


def test_an_experiment_name_fits_the_limit() -> None:
    assert len(experiment_name("a", ["x" * 300] * 3)) == 500


def test_nested_settings_become_dotted_names() -> None:
    flat = flatten_params(
        {"loss": {"lambda": 0.5, "none": None}, "data": {"sources": ["a", "b"]}, "empty": {}, "t": "x"}
    )
    assert flat == {
        "loss.lambda": "0.5",
        "loss.none": "null",
        "data.sources": '["a", "b"]',
        "empty": "{}",
        "t": "x",
    }


@given(st.dictionaries(st.text(max_size=400), st.one_of(st.text(max_size=9000), st.floats(), st.none())))
def test_flat_settings_fit_the_limits_of_the_server(params: dict[str, object]) -> None:
    for key, value in flatten_params(params).items():
        assert len(key) <= 250
        assert len(value) <= 6000


def test_a_cut_value_shows_that_it_was_cut() -> None:
    assert flatten_params({"x": "a" * 7000})["x"].endswith("a...")


def test_the_commit_is_found_with_its_state_and_only_for_tracked_files(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "package").mkdir()
    (tmp_path / "package/x.py").write_text("1")
    assert git_commit(tmp_path / "package") is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "empty")
    assert git_commit(tmp_path / "package") is None, "files of an installed package are not of that commit"
    git("add", "package")
    git("commit", "-q", "-m", "add")
    assert git_commit(tmp_path / "package") == git("rev-parse", "HEAD")
    (tmp_path / "package/x.py").write_text("2")
    assert git_commit(tmp_path / "package") == git("rev-parse", "HEAD") + "-dirty"


def test_tracking_and_reporting_load_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys, wmtp.tracking, wmtp.reporting\n"
        "assert 'mlflow' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
        "import wmtp.tracking.mlflow_tracker\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
