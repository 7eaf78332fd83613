"""A config of the older layout turned into the present one: values renamed, joined, or named as dropped.

The new file says the same as the old one and can be loaded: what the present schema does not take (because
its form is wrong, or because this version cannot do it yet) is written as a comment with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from wmtp.exceptions import UserInputError
from wmtp.pipelines.migrate_keys import (
    CACHE_KEYS,
    OUTPUT_KEYS,
    PLACES,
    RECIPE_SECTIONS,
    RENAMED,
    explain_dropped,
)
from wmtp.pipelines.migrate_layout import OldFile, OldValue, quoted, read_old_file
from wmtp.pipelines.migrate_write import NewValue, write_config
from wmtp.settings import Config, ConfigError, Problem, load_config
from wmtp.settings.fields import list_fields
from wmtp.settings.redaction import HIDDEN, may_be_secret, redact_text
from wmtp.settings.suggestions import explain_unknown_key

OLD_REGION = "ap-northeast-2"
"""Region of the older layout where none was given; the present default is another one."""

_REFERENCE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}")
_PASSWORD = re.compile(r"(?<=://)(?P<user>[^/@\s:]*):(?P<password>[^/@\s]+)@")
_FOLDER = re.compile(r"file:|[^:]*$")
_SECRET_VARIABLES = {
    "s3.access_key_id": "AWS_ACCESS_KEY_ID",
    "s3.secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "s3.session_token": "AWS_SESSION_TOKEN",
}
_ENVIRONMENT_RULE = "needs the environment variable"

RowKind = Literal["kept", "moved", "changed", "dropped", "disabled"]


@dataclass(frozen=True, slots=True)
class MigratedKey:
    """What became of one old key.

    Attributes:
        old: dotted; "" for a value that the old file left to its default.
        new: dotted; "" where there is no successor.
        kind: `kept` under its name, `moved` to another, `changed` in its value, `dropped`, or `disabled`:
            written as a comment.
        note: what changed and what to do, "" where there is nothing to say.
    """

    old: str
    new: str
    kind: RowKind
    note: str = ""


@dataclass(frozen=True, slots=True)
class MigratedConfig:
    """A config in the present layout.

    Attributes:
        source: the old file.
        text: the new file.
        keys: what became of each old key.
        warnings: what the user has to look after.
        settings: what the new file says, without values that need variables which are not set.
        unset: keys of those values.
        cache: the old cache folder as the old file named it; None where it named none.
        is_current: the file is in the present layout already, and `text` is not needed.
    """

    source: Path
    text: str
    keys: tuple[MigratedKey, ...]
    settings: Config
    unset: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    cache: str | None = None
    is_current: bool = False


def migrate_config(path: Path) -> MigratedConfig:
    """Turn a config of the older layout into the present one; nothing is written.

    Raises:
        UserInputError: the file cannot be read, or is a recipe.
    """
    old = read_old_file(path)
    if not any(key.split(".")[0] in list_fields(Config) or key in RENAMED for key in old.values) and any(
        old.has_section(name) for name in RECIPE_SECTIONS
    ):
        raise UserInputError(
            f"{path} is a recipe, and only configs are turned into the present layout",
            remedy="start from a recipe in configs/; `wmtp validate` names each key that is not known",
        )
    migration = _Migration(old)
    migration.run()
    is_current = all(row.kind == "kept" for row in migration.rows) and not migration.warnings
    checked = _check(migration)
    migration.warnings += [f"{problem.key} {problem.rule}" for problem in checked.unset]
    return MigratedConfig(
        path,
        checked.text,
        tuple(_with_problems(migration.rows, checked.problems)),
        checked.settings,
        tuple(problem.key for problem in checked.unset),
        tuple(migration.warnings),
        next((found for key in CACHE_KEYS if (found := old.text(key)) is not None), None),
        is_current,
    )


@dataclass
class _Migration:
    """Goes through the old keys one by one; `new`, `rows` and `warnings` are what comes of them."""

    old: OldFile
    new: dict[str, NewValue] = field(default_factory=dict)
    rows: list[MigratedKey] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _done: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Convert what has a rule of its own, then rename, keep or drop the rest."""
        self._places()
        self._output()
        self._devices()
        self._launcher()
        self._tracking()
        for key, value in self.old.values.items():
            if key in self._done:
                continue
            target = RENAMED.get(key, key)
            if target not in list_fields(Config) or list_fields(Config)[target].section is not None:
                self._drop(key)
            elif value.is_null and target != key:
                self._add(MigratedKey(key, "", "dropped", "was not set"))
            elif target in self.new:
                self._add(MigratedKey(key, "", "dropped", f"{target} is set by another key already"))
            else:
                self._take(target, value)
        self._region()
        if not self.new:
            # A file without a value would be no config.
            default = str(list_fields(Config)["paths.output"].default)
            self.new["paths.output"] = NewValue("paths.output", default)
            self._add(MigratedKey("", "paths.output", "changed", "the default; nothing else was left"))
        lines = {key: value.line for key, value in self.old.values.items()}
        self.rows.sort(key=lambda row: lines.get(row.old, len(lines) + max(lines.values(), default=0)))

    # ---------------------------------------------------------------- rules of their own

    def _places(self) -> None:
        """Models and datasets: one address each, in place of a local one, one on S3 and a mode."""
        mode = self.old.text("storage.mode")
        for key in PLACES:
            candidates = {name: self.old.values.get(f"{key}{name}") for name in ("_local", "_s3", "")}
            given = {
                name: value for name, value in candidates.items() if value is not None and not value.is_null
            }
            if not given or set(given) == {""}:
                continue
            order = ["_s3", "", "_local"] if mode == "s3" else ["_local", "", "_s3"]
            if mode == "auto" and "_local" in given and not Path(given["_local"].text).expanduser().exists():
                order = ["_s3", "", "_local"]
            chosen = next(name for name in order if name in given)
            value = given[chosen]
            if chosen == "_s3":
                address = self._s3_address(value)
                self._take(key, value, quoted(address), f"is {redact_text(address)} now")
            else:
                self._take(key, value)
            for name in set(given) - {chosen}:
                old_key = f"{key}{name}"
                self._add(
                    MigratedKey(old_key, "", "dropped", f"{value.key} is used, as storage.mode is {mode}")
                )

    def _s3_address(self, value: OldValue) -> str:
        """An old key of the bucket as an address; the prefix stood before every key."""
        if "://" in value.text:
            return value.text
        bucket = self.old.text("storage.s3.bucket") or self.old.text("s3_auth.default_bucket")
        if bucket is None:
            self.warnings.append(
                f"{value.key} is a key of a bucket, and the file names no bucket: complete it"
            )
            bucket = "BUCKET"
        parts = (bucket, self.old.text("storage.s3.prefix") or "", value.text)
        return "s3://" + "/".join(part.strip("/") for part in parts if part.strip("/"))

    def _output(self) -> None:
        """Where results go: one folder for checkpoints, reports and tracking."""
        given = [self.old.values[key] for key in OUTPUT_KEYS if self.old.text(key) is not None]
        if given:
            value = given[0]
            note = "" if value.key == "paths.output" else "checkpoints, reports and tracking go below it"
            self._take("paths.output", value, note=note)
            for other in given[1:]:
                self._add(MigratedKey(other.key, "", "dropped", f"{value.key} is used"))
            return
        bucket, prefix = self.old.text("storage.s3.bucket"), self.old.text("storage.s3.prefix")
        if self.old.text("storage.mode") != "s3" or bucket is None:
            return
        if prefix is None:
            self.warnings.append(
                f"results go to the local folder `runs`; to keep them on S3, set paths.output: s3://{bucket}/runs"
            )
            return
        address = f"s3://{bucket}/{prefix.strip('/')}"
        self._take("paths.output", self.old.values["storage.s3.prefix"], quoted(address), f"is {address} now")

    def _devices(self) -> None:
        backend = self.old.text("devices.compute_backend") or "auto"
        precision = self.old.values.get("devices.mixed_precision")
        if precision is not None and precision.text == "fp16":
            note = "fp16 is not offered; auto is bf16 where the accelerator has it, else fp32"
            self._take("devices.precision", precision, "auto", note)
        elif precision is not None and precision.text == "bf16" and backend != "cuda":
            written = "fp32" if backend == "cpu" else "auto"
            self._take("devices.precision", precision, written, f"what bf16 came to with {backend}")
        sharing = self.old.values.get("devices.fsdp.enabled")
        if sharing is not None and not sharing.is_null:
            is_on = sharing.written.strip('"').lower() == "true"
            has_several = (self.old.text("launcher.resources.gpus") or "1") not in ("0", "1")
            if is_on and has_several:
                self._take("devices.strategy", sharing, "fsdp2", "shares the model between GPUs")
            else:
                why = "one GPU shares nothing" if is_on else "nothing was shared"
                self._take(
                    "devices.strategy", sharing, "auto", f"{why}; auto goes by the number of processes"
                )

    def _launcher(self) -> None:
        target = self.old.values.get("launcher.target")
        if target is not None and target.text == "generic":
            self._take("launcher.target", target, "local", "generic meant this machine")

    def _tracking(self) -> None:
        tracking, registry = (self.old.values.get(f"mlflow.{name}_uri") for name in ("tracking", "registry"))
        is_same = registry is not None and tracking is not None and registry.text == tracking.text
        # Only of a file that is old by something else; in a present one the key may say it twice.
        if registry is not None and not registry.is_null and is_same and self._is_old():
            self._add(
                MigratedKey(registry.key, "", "dropped", "the same as mlflow.tracking_uri, the default")
            )
        if tracking is not None and not tracking.is_null and _FOLDER.match(tracking.text) and self._is_old():
            note = (
                "a folder means SQLite in it; `mlflow migrate-filestore` takes over runs kept there as files"
            )
            self._take("mlflow.tracking_uri", tracking, note=note)

    def _is_old(self) -> bool:
        """Whether any key is one that the present layout does not have."""
        return any(key not in list_fields(Config) for key in self.old.values)

    def _region(self) -> None:
        """The older default of a file that used S3 and gave no region."""
        uses_s3 = self.old.has_section("storage.s3") or self.old.has_section("s3_auth")
        if uses_s3 and "s3.region" not in self.new:
            self.new["s3.region"] = NewValue("s3.region", OLD_REGION)
            note = f"was not given, which meant {OLD_REGION}; the default is another one now"
            self._add(MigratedKey("", "s3.region", "changed", note))

    # ---------------------------------------------------------------- what can be done with a value

    def _take(self, target: str, value: OldValue, written: str | None = None, note: str = "") -> None:
        """Give the new key a value, the old one unless `written` is another."""
        kind: RowKind = "kept" if target == value.key else "moved"
        final = value.written if written is None else written
        if written is not None and written != value.written:
            kind = "changed"
        hidden, about = self._without_secrets(target, value, final)
        if about:
            kind, note = "changed", about
        self.new[target] = NewValue(target, hidden, value.above, value.beside)
        self._add(MigratedKey(value.key, target, kind, note))

    def _without_secrets(self, target: str, value: OldValue, written: str) -> tuple[str, str]:
        """Replace what is secret and stands in clear text by a reference to the environment."""
        variable = _SECRET_VARIABLES.get(target)
        where = f"{self.old.path}:{value.line}"
        if variable is not None and not _REFERENCE.fullmatch(value.text):
            self.warnings.append(
                f"{value.key} stands in clear text in {where}: the new file reads it from {variable}; "
                "set that, and exchange the key if others have seen the file"
            )
            return f"${{{variable}}}", f"secret in clear text; now ${{{variable}}}"
        found = _PASSWORD.search(written)
        if found is not None and not _REFERENCE.fullmatch(found["password"]):
            variable = f"{target.split('.')[0].upper()}_PASSWORD"
            self.warnings.append(
                f"{value.key} holds a password in clear text in {where}: the new file reads it from "
                f"{variable}; set that, and exchange the password if others have seen the file"
            )
            address = f"{written[: found.start('password')]}${{{variable}}}{written[found.end('password') :]}"
            return address, f"password in clear text; now ${{{variable}}}"
        return written, ""

    def _drop(self, key: str) -> None:
        why = explain_dropped(key)
        if why is None:
            rule, remedy = explain_unknown_key(key, Config)
            why = f"{rule}; {remedy}"
            self.warnings.append(f"{key} is not known to any layout and was left out: {remedy}")
        if key == "hf_auth.token" and not _REFERENCE.fullmatch(self.old.values[key].text):
            where = f"{self.old.path}:{self.old.values[key].line}"
            self.warnings.append(
                f"{key} stands in clear text in {where}: set HF_TOKEN in the environment, and exchange the "
                "token if others have seen the file"
            )
        self._add(MigratedKey(key, "", "dropped", why))

    def _add(self, row: MigratedKey) -> None:
        self.rows.append(row)
        self._done.add(row.old)


