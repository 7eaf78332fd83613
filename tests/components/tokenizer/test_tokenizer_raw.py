"""Raw tokenizer files: the same ids as sentencepiece and mistral-common, special tokens, export."""

from __future__ import annotations

import base64
import importlib.util
import json
import logging
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from wmtp.components.registry import tokenizer_registry
from wmtp.components.tokenizer import HfTokenizer, RawTokenizer, TokenizerSettings
from wmtp.components.tokenizer.raw_files import find_raw_file, load_raw_tokenizer
from wmtp.exceptions import ModelLoadError

SPECIAL = "</s> <s>x</s><unk><pad><0x0A>[INST] y [/INST]"
TEXTS = (
    "",
    " ",
    "x",
    " leading",
    "   three\n\n\n",
    "def f(x):\n\tif x:\n\t\treturn  [x, -1]  # \u00e9\r\n",
    "\ud55c\uad6d\uc5b4 \u4e00\u4e8c\u4e09 \u3042",
    "\U0001f600\u200d\U0001f525 e\u0301 \u00a0\ufb01\x00",
    SPECIAL,
    "x   y" + "  x" * 7,
    *(char * count for char in " \ta=#-\n" for count in (2, 3, 7, 15, 16, 17, 31, 33, 47, 64, 99)),
)
pieces_of_text = st.sampled_from(
    [
        "a",
        " ",
        "  ",
        "\t",
        "\n",
        "=",
        "#",
        "\ud55c",
        "\U0001f600",
        "</s>",
        "<s>",
        "<0x0A>",
        "return",
        "\u00e9",
    ]
)


def mistral_data() -> Path:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("mistral-common is not installed")
    return Path(spec.origin).parent / "data"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small SentencePiece models: BPE with bytes, with symbols of the user's, unigram; padding has an id."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    corpus = folder / "corpus.txt"
    lines = Path(json.__file__).read_text(encoding="utf-8").splitlines()
    corpus.write_text("\n".join(line for line in lines if line.strip()), encoding="utf-8")
    common = {
        "input": str(corpus),
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "pad_id": 3,
        "minloglevel": 2,
    }
    variants = {
        "bpe": {"model_type": "bpe", "allow_whitespace_only_pieces": True},
        "symbols": {"model_type": "bpe", "user_defined_symbols": ["[REF]", "\u2581<PRE>", "++"]},
        "unigram": {"model_type": "unigram"},
        "tidy": {
            "model_type": "bpe",
            "remove_extra_whitespaces": True,
            "normalization_rule_name": "nmt_nfkc",
        },
        "word": {"model_type": "word", "byte_fallback": False, "hard_vocab_limit": False},
        "plain": {"model_type": "bpe", "add_dummy_prefix": False},
    }
    for name, options in variants.items():
        prefix = folder / name
        sentencepiece.SentencePieceTrainer.train(model_prefix=str(prefix), **{**common, **options})
    return {name: folder / f"{name}.model" for name in variants}


def assert_same_ids(file: Path, texts: tuple[str, ...]) -> None:
    tokenizer = load_raw_tokenizer(file)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == processor.encode(text), (file.name, text)
    assert len(tokenizer) == processor.vocab_size()


@pytest.mark.parametrize("name", ["bpe", "symbols", "unigram", "tidy", "plain"])
def test_sentencepiece_models_give_the_ids_of_sentencepiece(trained: dict[str, Path], name: str) -> None:
    assert_same_ids(trained[name], TEXTS)


def test_symbols_of_the_user_are_single_tokens_wherever_they_stand(trained: dict[str, Path]) -> None:
    assert_same_ids(trained["symbols"], ("[REF]", " [REF]x", "a[REF][REF] b <PRE>", "<PRE>x+++", "++ ++"))


@given(st.lists(pieces_of_text, max_size=40).map("".join))
@settings(max_examples=60, deadline=None)
def test_any_text_has_the_ids_of_sentencepiece(text: str) -> None:
    tokenizer, processor = mistral_v1()
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == processor.encode(text)


