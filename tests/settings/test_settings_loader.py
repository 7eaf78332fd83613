"""Files, overrides and both together: what is read, and how every problem is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from wmtp.exceptions import UserInputError
from wmtp.settings import ConfigError, Problem, load_config, load_recipe, load_settings

Writer = Callable[..., Path]
RECIPE = "train: {algo: baseline-mtp, max_steps: 100}\ndata: {train: {sources: [microcode]}}\n"


def problems_of(call: Callable[[], object]) -> tuple[Problem, ...]:
    """Return what a load complains about; each problem must be complete."""
    with pytest.raises(ConfigError) as caught:
        call()
    for problem in caught.value.problems:
        assert problem.rule
        assert problem.remedy
        assert str(problem) in str(caught.value)
        assert "pydantic" not in str(problem)
    return caught.value.problems


def only(call: Callable[[], object]) -> Problem:
    """Return the one problem of a load."""
    (problem,) = problems_of(call)
    return problem


def test_config_errors_are_user_errors_with_exit_code_2() -> None:
    assert issubclass(ConfigError, UserInputError)
    assert issubclass(ConfigError, ValueError)
    assert ConfigError.exit_code == 2


def test_both_files_and_overrides_are_read(config_file: Path, recipe_file: Path) -> None:
    config, recipe = load_settings(
        config_file, recipe_file, ["train.max_steps=7", "paths.output=out", "eval.k=[1, 5]", "optim.lr=1e-4"]
    )
    assert (config.paths.models.base, config.paths.output) == ("some/model", "out")
    assert (recipe.train.max_steps, recipe.eval.k, recipe.optim.lr) == (7, [1, 5], 1e-4)


def test_an_unknown_key_names_line_and_nearest_key(write: Writer) -> None:
    path = write(RECIPE + "loss:\n  scale: 1\n  temprature: 0.5\n")
    problem = only(lambda: load_recipe(path))
    assert (problem.file, problem.line, problem.key) == (str(path), 5, "loss.temprature")
    assert problem.remedy == "did you mean loss.temperature?"


def test_an_unknown_key_is_looked_up_in_other_sections(write: Writer) -> None:
    path = write(RECIPE + "temperature: 0.5\nmodel: {horizon: 2}\nhorzon: 3\n")
    remedies = [problem.remedy for problem in problems_of(lambda: load_recipe(path))]
    assert remedies == [
        "did you mean loss.temperature?",
        "did you mean model.mtp.horizon?",
        "did you mean model.mtp.horizon?",
    ]


def test_a_similar_key_of_the_same_section_is_suggested_before_all_others(write: Writer) -> None:
    problem = only(lambda: load_recipe(write(RECIPE + "eval: {batchsize: 1}\n")))
    assert problem.remedy == "did you mean eval.batch_size?"


def test_an_unknown_key_with_a_value_that_cannot_be_read_is_two_problems(write: Writer) -> None:
    problems = problems_of(lambda: load_recipe(write(RECIPE + "loss:\n  scael: ${NOT_SET_ANYWHERE}\n")))
    assert [(problem.line, problem.key) for problem in problems] == [(4, "loss.scael")] * 2
    assert problems[1].remedy == "did you mean loss.scale?"


def test_an_unknown_key_like_no_other_lists_the_keys_of_its_section(write: Writer) -> None:
    problem = only(lambda: load_recipe(write(RECIPE + "loss: {zzz: 1}\n")))
    assert problem.remedy.startswith("remove it; loss has: lambda, scale")


def test_a_section_in_the_wrong_file_says_where_it_belongs(write: Writer) -> None:
    problem = only(lambda: load_recipe(write(RECIPE + "paths: {output: x}\n")))
    assert (problem.rule, problem.line) == ("belongs in the config", 3)


def test_a_dotted_key_in_a_file_says_how_to_nest_it(write: Writer) -> None:
    problem = only(lambda: load_recipe(write(RECIPE + "loss.scale: 2\n")))
    assert problem.remedy == "nest it: loss: {scale: ...}"


@pytest.mark.parametrize(
    ("text", "key"), [("storage: {mode: s3}\n", "storage"), ("paths:\n  cache: /c\n", "paths.cache")]
)
def test_a_key_of_the_older_layout_says_run_migrate(write: Writer, text: str, key: str) -> None:
    problem = only(lambda: load_config(write(text)))
    assert (problem.key, problem.remedy) == (key, "run `wmtp migrate`")


@pytest.mark.parametrize(
    ("line", "key", "value", "rule"),
    [
        ("model: {mtp: {horizon: 0}}", "model.mtp.horizon", "0", "must be at least 1"),
        ("model: {mtp: {horizon: four}}", "model.mtp.horizon", "'four'", "must be a whole number"),
        ("model: {mtp: {horizon: 2.5}}", "model.mtp.horizon", "2.5", "must be a whole number"),
        ("optim: {lr: .nan}", "optim.lr", "nan", "must be finite, not NaN or infinity"),
        ("optim: {lr: .inf}", "optim.lr", "inf", "must be finite, not NaN or infinity"),
        ("optim: {lr: nan}", "optim.lr", "'nan'", "must be a number"),
        ("optim: {betas: [0.9, x]}", "optim.betas[1]", "'x'", "must be a number"),
        ("optim: {betas: [0.9]}", "optim.betas[1]", "", "lacks an entry"),
        ("model: {lora: 5}", "model.lora", "5", "must be a section: keys with values, one a line"),
        ("eval: {k: 1}", "eval.k", "1", "must be a list: [a, b]"),
        ("eval: {types: [perplexety]}", "eval.types[0]", "'perplexety'", "must be one of meta-mtp, "),
        ("data_: 1", "data_", "1", "is not a known key"),
        ("loss: [1]", "loss", "[1]", "must be a section: keys with values, one a line"),
        ("model: {base_id: ''}", "model.base_id", "''", "must not be empty"),
    ],
)
def test_a_wrong_value_names_line_key_value_and_rule(
    write: Writer, line: str, key: str, value: str, rule: str
) -> None:
    problem = only(lambda: load_recipe(write(f"{RECIPE}{line}\n")))
    assert (problem.line, problem.key) == (3, key)
    assert problem.rule.startswith(rule)
    assert problem.value == value or value == ""


def test_an_unknown_algorithm_lists_the_known_and_suggests_the_nearest(write: Writer) -> None:
    problem = only(lambda: load_recipe(write(RECIPE.replace("baseline-mtp", "rho-wmtp"))))
    assert problem.rule == "must be one of baseline-mtp, critic-wmtp, rho1-wmtp or mtp-weighted-ce"
    assert problem.remedy == "did you mean rho1-wmtp?"


def test_a_horizon_longer_than_the_sequence_is_refused_at_its_line(write: Writer) -> None:
    text = RECIPE.replace("[microcode]", "[microcode], max_length: 8") + "model:\n  mtp:\n    horizon: 8\n"
    problem = only(lambda: load_recipe(write(text)))
    assert (problem.line, problem.key, problem.value) == (5, "model.mtp.horizon", "8")
    assert "data.train.max_length (8)" in problem.rule


@pytest.mark.parametrize(
    ("train", "key", "rule"),
    [
        ("keep_best: 2, save_every_steps: 5", "train.keep_best", "train.eval_every_steps is null"),
        ("keep_best: 2, eval_every_steps: 5", "train.keep_best", "train.save_every_steps is null"),
        ("permanent_every_steps: 10", "train.permanent_every_steps", "a multiple of train.save_every_steps"),
        (
            "permanent_every_steps: 10, save_every_steps: 4",
            "train.permanent_every_steps",
            "a multiple of train.save_every_steps",
        ),
        ("keep_best: -1", "train.keep_best", "must be at least 0"),
        ("best_mode: low", "train.best_mode", "must be one of min or max"),
    ],
)
def test_checkpoints_that_could_never_be_kept_are_refused(
    write: Writer, train: str, key: str, rule: str
) -> None:
    problem = only(lambda: load_recipe(write(RECIPE.replace("max_steps: 100", f"max_steps: 100, {train}"))))
    assert problem.key == key
    assert rule in problem.rule


def test_a_default_that_breaks_a_rule_is_shown_with_its_value(write: Writer) -> None:
    problem = only(lambda: load_recipe(write(RECIPE.replace("[microcode]", "[microcode], max_length: 3"))))
    assert (problem.key, problem.value) == ("model.mtp.horizon", "4")


def test_required_keys_are_all_named_with_an_example(write: Writer) -> None:
    problems = problems_of(lambda: load_recipe(write("train: {}\n")))
    assert [problem.key for problem in problems] == ["train.algo", "train.max_steps", "data.train.sources"]
    assert {problem.rule for problem in problems} == {"is required"}
    assert "train.algo: baseline-mtp" in problems[0].remedy


def test_every_problem_of_both_files_is_reported_at_once_in_order(write: Writer) -> None:
    config = write("paths:\n  output: 3\ndevices:\n  accelerator: gpu\n", "config.yaml")
    recipe = write(
        "train:\n  algo: rho1-wmtp\n  max_steps: 10\n"
        "data:\n  train:\n    sources: [microcode, mbpp]\n    batch_size: 0\n"
        "optim:\n  lr: .nan\n  warmup_steps: 20\n"
        "loss:\n  temprature: 1\n"
        "model:\n  rm_id: gs://bucket/model\n",
        "recipe.yaml",
    )
    problems = problems_of(lambda: load_settings(config, recipe, ["train.seed=-1", "nothing=1"]))
    assert [(Path(problem.file).name, problem.line, problem.key) for problem in problems] == [
        ("config.yaml", 1, "paths.models.base"),
        ("config.yaml", 1, "paths.models.ref"),
        ("config.yaml", 2, "paths.output"),
        ("config.yaml", 4, "devices.accelerator"),
        ("recipe.yaml", 6, "data.train.sources"),
        ("recipe.yaml", 7, "data.train.batch_size"),
        ("recipe.yaml", 9, "optim.lr"),
        ("recipe.yaml", 10, "optim.warmup_steps"),
        ("recipe.yaml", 12, "loss.temprature"),
        ("recipe.yaml", 14, "model.rm_id"),
        ("--set nothing", None, ""),
        ("--set train.seed", None, "train.seed"),
    ]


def test_a_rule_is_not_judged_on_a_value_that_is_wrong_by_itself(write: Writer) -> None:
    text = RECIPE.replace("max_steps: 100", "max_steps: many") + "optim: {warmup_steps: 1000}\n"
    assert only(lambda: load_recipe(write(text))).key == "train.max_steps"


@pytest.mark.parametrize(
    ("content", "rule", "line"),
    [
        ("", "is empty", None),
        ("# only a comment\n", "is empty", None),
        ("- a\n- b\n", "must hold sections at its top", 1),
        ("just text\n", "must hold sections at its top", 1),
        ("train:\n  algo: [a\n", "is not valid YAML", 3),
        ("train:\n\talgo: x\n", "is not valid YAML", 2),
        ("a: 1\n---\nb: 2\n", "is not valid YAML", 2),
        ("a: 1\nb: \x07\n", "is not valid YAML", 2),
        (b"\xff\xfe\x00", "is not UTF-8 text", None),
        ("[" * 5000, "is nested too deeply", 1),
        (b"a" * (2**20 + 1), "is larger than 1 MiB", None),
    ],
)
def test_an_unusable_file_is_one_problem(
    write: Writer, content: str | bytes, rule: str, line: int | None
) -> None:
    problem = only(lambda: load_recipe(write(content)))
    assert problem.rule.startswith(rule)
    assert problem.line == line


def test_a_missing_file_and_a_directory_are_one_problem_each(tmp_path: Path) -> None:
    problems = problems_of(lambda: load_settings(tmp_path / "no.yaml", tmp_path))
    assert [(problem.file, problem.rule) for problem in problems] == [
        (str(tmp_path / "no.yaml"), "does not exist"),
        (str(tmp_path), "is a directory"),
    ]


def test_a_missing_file_does_not_hide_the_problems_of_the_other(tmp_path: Path, write: Writer) -> None:
    recipe = write(RECIPE + "loss: {scale: 0}\n")
    assert len(problems_of(lambda: load_settings(tmp_path / "no.yaml", recipe))) == 2


def test_a_path_that_no_file_can_have_is_a_problem() -> None:
    assert only(lambda: load_config("a\0b")).rule.startswith("cannot be read")


def test_what_the_schema_knows_but_this_version_cannot_do_is_refused(write: Writer) -> None:
    config = write(
        "paths: {models: {base: 'gs://b/m'}, output: 'gs://b/o'}\n"
        "devices: {strategy: fsdp2}\nlauncher: {target: slurm, resources: {gpus: 2}}\n",
        "config.yaml",
    )
    recipe = write(
        "train: {algo: baseline-mtp, max_steps: 9}\ndata: {train: {sources: [microcode]}}\n"
        "rho1: {reference: precomputed, reference_scores: scores}\n",
        "recipe.yaml",
    )
    problems = problems_of(lambda: load_settings(config, recipe))
    assert all("not available" in problem.rule for problem in problems)
    assert sorted(problem.key for problem in problems) == [
        "devices.strategy",
        "launcher.resources.gpus",
        "launcher.target",
        "paths.models.base",
        "paths.output",
        "rho1.reference",
    ]


def test_a_base_model_is_needed_and_either_file_may_name_it(write: Writer, recipe_file: Path) -> None:
    config = write("devices: {}\n", "config.yaml")
    problem = only(lambda: load_settings(config, recipe_file))
    assert problem.key == "paths.models.base"
    _, recipe = load_settings(config, recipe_file, ["model.base_id=org/name"])
    assert recipe.model.base_id == "org/name"


def test_a_reward_model_is_needed_where_it_gives_the_rewards(config_file: Path, write: Writer) -> None:
    text = "critic: {reward: {source: reward_model, granularity: token}}\n"
    recipe = write(RECIPE.replace("baseline-mtp", "critic-wmtp") + text, "recipe.yaml")
    problem = only(lambda: load_settings(config_file, recipe))
    assert (problem.key, "reward model" in problem.rule) == ("paths.models.rm", True)
    load_settings(config_file, recipe, ["paths.models.rm=org/name"])
    load_settings(config_file, recipe, ["model.rm_id=org/name"])
    # Other sources and other algorithms need none.
    load_settings(config_file, recipe, ["critic.reward.source=column", "critic.reward.granularity=sequence"])
    load_settings(config_file, recipe, ["train.algo=baseline-mtp"])


def test_a_dataset_name_is_checked_against_the_config(config_file: Path, write: Writer) -> None:
    recipe = write(RECIPE.replace("[microcode]", "[microcod, mbpp, data/own.jsonl]"), "recipe.yaml")
    problems = problems_of(lambda: load_settings(config_file, recipe))
    assert [(problem.key, problem.remedy) for problem in problems] == [
        ("data.train.sources", "did you mean microcode?"),
        ("data.train.sources", "set paths.datasets.mbpp in the config"),
    ]


@pytest.mark.parametrize(
    ("override", "file", "rule"),
    [
        ("train.max_steps", "--set", "is not of the form"),
        ("=3", "--set", "is not of the form"),
        ("train..seed=3", "--set", "is not of the form"),
        ("trian.seed=3", "--set trian.seed", "is not a known key"),
        ("train.sead=3", "--set train.sead", "is not a known key"),
        ("train.seed=x", "--set train.seed", "must be a whole number"),
        ("train.seed=[1", "--set train.seed", "is not valid YAML"),
        ("train.algo.x=1", "--set train.algo.x", "goes below a key that is not a section"),
        ("data.train.sources.0=x", "--set data.train.sources.0", "goes below a key that is not a section"),
        ("paths.output=x", "--set paths.output", "belongs to the config"),
        ("train.seed=${NOT_SET_ANYWHERE}", "--set train.seed", "needs the environment variable"),
        ("train={algo: baseline-mtp, algo: x, max_steps: 1}", "--set train", "is given twice"),
    ],
)
def test_a_bad_override_is_one_problem_without_a_line(
    recipe_file: Path, override: str, file: str, rule: str
) -> None:
    problem = only(lambda: load_recipe(recipe_file, overrides=[override]))
    assert (problem.file, problem.line) == (file, None)
    assert problem.rule.startswith(rule)


def test_the_last_override_wins_and_null_is_a_value(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, overrides=["train.seed=1", "train.seed=2", "optim.grad_clip=null"])
    assert recipe.train.seed == 2
    assert recipe.optim.grad_clip is None


def test_an_override_replaces_a_whole_section(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, overrides=["model.mtp={horizon: 2}", "model.mtp.head=transformer"])
    assert recipe.model.mtp.horizon == 2


def test_an_override_heals_what_is_wrong_in_the_file(write: Writer) -> None:
    path = write(RECIPE + "optim: {lr: '${NOT_SET_ANYWHERE}', eps: x}\n")
    recipe = load_recipe(path, overrides=["optim.lr=0.5", "optim.eps=0.25"])
    assert (recipe.optim.lr, recipe.optim.eps) == (0.5, 0.25)


def test_verbose_writes_the_resolved_settings(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_recipe(recipe_file, verbose=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "max_steps: 100" in captured.err
    load_recipe(recipe_file)
    assert capsys.readouterr().err == ""


def test_a_problem_is_two_lines_without_control_characters_whatever_the_file_holds(write: Writer) -> None:
    path = write(RECIPE + 'loss: {scale: "a\\nb\\e[31m"}\n"x\\ny": 1\ndata_: ["\\r"]\n')
    for problem in problems_of(lambda: load_recipe(path)):
        lines = str(problem).splitlines()
        assert len(lines) == 2
        assert all(line.isprintable() for line in lines)


def test_a_message_reads_place_key_rule_value_remedy(write: Writer, recipe_file: Path) -> None:
    path = write(RECIPE + "loss: {scale: 0, wmax: 2}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        "2 problems in the settings\n"
        f"  {path}:3: loss.scale: must be above 0 (found 0)\n"
        "    remedy: expected number (> 0), default 1\n"
        f"  {path}:3: loss.wmax: is not a known key (found 2)\n"
        "    remedy: did you mean loss.w_max?"
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file, overrides=["loss.scale=0"])
    assert str(caught.value).splitlines()[:2] == [
        "1 problem in the settings",
        "  --set loss.scale: must be above 0 (found 0)",
    ]
