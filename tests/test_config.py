"""The configuration: every problem is one line: the place, the key, the value, a way out."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from pyft.errors import UsageError
from pyft.finetune.config import Config, allowed, load_config
from pyft.formats import FORMATS

REQUIRED = {"model": "m", "data": "d.jsonl", "output": "o"}


def refusal(path: Path | None, overrides: dict[str, object]) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(directory: Path, text: str) -> Path:
    path = directory / "job.yaml"
    path.write_text("model: m\ndata: d.jsonl\noutput: o\n" + text, encoding="utf-8")
    return path


def test_defaults_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "rank: 8\nlearning_rate: 2e-4\ntargets: [q_proj, v_proj]\n")
    config = load_config(path, {"rank": "4", "alpha": None, "targets": "k_proj, o_proj"})
    assert (config.rank, config.alpha, config.method) == (4, 32.0, "qlora")
    assert config.learning_rate == 2e-4  # YAML reads 2e-4 as text
    assert config.targets == ["k_proj", "o_proj"]
    assert load_config(path, {}).targets == ["q_proj", "v_proj"]
    assert load_config(None, {**REQUIRED, "targets": "all-linear"}).targets == "all-linear"


def test_validation_is_a_fraction_or_a_path(tmp_path: Path) -> None:
    for value in (0.25, "0.25"):
        assert load_config(None, {**REQUIRED, "validation": value}).validation == 0.25
    assert load_config(None, {**REQUIRED, "validation": "v.jsonl"}).validation == Path("v.jsonl")
    for value in (1, "-0.1", True, ""):
        assert "--validation" in refusal(None, {**REQUIRED, "validation": value})


def test_paths_expand_home_and_are_not_empty() -> None:
    config = load_config(None, {**REQUIRED, "model": "~/m"})
    assert config.model == Path.home() / "m"
    assert refusal(None, {**REQUIRED, "model": " "}) == "--model: ' ' is not a path"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning-rate", "learning_rate"),
        ("learningrate", "learning_rate"),
        ("lora_rank", "rank"),
        ("epoch", "epochs"),
        ("grad_accumulation", "gradient_accumulation"),
    ],
)
def test_unknown_key_is_answered_with_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    path = write(tmp_path, f"{key}: 1\n")
    message = refusal(path, {})
    assert message == f"{path}, line 4: {key} is not a key of the configuration; write {nearest}"
    assert refusal(None, {**REQUIRED, key: 1}).endswith(f"write {nearest}")


def test_unknown_key_like_no_other_points_to_the_help() -> None:
    message = refusal(None, {**REQUIRED, "zzzz": 1})
    assert message == "--zzzz is not a key of the configuration; see pyft finetune --help"


def test_merge_keys_are_refused_by_name_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\n<<: {rank: 8}\n")
    assert refusal(path, {}) == f"{path}, line 5: <<: merge keys are not read; copy the keys"


def test_values_belong_to_the_keys_as_written(tmp_path: Path) -> None:
    path = write(tmp_path, "1: a\n0x1: b\nrank: 8\n")  # two names of one number
    assert f"{path}, line 4: 1 is not a key" in refusal(path, {})
    path = write(tmp_path, "? [rank]\n: 8\n")
    assert f"{path}, line 4: a key is a list" in refusal(path, {})
    path = write(tmp_path, "rank: &size 8\nbatch_size: *size\n")
    config = load_config(path, {})
    assert (config.rank, config.batch_size) == (8, 8)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rank", "abc", "'abc' is not a whole number from 1 to 512"),
        ("rank", 0, "0 is not a whole number from 1 to 512"),
        ("rank", 513, "513 is not a whole number from 1 to 512"),
        ("rank", 1.5, "1.5 is not a whole number from 1 to 512"),
        ("rank", True, "True is not a whole number from 1 to 512"),
        ("alpha", 0, "0 is not a number above 0"),
        ("epochs", 0, "0 is not a number above 0, up to 1000"),
        ("epochs", float("nan"), "nan is not a number above 0, up to 1000"),
        ("learning_rate", False, "False is not a number above 0, up to 1"),
        ("dropout", 1, "1 is not a number from 0 to below 1"),
        ("replay", 1.0, "1.0 is not a number from 0 to below 1"),
        ("replay", -0.1, "-0.1 is not a number from 0 to below 1"),
        ("pack", "maybe", "'maybe' is not true or false"),
        ("method", "dora", "'dora' is not one of qlora, lora, full"),
        ("quant", "int3", "'int3' is not one of " + ", ".join(FORMATS)),
        ("targets", [], "[] is not all-linear, or a list of layer names"),
        ("targets", 3, "3 is not all-linear, or a list of layer names"),
        ("max_steps", 0, "0 is not a whole number from 1 up, or null"),
        ("max_length", 0, "0 is not a whole number from 8 to 1048576"),
        ("forgetting_budget", 0, "0 is not a number above 0, or null"),
        ("gradient_checkpointing", "often", "'often' is not true or false, or null"),
        ("general", "", "'' is not a path, or null"),
    ],
)
def test_wrong_value_is_one_readable_line(key: str, value: object, expected: str) -> None:
    assert refusal(None, {**REQUIRED, key: value}) == f"--{key.replace('_', '-')}: {expected}"


def test_wrong_value_in_a_file_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\nrank: abc\n")
    expected = f"{path}, line 5: rank: 'abc' is not a whole number from 1 to 512"
    assert refusal(path, {}) == expected
    assert load_config(path, {"rank": 2}).rank == 2


def test_all_problems_are_in_the_one_line() -> None:
    message = refusal(None, {"data": "d", "output": "o", "rank": 0, "alpha": -1})
    assert next(part.split(":")[0].split()[0] for part in message.split("; ")) == "model"
    assert "--rank: 0 is" in message
    assert "--alpha: -1 is" in message


def test_missing_key_says_what_it_is() -> None:
    message = refusal(None, {"data": "d", "output": "o"})
    assert message.startswith("model is missing; give --model, directory of the base model")


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("rank: [1, 2\nalpha: 3\n", 5, "YAML"),
        ("rank: 1\n  alpha: 3\n", 5, "YAML"),
        ("rank: 1\nrank: 2\n", 5, "twice"),
    ],
)
def test_broken_yaml_names_the_line(tmp_path: Path, text: str, line: int, word: str) -> None:
    message = refusal(write(tmp_path, text), {})
    assert f"job.yaml, line {line}:" in message
    assert word in message


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.yaml", {})
    assert "cannot be read" in refusal(tmp_path, {})
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("seed: 1\nmodel: é\n".encode("latin-1"))
    assert "latin.yaml, line 2: is not UTF-8" in refusal(latin, {})
    listed = tmp_path / "list.yaml"
    listed.write_text("- model\n", encoding="utf-8")
    assert "holds no keys" in refusal(listed, {})
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n", encoding="utf-8")
    assert load_config(empty, REQUIRED).rank == 16


def test_keys_that_exclude_each_other() -> None:
    message = refusal(None, {**REQUIRED, "resume": True, "overwrite": True})
    assert message.startswith("resume and overwrite exclude each other")
    message = refusal(None, {**REQUIRED, "patience": 2, "validation": 0})
    assert message.startswith("patience needs validation rows")


def test_config_is_frozen_and_closed() -> None:
    config = load_config(None, REQUIRED)
    with pytest.raises(ValidationError):
        config.rank = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Config(**REQUIRED, ranks=3)  # type: ignore[arg-type]


def test_every_key_has_help_and_a_rule_in_words() -> None:
    for key, field in Config.model_fields.items():
        assert field.description
        assert "\n" not in field.description
        assert allowed(key)