_CACHE: dict[str, tuple] = {}


def mistral_v1() -> tuple:
    file = mistral_data() / "tokenizer.model.v1"
    if "v1" not in _CACHE:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        _CACHE["v1"] = load_raw_tokenizer(file), processor
    return _CACHE["v1"]


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", pytest.param("mistral_instruct_tokenizer_241114.model.v7")]
)
def test_published_models_give_the_ids_of_sentencepiece(name: str) -> None:
    assert_same_ids(mistral_data() / name, TEXTS)


def test_special_tokens_are_those_of_the_file(trained: dict[str, Path]) -> None:
    tokenizer = load_raw_tokenizer(trained["bpe"])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained["bpe"]))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (processor.bos_id(), processor.eos_id())
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (3, processor.unk_id())
    assert tokenizer("x")["input_ids"][0] == processor.bos_id()
    published, _ = mistral_v1()
    assert published.pad_token_id is None


def test_spelled_out_special_tokens_stay_text_and_decode_to_themselves(trained: dict[str, Path]) -> None:
    tokenizer = load_raw_tokenizer(trained["bpe"])
    ids = tokenizer(SPECIAL, add_special_tokens=False)["input_ids"]
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id} & set(ids)
    assert tokenizer.decode(ids) == SPECIAL
    component = RawTokenizer(TokenizerSettings(path=str(trained["bpe"])))
    (feature,) = component.tokenize_dataset([{"prompt": "x", "completion": "y</s>z"}])
    assert list(feature["input_ids"]).count(tokenizer.eos_token_id) == 1
    assert feature["input_ids"][-1] == tokenizer.eos_token_id


def test_offsets_cover_the_text(trained: dict[str, Path]) -> None:
    tokenizer = load_raw_tokenizer(trained["bpe"])
    text = "x = \ud55c + 1\n"
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert {at for start, end in offsets for at in range(start, end)} == set(range(len(text)))


@pytest.mark.parametrize("model_type", [None, "llama", "mistral"])
def test_a_saved_tokenizer_is_loaded_by_transformers_with_the_same_ids(
    trained: dict[str, Path], tmp_path: Path, model_type: str | None
) -> None:
    component = RawTokenizer(TokenizerSettings(path=str(trained["bpe"])))
    component.tokenizer.save_pretrained(tmp_path)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == component.tokenizer(text)["input_ids"], text
    assert loaded.eos_token_id == component.tokenizer.eos_token_id
    assert loaded.pad_token_id == component.tokenizer.pad_token_id