@dataclass(frozen=True, slots=True)
class _Checked:
    """The new file, in which what cannot be loaded is a comment, and what was found about it."""

    text: str
    settings: Config
    problems: dict[str, Problem]
    unset: list[Problem]


def _check(migration: _Migration) -> _Checked:
    """Load the new file, and turn into comments what keeps it from being loaded."""
    problems: dict[str, Problem] = {}
    unset: dict[str, Problem] = {}
    dropped = [
        f"{row.old}: {_shown(migration.old.values[row.old])} -> {row.note}"
        for row in migration.rows
        if row.kind == "dropped" and row.note != "was not set"
    ]

    def render(disabled: Mapping[str, Problem]) -> str:
        reasons = {key: f"{problem.rule}: {problem.remedy}" for key, problem in disabled.items()}
        return write_config(migration.old, migration.new, disabled=reasons, dropped=dropped)

    # Each round takes out at least one key, so there are no more rounds than keys.
    for _ in range(len(migration.new) + 1):
        settings, found = _load(render({**problems, **unset}))
        if settings is not None:
            return _Checked(render(problems), settings, problems, list(unset.values()))
        for problem in found:
            if problem.key not in migration.new or problem.key in problems:
                raise UserInputError(
                    f"{migration.old.path} cannot be turned into a config that loads: {problem}",
                    remedy="start from configs/config.example.yaml and copy the values",
                )
            # A variable that is not set here may be set where the config is used.
            needs_variable = problem.rule.startswith(_ENVIRONMENT_RULE)
            (unset if needs_variable else problems)[problem.key] = problem
    raise RuntimeError(f"the config made of {migration.old.path} is refused without end")


def _load(text: str) -> tuple[Config | None, list[Problem]]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            return load_config(file), []
        except ConfigError as error:
            return None, list(error.problems)


def _with_problems(rows: list[MigratedKey], problems: dict[str, Problem]) -> list[MigratedKey]:
    return [
        row
        if row.new not in problems
        else MigratedKey(
            row.old, row.new, "disabled", f"{problems[row.new].rule}; {problems[row.new].remedy}"
        )
        for row in rows
    ]


def _shown(value: OldValue) -> str:
    is_secret = value.key.startswith("hf_auth.") or may_be_secret(tuple(value.key.split(".")))
    return HIDDEN if is_secret else redact_text(value.text).replace("\n", " ")
