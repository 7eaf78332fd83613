"""Secrets reach the program and nothing else: no error, no dump, no representation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from wmtp.settings import ConfigError, load_config, load_recipe, redacted_dump

Writer = Callable[..., Path]
SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "text",
    [
        f"s3: {{secret_acces_key: {SECRET}}}",
        f"s3: {{secret_access_key: [{SECRET}]}}",
        f"s3: {{secret_access_key: {{a: {SECRET}}}}}",
        f"s3: {{secret_access_key: {SECRET}}}",
        f"s3: {{id: {SECRET}}}",
        f"s3: {SECRET}",
        f"s3: [{SECRET}]",
        f"s3:\n  secret_access_key: *{SECRET}",
        f"s3:\n  secret_access_key: !{SECRET}",
        f"s3:\n  secret_access_key: !{SECRET} x",
        f"s3:\n  secret_access_key: '{SECRET}\n",
        f"s3:\n  secret_access_key: @{SECRET}\n",
        f"s3:\n  secret_access_key: %{SECRET}\n",
        f"s3:\n  secret_access_key: ${{{SECRET}",
        f"s3:\n  secret_access_key: ${{MISSING:-{SECRET}}}\n  part_size_mib: 0",
        f"s3:\n  region: {SECRET}: x",
        f"s3:\n  secret_access_key: {SECRET}\n  secret_access_key: {SECRET}",
        f"s3: {{part_size_mib: '${{MISSING:-{SECRET}}}'}}",
        f"hf_token: {SECRET}",
        f"mlflow: {{password: {SECRET}}}",
        f"devices: {{num_threads: 'https://user:{SECRET}@host'}}",
        f"devices: {{num_threads: 'https://user:a@{SECRET}@host'}}",
        f"devices: {{num_threads: 'https://host/?X-Amz-Signature={SECRET}'}}",
    ],
)
def test_an_error_never_shows_a_secret(write: Writer, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    shown = str(caught.value)
    if "${" in text and "MISSING" not in text:
        shown = shown.replace("${" + SECRET, "")  # the name of a variable is no secret
    assert SECRET not in shown
    assert SECRET not in repr(caught.value.problems).replace("${" + SECRET, "")


def test_an_override_never_shows_a_secret(config_file: Path) -> None:
    for override in (f"s3.secret_access_key=[{SECRET}", f"s3.secret_access_key={SECRET}", f"s3.tok={SECRET}"):
        with pytest.raises(ConfigError) as caught:
            load_config(config_file, overrides=[override])
        assert SECRET not in str(caught.value)


def test_an_error_shows_the_reference_and_not_what_the_environment_held(
    write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_VALUE", SECRET)
    recipe = write(
        "train: {algo: '${SOME_VALUE}', max_steps: '${SOME_VALUE}'}\n"
        "data: {train: {sources: ['${SOME_VALUE}', 3]}}\neval: {k: ['${SOME_VALUE}']}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe)
    assert SECRET not in str(caught.value)
    assert "${SOME_VALUE}" in str(caught.value)


def test_secrets_from_the_environment_arrive_and_are_hidden_in_dumps(
    write: Writer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KEY_ID", "000123")
    monkeypatch.setenv("SECRET_KEY", SECRET)
    path = write(
        "s3: {access_key_id: '${KEY_ID}', secret_access_key: '${SECRET_KEY}'}\n"
        f"mlflow: {{tracking_uri: 'postgresql://me:{SECRET}@db/mlflow'}}\n"
    )
    config = load_config(path, verbose=True)
    assert config.s3.access_key_id is not None
    assert config.s3.secret_access_key is not None
    assert config.s3.access_key_id.get_secret_value() == "000123"
    assert config.s3.secret_access_key.get_secret_value() == SECRET
    dump = redacted_dump(config)
    assert dump["s3"]["session_token"] is None
    assert dump["s3"]["secret_access_key"] == "**********"
    assert dump["mlflow"]["tracking_uri"] == "postgresql://**********@db/mlflow"
    assert SECRET not in str(dump) + capsys.readouterr().err
    assert SECRET not in repr(config.s3)
    assert "000123" not in str(dump)


def test_a_number_from_the_environment_is_text_where_text_is_wanted(
    write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAME", "1234")
    config = load_config(write("paths: {output: '${NAME}'}\ns3: {max_concurrency: '${NAME}'}\n"))
    assert (config.paths.output, config.s3.max_concurrency) == ("1234", 1234)


def test_an_unknown_key_that_only_sounds_a_little_like_a_secret_is_shown(write: Writer) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(
            write("data: {train: {sources: [microcode], max_tokens: 77}}\ntrain: {algo: x, max_steps: 1}")
        )
    assert "found 77" in str(caught.value)
