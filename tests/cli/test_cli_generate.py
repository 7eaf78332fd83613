"""`wmtp generate`: text to standard output, figures to standard error, one clear message where it cannot."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from wmtp.cli.app import main
from wmtp.components.loader.builtin import build_micro_llama, micro_tokenizer
from wmtp.components.tokenizer import HfTokenizer, TokenizerSettings
from wmtp.modeling import MTPModel
from wmtp.modeling.drafting import HeadsSession

DRAFT_FROM = ("--prompt", "a", "--speculative", "--draft-from")
PROMPT = "# reverse the text\ndef f(s):\n"


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An export with four heads, and random text to write."""
    folder = tmp_path_factory.mktemp("generate") / "micro"
    model = MTPModel.from_causal_lm(build_micro_llama(), horizon=4)
    model.save_pretrained(folder, tokenizer=micro_tokenizer())
    return str(folder)


def write(checkpoint: str, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, str]:
    arguments = ("--checkpoint", checkpoint, "--prompt", PROMPT, "--max-new-tokens", "24", *options)
    assert run_cli("generate", *arguments) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_the_text_is_what_transformers_writes_with_and_without_drafts(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = micro_tokenizer()
    ids = HfTokenizer(TokenizerSettings(path=checkpoint)).encode_prompt(PROMPT)
    output = AutoModelForCausalLM.from_pretrained(checkpoint).generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=24, do_sample=False
    )
    expected = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True) + "\n"
    assert write(checkpoint, capsys)[0] == expected
    for options in (["--speculative"], ["--speculative", "--tree", "2,2"]):
        text, figures = write(checkpoint, capsys, *options)
        assert text == expected
        assert "24 tokens in" in figures
        assert "tokens/s; ended by length;" in figures
        assert "tokens a forward; drafts accepted, by head:" in figures


def test_sampling_follows_its_options_and_its_seed(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = write(checkpoint, capsys)[0]
    sampled = write(checkpoint, capsys, "--temperature", "1")[0]
    assert write(checkpoint, capsys, "--temperature", "1")[0] == sampled
    assert write(checkpoint, capsys, "--temperature", "1", "--seed", "1")[0] != sampled
    for option in (("--top-k", "1"), ("--top-p", "1e-9"), ("--min-p", "1")):
        assert write(checkpoint, capsys, "--temperature", "1", *option)[0] == greedy
        assert write(checkpoint, capsys, "--temperature", "1", "--speculative", *option)[0] == greedy


def test_a_stop_string_ends_the_text_and_is_never_shown(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write(checkpoint, capsys)[0].rstrip("\n")
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    for options in ((), ("--speculative",)):
        text, figures = write(checkpoint, capsys, "--stop", stop, *options)
        assert text == whole[: whole.index(stop)] + "\n"
        assert "ended by stop" in figures


def test_the_prompt_comes_from_a_file_or_standard_input_too(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(checkpoint, capsys)[0]
    file = tmp_path / "prompt.py"
    file.write_text(PROMPT)
    options = ("--checkpoint", checkpoint, "--prompt-file", str(file), "--max-new-tokens", "24")
    assert run_cli("generate", *options) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert run_cli("generate", *options[:3], "-", *options[4:]) == 0
    assert capsys.readouterr().out == expected


def test_drafts_are_chosen_among_the_tokens_of_a_dataset(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(checkpoint, capsys)[0]
    tokenizer = micro_tokenizer()
    # What is learnt, the completion, counts; the prompt does not.
    row = {"prompt": "x y z\n", "completion": "aaa b"}
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row) + "\n")
    among: list[list[int]] = []

    def note(session: HeadsSession, token_ids: torch.Tensor) -> Any:
        among.append(token_ids.tolist())
        return session.model.build_unembedding(token_ids)

    monkeypatch.setattr(HeadsSession, "partial_unembedding", note)
    options = ["--speculative", "--draft-from", str(data)]
    assert write(checkpoint, capsys, *options)[0] == expected
    assert write(checkpoint, capsys, *options, "--draft-vocabulary", "1")[0] == expected
    assert among[0] == sorted({*tokenizer.encode("aaa b", add_special_tokens=False), tokenizer.eos_token_id})
    assert among[1] == tokenizer.encode("a", add_special_tokens=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give one of --prompt and --prompt-file"),
        (("--prompt", "a", "--prompt-file", "b"), "give one of"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt-file", "/no/such/file"), "cannot be read"),
        (("--prompt", "a", "--temperature", "-1"), "temperature must be"),
        (("--prompt", "a", "--top-p", "0"), "top_p must be"),
        (("--prompt", "a", "--min-p", "2"), "min_p must be"),
        (("--prompt", "a", "--top-k", "-1"), "top_k must be"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens"),
        (("--prompt", "a", "--temperature", "1", "--seed", "-1"), "seed must be"),
        (("--prompt", "a", "--tree", "2,1"), "--tree says how to draft"),
        (("--prompt", "a", "--draft-from", "builtin:microcode"), "--draft-from says how to draft"),
        (("--prompt", "a", "--draft-vocabulary", "9"), "--draft-vocabulary says how to draft"),
        (("--prompt", "a", "--speculative", "--draft-vocabulary", "9"), "none is named"),
        ((*DRAFT_FROM, "builtin:microcode", "--draft-vocabulary", "0"), "at least 1"),
        ((*DRAFT_FROM, "/no/such/data.jsonl"), "/no/such/data.jsonl"),
        (("--prompt", "a", "--speculative", "--tree", "2,x"), "'2,x'"),
        (("--prompt", "a", "--speculative", "--tree", "2,1,1,1"), "4 heads, and 3"),
        (("--prompt", "x = 1\n" * 400), "512 positions"),
    ],
)
def test_bad_input_is_one_message_with_a_remedy_and_exit_code_2(
    checkpoint: str, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("generate", "--checkpoint", checkpoint, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "remedy: " in captured.err


def test_a_model_without_heads_says_that_it_cannot_draft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("generate", "--checkpoint", "builtin:micro-llama", "--prompt", "a", "--speculative") == 2
    assert "this model cannot draft: it has one head" in capsys.readouterr().err
    assert run_cli("generate", "--checkpoint", str(tmp_path / "none"), "--prompt", "a") == 2
    assert "does not exist" in capsys.readouterr().err
