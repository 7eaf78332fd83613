"""Examples to features, on real tiny tokenizers of the two families: byte-level BPE and SentencePiece."""

from __future__ import annotations

import io
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from wmtp.components.data import Example, Feature
from wmtp.components.registry import tokenizer_registry
from wmtp.components.tokenizer import HfTokenizer, TokenizerContext
from wmtp.exceptions import DataError, ModelLoadError, UserInputError

CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "def twice(x):\n    return 2 * x\n\n\n",
    "# user: say hello\nassistant: hello there\n",
] * 10
CHATML = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)


def byte_level(
    *, bos: bool = False, eos: bool = True, add_blank: bool = False, **arguments: Any
) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Merges across the seam of a prompt that ends in a line break, as code tokenizers do.
            pre_tokenizers.Split(" return", behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=add_blank, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|turn|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|begin|>",
        eos_token="<|end|>" if eos else None,
        pad_token="<|end|>",
        **arguments,
    )


def sentencepiece_llama() -> PreTrainedTokenizerFast:
    """A SentencePiece model as Llama 2 and Code Llama ship it: byte fallback, a blank before every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ") for text in CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model.getvalue())
        settings = {"tokenizer_class": "LlamaTokenizer", **names}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
        return AutoTokenizer.from_pretrained(folder)


PLAIN = byte_level()
SENTENCEPIECE = sentencepiece_llama()


def component(tokenizer: PreTrainedTokenizerFast = PLAIN, **arguments: Any) -> HfTokenizer:
    return HfTokenizer({"tokenizer": tokenizer, **arguments})


def feature(example: Example, tokenizer: PreTrainedTokenizerFast = PLAIN, **arguments: Any) -> Feature:
    (result,) = component(tokenizer, **arguments).tokenize_dataset([example])
    return result


def targets(result: Feature) -> list[int]:
    return [label for label in result["labels"] if label != -100]


ADD = Example("f:1", "def add(a, b):\n", "    return a + b\n")


def test_prompt_and_completion_are_tokenised_apart_and_only_the_completion_is_learned() -> None:
    result = feature(ADD)
    prompt = PLAIN.encode(ADD.prompt, add_special_tokens=False)
    completion = PLAIN.encode(ADD.completion, add_special_tokens=False)
    assert result["input_ids"] == [*prompt, *completion, PLAIN.eos_token_id]
    assert result["labels"] == [-100] * len(prompt) + completion + [PLAIN.eos_token_id]
    assert result["row_id"] == "f:1"
    # The whole text would have merged over the seam; this example can tell the difference.
    assert PLAIN.encode(ADD.prompt + ADD.completion, add_special_tokens=False) != prompt + completion


def test_a_prompt_for_generation_is_what_stands_before_the_completion_in_training() -> None:
    for tokenizer in (PLAIN, byte_level(bos=True), SENTENCEPIECE):
        tokens = component(tokenizer)
        (result,) = tokens.tokenize_dataset([ADD])
        prompt = tokens.encode_prompt(ADD.prompt)
        assert result["input_ids"][: len(prompt)] == prompt
        assert result["labels"][: len(prompt)] == [-100] * len(prompt)
        assert result["labels"][len(prompt)] != -100


def test_training_on_prompts_makes_every_token_a_target_but_the_beginning() -> None:
    result = feature(ADD, byte_level(bos=True), train_on_prompt=True)
    assert result["labels"] == [-100, *result["input_ids"][1:]]


def test_plain_text_is_learned_whole() -> None:
    result = feature(Example("f:1", "", "return a"))
    assert result["labels"] == result["input_ids"]


def test_a_text_without_prompt_is_tokenised_as_the_tokenizer_does_by_itself() -> None:
    for tokenizer in (PLAIN, SENTENCEPIECE):
        result = feature(Example("f:1", "", "return a"), tokenizer)
        assert result["input_ids"] == [*tokenizer.encode("return a"), tokenizer.eos_token_id]


def test_a_single_token_has_nothing_to_predict_it_and_is_dropped() -> None:
    with pytest.raises(DataError, match="none of 1 examples has a token to learn"):
        feature(Example("f:1", "", "a"), byte_level(eos=False))


def test_the_beginning_is_marked_where_the_tokenizer_does_so_itself() -> None:
    with_bos, without = byte_level(bos=True), byte_level()
    assert feature(ADD, with_bos)["input_ids"][0] == with_bos.bos_token_id
    assert without.bos_token_id not in feature(ADD, without)["input_ids"]


def test_beginning_and_end_that_are_already_there_are_not_doubled() -> None:
    tokenizer = byte_level(bos=True)
    result = feature(Example("f:1", "", "<|begin|>return a<|end|>"), tokenizer)
    assert result["input_ids"].count(tokenizer.bos_token_id) == 1
    assert result["input_ids"].count(tokenizer.eos_token_id) == 1


def test_a_tokenizer_without_an_end_token_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = feature(ADD, byte_level(eos=False))
    assert "no end-of-sequence token" in caplog.text
    assert PLAIN.decode(result["input_ids"]) == ADD.prompt + ADD.completion


@pytest.mark.parametrize("completion", ["    return a + b\n", "a + b", "\n\nreturn", ": x", "\nx", "é 漢"])
def test_no_blank_enters_the_middle_of_a_text(completion: str) -> None:
    prompt = "def add(a, b):\n"
    for tokenizer in (SENTENCEPIECE, byte_level(add_blank=True)):
        result = feature(Example("f:1", prompt, completion), tokenizer)
        assert tokenizer.decode(result["input_ids"], skip_special_tokens=True).lstrip() == prompt + completion


def test_these_tokenizers_do_put_a_blank_before_a_text() -> None:
    for tokenizer in (SENTENCEPIECE, byte_level(add_blank=True)):
        twice = tokenizer.encode("a", add_special_tokens=False) * 2
        assert tokenizer.decode(twice).lstrip() == "a a"


def test_a_text_that_merges_with_whatever_stands_before_it_is_refused() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, " x": 1, " :": 2, " \n": 3}, unk_token="<unk>"))
    core.normalizer = normalizers.Prepend(" ")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<unk>")
    with pytest.raises(DataError, match="cannot tokenise 'b' as a continuation"):
        feature(Example("f:1", "a", "b"), tokenizer)


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=20), completion=st.text(min_size=1, max_size=20))
def test_any_text_round_trips(prompt: str, completion: str) -> None:
    result = feature(Example("f:1", prompt, completion))
    assert PLAIN.decode(result["input_ids"][:-1]) == prompt + completion
    assert PLAIN.decode(targets(result)[:-1]) == completion


def test_long_examples_are_cut_and_those_without_targets_dropped_with_a_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    long_completion = Example("f:1", "a", "return " * 40)
    long_prompt = Example("f:2", "return " * 40, "a")
    with caplog.at_level(logging.WARNING):
        results = component(max_length=16).tokenize_dataset([ADD, long_completion, long_prompt])
    assert [result["row_id"] for result in results] == ["f:1", "f:1"]
    assert [len(result["input_ids"]) <= 16 for result in results] == [True, True]
    assert len(results[1]["input_ids"]) == len(results[1]["labels"]) == 16
    assert "2 of 3 examples are longer than 16 tokens and were cut; 1 have no target left" in caplog.text
    with pytest.raises(DataError, match="none of 1 examples has a token to learn in its first 16 tokens"):
        component(max_length=16).tokenize_dataset([long_prompt])


def test_nothing_is_said_where_everything_fits(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        component().run(TokenizerContext([ADD]))
    assert caplog.text == ""


def test_features_do_not_depend_on_the_examples_beside_them() -> None:
    examples = [
        Example(f"f:{n}", "def f(x):\n" * (n % 3), "    return x\n" * (1 + n % 5)) for n in range(1030)
    ]
    together = component().tokenize_dataset(examples)
    assert [together[n] for n in (0, 1, 500, 1023, 1024, 1029)] == [
        feature(examples[n]) for n in (0, 1, 500, 1023, 1024, 1029)
    ]


def test_plain_rows_are_recognised_as_the_loader_does() -> None:
    # Tables give rows of other forms their absent fields as None.
    rows = [{"text": "return a", "prompt": None}, {"prompt": "a", "completion": "b", "weights": None}]
    results = component().tokenize_dataset(rows)
    assert [PLAIN.decode(targets(result)) for result in results] == ["return a<|end|>", "b<|end|>"]
    with pytest.raises(DataError, match="row 1: the row lacks the fields; found question"):
        component().tokenize_dataset([rows[0], {"question": "a"}])


def test_rewards_and_sample_weights_are_carried_along() -> None:
    result = feature(Example("f:1", "a", "b", reward=-1.0, weight=0.5))
    assert result["reward"] == -1.0
    assert result["weights"] == [0.5, 0.5, 1.0]  # the end token is not of the data
    assert "weights" not in feature(ADD)
    assert "reward" not in feature(ADD)


def test_character_spans_weigh_tokens_by_the_characters_they_hold() -> None:
    text = ADD.prompt + ADD.completion
    start = text.index("return")
    spans = [{"start": float(start), "end": float(start + 6), "weight": 3.0}]
    example = Example("f:1", ADD.prompt, ADD.completion, weight=spans)
    for tokenizer in (byte_level(bos=True), SENTENCEPIECE):
        result = feature(example, tokenizer)
        ids, weights = result["input_ids"], result["weights"]
        assert len(weights) == len(ids)
        assert weights[0] == weights[-1] == 1.0
        # The weight above 1 adds up to 2.0 on each of the six characters, whatever the tokens are.
        lengths = [len(tokenizer.convert_ids_to_tokens([i])[0]) for i in ids]
        total = sum((weight - 1.0) * length for weight, length in zip(weights, lengths, strict=True))
        assert total == pytest.approx(12.0)
        weighted = [i for i, weight in zip(ids, weights, strict=True) if weight != 1.0]
        assert len(weighted) == 1
        assert tokenizer.decode(weighted).strip() == "return"


def test_token_weights_must_fit_the_tokens_of_the_text() -> None:
    num_tokens = len(PLAIN.encode("a", add_special_tokens=False)) + len(
        PLAIN.encode("return a", add_special_tokens=False)
    )
    weights = [float(n) for n in range(num_tokens)]
    assert feature(Example("f:1", "a", "return a", weight=weights))["weights"] == [*weights, 1.0]
    with pytest.raises(DataError, match=f"f:7 has {num_tokens + 1} weights, but .* have {num_tokens} tokens"):
        feature(Example("f:7", "a", "return a", weight=[*weights, 1.0]))


def test_weights_are_cut_with_their_tokens() -> None:
    result = feature(Example("f:1", "a", "return " * 40, weight=2.0), max_length=8)
    assert result["weights"] == [2.0] * 8


CHAT = Example(
    "f:1",
    "",
    "",
    messages=(
        {"role": "system", "content": "say"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello there"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "thanks"},
    ),
)


def test_in_a_chat_only_what_the_assistant_writes_is_learned() -> None:
    tokenizer = byte_level(bos=True, chat_template=CHATML)
    result = feature(CHAT, tokenizer)
    assert tokenizer.decode(targets(result)) == "hello there<|end|>\nhello<|end|>\n"
    whole = tokenizer.apply_chat_template(list(CHAT.messages or ()), tokenize=False)
    # The template owns the beginning and the end: nothing is added.
    assert tokenizer.decode(result["input_ids"]) == whole
    everything = feature(CHAT, tokenizer, train_on_prompt=True)
    assert everything["labels"] == everything["input_ids"]


def test_an_assistant_turn_starts_where_generation_would() -> None:
    tokenizer = byte_level(chat_template=CHATML)
    result = feature(CHAT, tokenizer)
    generated_from = tokenizer.apply_chat_template(
        list(CHAT.messages or ())[:2], tokenize=False, add_generation_prompt=True
    )
    prompt = component(tokenizer).encode_prompt(generated_from)
    assert result["input_ids"][: len(prompt)] == prompt
    assert [label != -100 for label in result["labels"]].index(True) == len(prompt)


def test_message_weights_weigh_the_turns_of_the_assistant() -> None:
    tokenizer = byte_level(chat_template=CHATML)
    example = Example("f:1", "", "", messages=CHAT.messages, weight=[9.0, 9.0, 2.0, 9.0, 0.5, 9.0])
    result = feature(example, tokenizer)
    by_weight = {
        weight: tokenizer.decode(
            [i for i, w in zip(result["input_ids"], result["weights"], strict=True) if w == weight]
        )
        for weight in set(result["weights"])
    }
    assert set(by_weight) == {1.0, 2.0, 0.5}
    assert by_weight[2.0] == "hello there<|end|>\n"
    assert by_weight[0.5] == "hello<|end|>\n"


def test_chats_that_cannot_be_rendered_say_why() -> None:
    with pytest.raises(DataError, match=r"f:1 is a chat, but the tokenizer .* has no chat template"):
        feature(CHAT)
    refusing = byte_level(chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match="refuses the messages: no system role"):
        feature(CHAT, refusing)
    rewriting = byte_level(
        chat_template="{% for m in messages %}{{ m['content'] if loop.last else '...' }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"writes messages\[2\] differently depending on what follows"):
        feature(CHAT, rewriting)


def test_builtin_models_bring_their_tokenizer_and_saved_ones_load_from_their_folder(tmp_path: Path) -> None:
    builtin = tokenizer_registry.create("hf", {"path": "builtin:micro-llama"})
    assert PLAIN.eos_token_id is not None
    builtin.tokenizer.save_pretrained(tmp_path)
    loaded = tokenizer_registry.create("hf", {"path": str(tmp_path)})
    assert loaded.tokenize_dataset([ADD]) == builtin.tokenize_dataset([ADD])


def test_tokenizers_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no tokenizer can be loaded from"):
        HfTokenizer({"path": str(tmp_path)})
    with pytest.raises(UserInputError, match="no tokenizer is named"):
        HfTokenizer({})
    with pytest.raises(UserInputError, match="max_length is 1"):
        component(max_length=1)