def test_the_file_is_found_beside_the_model_and_one_folder_up(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "7B_1T_4"
    model.mkdir()
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.model or tekken\.json, nor has the folder"):
        find_raw_file(str(model))
    shutil.copy(trained["bpe"], tmp_path / "tokenizer.model")
    assert find_raw_file(str(model)).samefile(tmp_path / "tokenizer.model")
    shutil.copy(trained["bpe"], model / "tokenizer.model")
    assert find_raw_file(str(model)) == model / "tokenizer.model"
    assert find_raw_file(str(trained["plain"])) == trained["plain"]
    (model / "tekken.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="two tokenizers"):
        find_raw_file(str(model))


def test_native_weights_with_a_raw_file_alone_load_with_the_default_type(
    trained: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "7B_1T_4"
    model.mkdir()
    (model / "params.json").write_text("{}")
    shutil.copy(trained["bpe"], tmp_path / "tokenizer.model")
    with caplog.at_level(logging.INFO):
        found = HfTokenizer(TokenizerSettings(path=str(model)))
    assert "tokenizer.model is converted" in caplog.text
    raw = tokenizer_registry.create("raw", {"path": str(model)})
    assert found.tokenizer(SPECIAL)["input_ids"] == raw.tokenizer(SPECIAL)["input_ids"]
    (model / "params.json").unlink()
    with pytest.raises(ModelLoadError, match="no tokenizer can be loaded"):
        HfTokenizer(TokenizerSettings(path=str(model)))


def test_a_hugging_face_tokenizer_beside_a_raw_file_wins_with_the_default_type(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    other = load_raw_tokenizer(trained["plain"])
    other.save_pretrained(tmp_path)
    shutil.copy(trained["bpe"], tmp_path / "tokenizer.model")
    assert HfTokenizer(TokenizerSettings(path=str(tmp_path))).tokenizer.get_vocab() == other.get_vocab()
    raw = RawTokenizer(TokenizerSettings(path=str(tmp_path))).tokenizer
    assert raw.get_vocab() != other.get_vocab()


def test_files_that_are_no_tokenizers_are_refused_by_name(trained: dict[str, Path], tmp_path: Path) -> None:
    tiktoken_file = tmp_path / "tokenizer.model"
    tiktoken_file.write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ModelLoadError, match="not a SentencePiece model") as caught:
        load_raw_tokenizer(tiktoken_file)
    assert "tokenizer.json" in str(caught.value)
    vocabulary = tmp_path / "tekken.json"
    vocabulary.write_text('{"config": {}}')
    with pytest.raises(ModelLoadError, match="not a tekken vocabulary"):
        load_raw_tokenizer(vocabulary)
    with pytest.raises(ModelLoadError, match="neither a BPE nor a unigram"):
        load_raw_tokenizer(trained["word"])
    with pytest.raises(ModelLoadError, match="does not exist"):
        load_raw_tokenizer(tmp_path / "absent.model")


def test_a_model_that_cannot_be_converted_exactly_is_refused(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(trained["bpe"].read_bytes())
    # A feature that the conversion does not know: the blank goes behind each word.
    proto.trainer_spec.treat_whitespace_as_suffix = True
    file = tmp_path / "tokenizer.model"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelLoadError, match="cannot be converted exactly"):
        load_raw_tokenizer(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_tekken_files_give_the_ids_of_mistral_common(name: str, tmp_path: Path) -> None:
    file = mistral_data() / name
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    expected = Tekkenizer.from_file(file)
    tokenizer = load_raw_tokenizer(file)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == expected.encode(text, bos=False, eos=False), text
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert special == (expected.bos_id, expected.eos_id, expected.pad_id, expected.unk_id)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(SPECIAL)["input_ids"] == tokenizer(SPECIAL)["input_ids"]


def write_tekken(folder: Path, pattern: str) -> None:
    vocabulary = [{"rank": i, "token_bytes": _base64(bytes([i])), "token_str": None} for i in range(256)]
    vocabulary.append({"rank": 256, "token_bytes": _base64(b"  "), "token_str": "  "})
    special = ["<unk>", "<s>", "</s>", "[INST]"]
    content = {
        "config": {
            "pattern": pattern,
            "num_vocab_tokens": 257,
            "default_vocab_size": 261,
            "default_num_special_tokens": 4,
            "version": "v7",
        },
        "vocab": vocabulary,
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(special)
        ],
    }
    (folder / "tekken.json").write_text(json.dumps(content))


def test_a_small_tekken_vocabulary_has_its_own_special_tokens(tmp_path: Path) -> None:
    write_tekken(tmp_path, r"\s+|\w+|[^\s\w]+")
    tokenizer = RawTokenizer({"path": str(tmp_path)}).tokenizer
    assert tokenizer("a  </s>")["input_ids"] == [1, 4 + ord("a"), 4 + 256, *(4 + ord(c) for c in "</s>")]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, None)


def test_a_tekken_pattern_that_takes_a_spelled_out_special_token_whole_is_refused(tmp_path: Path) -> None:
    write_tekken(tmp_path, r"\s+|\S+")
    with pytest.raises(ModelLoadError, match="cannot be converted exactly: '<unk>'"):
        RawTokenizer({"path": str(tmp_path)})


def _base64(data: bytes) -> str:

    return base64.b64encode(data).decode()
