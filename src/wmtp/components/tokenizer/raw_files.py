"""Raw tokenizer files, as models are first published, to Hugging Face tokenizers with the same ids.

`tokenizer.model` is a SentencePiece model (Llama, Code Llama, the multi-token models of Gloeckle et al.),
`tekken.json` Mistral's byte-level vocabulary. Special tokens are those of the file. Spelled out in the data
they stay text, as in the tools these files come from: nothing that is written in a program ends a document.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no stubs
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.integrations.mistral.tokenizer import MistralConverter

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.formats.sources import LocalSource, ModelSource, locate_source

RAW_FILES = ("tokenizer.model", "tekken.json")
# One of these says how transformers is to read the raw file, or stands for it.
_HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
META_FILES = ("params.json", "consolidated.pth")
_BLANK = "▁"
# Types of SentencePiece pieces.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
# A score that no path takes while there is another.
_NEVER = -1e6
# Texts that tell a wrong conversion: blanks, tabs, bytes, other scripts, spelled-out special tokens.
_PROBES = (
    "",
    "x",
    " x",
    "\n",
    "def f(x):\n\tif x:\n        return  [x, -1]  # \u00e9\r\n\n\n",
    "a" * 40 + "=" * 60 + "#" * 33,
    "    " * 9 + "x   y" + "  x" * 7 + " " * 47,
    "\ud55c\uad6d\uc5b4 \u4e00\u4e8c \U0001f600\u200d\U0001f525 \u00a0\u2003\ufb01e\u0301\x00\x7f",
    "</s> <s>x</s><unk><pad> <0x0A>[INST] y [/INST]<|endoftext|>",
)


def find_raw_file(path: str) -> Path:
    """The raw tokenizer file at `path`: a file, or a folder or hub id that has one, there or one folder up.

    Raises:
        ModelLoadError: there is none, or there are two and nothing says which.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return local
    folder = _folder(path)
    found = _raw_files_in(folder) or _raw_files_in(folder.parent())
    if not found:
        raise ModelLoadError(
            f"{path} has no {' or '.join(RAW_FILES)}, nor has the folder above it",
            remedy="name the file in model.tokenizer.path, or use model.tokenizer.type: hf",
        )
    return _only(found, path)


def find_only_raw_file(path: str) -> Path | None:
    """The raw file of a path that has no Hugging Face tokenizer; None where it has one, or no raw file.

    One folder up counts for a folder of native weights alone, where Meta's repositories have it.

    Raises:
        ModelLoadError: there is nothing at the path, or two raw files.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return local
    folder = _folder(path)
    names = folder.names()
    if names.intersection(_HUGGING_FACE_FILES):
        return None
    found = _raw_files_in(folder)
    if not found and names.intersection(META_FILES):
        found = _raw_files_in(folder.parent())
    return _only(found, path) if found else None


def read_sentencepiece_model(path: str) -> bytes | None:
    """Contents of the `tokenizer.model` that the tokenizer at `path` was read from or that lies beside it.

    None where there is none. It goes along when a model is written, because Meta's layout knows no other.
    """
    name = RAW_FILES[0]
    file = find_only_raw_file(path) or _folder(path).find(name)
    return file.read_bytes() if file is not None and file.name == name else None


def load_raw_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Read a SentencePiece or tekken file.

    Raises:
        ModelLoadError: it is neither, or has something that would give other ids after conversion.
    """
    if not file.is_file():
        raise ModelLoadError(f"tokenizer file {file} does not exist")
    with file.open("rb") as stream:
        is_json = stream.read(64).lstrip().startswith(b"{")
    backend, special = _read_tekken(file) if is_json else _read_sentencepiece(file)
    bos = special.get("bos_token")
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        tokenizer_object=backend,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        **special,
    )
    # Given to the constructor, transformers would look the path up as a name on the hub.
    tokenizer.name_or_path = str(file)
    return tokenizer


def _folder(path: str) -> ModelSource:
    local = Path(path).expanduser()
    # One folder up is one folder up from where the files are, also for a link to their folder.
    return LocalSource(local.resolve()) if local.is_dir() else locate_source(path)


def _raw_files_in(folder: ModelSource | None) -> list[Path]:
    if folder is None:
        return []
    names = folder.names()
    return [file for name in RAW_FILES if name in names and (file := folder.find(name)) is not None]


def _only(found: list[Path], path: str) -> Path:
    if len(found) > 1:
        raise ModelLoadError(
            f"{path} has two tokenizers: {', '.join(map(str, found))}",
            remedy="name one of the files in model.tokenizer.path",
        )
    return found[0]


def _read_tekken(file: Path) -> tuple[Tokenizer, dict[str, str]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        backend: Tokenizer = MistralConverter(str(file)).converted()
    except ImportError as error:
        raise ModelLoadError(
            f"{file} is of the first tekken version, whose special tokens only mistral-common knows",
            remedy="pip install mistral-common, or use the model's tokenizer.json",
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"{file} is not a tekken vocabulary: {error!r}",
            remedy="give tekken.json or tokenizer.model; model.tokenizer.type: hf reads a tokenizer.json",
        ) from error
    size = content["config"].get("default_vocab_size", backend.get_vocab_size())
    if backend.get_vocab_size() != size:
        raise ModelLoadError(f"{file} says {size} tokens and has {backend.get_vocab_size()}")
    backend.encode_special_tokens = True
    for token_id, token in backend.get_added_tokens_decoder().items():
        # A word of the text that is looked up whole would be taken for the special token of that name.
        if token_id in backend.encode(token.content, add_special_tokens=False).ids:
            raise ModelLoadError(
                f"{file} cannot be converted exactly: {token.content!r} in a text would be a special token",
                remedy="use the model's tokenizer.json (model.tokenizer.type: hf)",
            )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return backend, {key: name for key, name in names.items() if backend.token_to_id(name) is not None}


def _read_sentencepiece(file: Path) -> tuple[Tokenizer, dict[str, str]]:
    content = file.read_bytes()
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made on import
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise _not_sentencepiece(file) from error
    if not proto.pieces:
        raise _not_sentencepiece(file)
    if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise ModelLoadError(
            f"{file} is neither a BPE nor a unigram model", remedy="use the model's tokenizer.json"
        )
    backend = _convert_sentencepiece(proto)
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    for probe in _PROBES:
        if backend.encode(probe, add_special_tokens=False).ids != processor.encode(probe):
            raise ModelLoadError(
                f"{file} cannot be converted exactly: its own tokens of {probe[:40]!r} would be others",
                remedy="use the Hugging Face version of this tokenizer (tokenizer.json)",
            )
    ids = {
        "unk_token": processor.unk_id(),
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "pad_token": processor.pad_id(),
    }
    return backend, {key: processor.id_to_piece(index) for key, index in ids.items() if index >= 0}


def _not_sentencepiece(file: Path) -> ModelLoadError:
    return ModelLoadError(
        f"{file} is not a SentencePiece model",
        remedy="a tokenizer.model of Llama 3 is a tiktoken file: use the model's tokenizer.json (type: hf)",
    )


def _convert_sentencepiece(proto: Any) -> Tokenizer:
    """Build the tokenizer of a SentencePiece model."""
    pieces = list(proto.pieces)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    user_defined = sorted((p.piece for p in pieces if p.type == _USER_DEFINED), key=len, reverse=True)
    if trainer.model_type == _BPE:
        backend = Tokenizer(
            models.BPE(
                vocab={piece.piece: index for index, piece in enumerate(pieces)},
                merges=_merges(pieces),
                unk_token=trainer.unk_piece,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
                # A symbol of the user's stands alone and has no merges that lead to it.
                ignore_merges=bool(user_defined),
            )
        )
    else:
        is_text = (_NORMAL, _USER_DEFINED)
        scores = [(piece.piece, piece.score if piece.type in is_text else _NEVER) for piece in pieces]
        unknown = next(index for index, piece in enumerate(pieces) if piece.type == _UNKNOWN)
        backend = Tokenizer(models.Unigram(scores, unk_id=unknown, byte_fallback=trainer.byte_fallback))
    steps: list[normalizers.Normalizer] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(_BLANK))
    steps.append(normalizers.Replace(" ", _BLANK))
    backend.normalizer = normalizers.Sequence(steps)
    if user_defined:
        pattern = "|".join(_escape(piece) for piece in user_defined)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    decoding: list[decoders.Decoder] = [
        decoders.Replace(_BLANK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if normalizer.add_dummy_prefix:
        decoding.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(decoding)
    backend.add_special_tokens(
        [AddedToken(p.piece, normalized=False) for p in pieces if p.type in (_UNKNOWN, _CONTROL)]
    )
    backend.encode_special_tokens = True
    return backend


def _merges(pieces: list[Any]) -> list[tuple[str, str]]:
    """Merges that do what SentencePiece does: best score first, and among equals the leftmost.

    Pieces of equal score (runs of blanks in Mistral's files) are merged from left to right, each growing as
    far as it can; trying the longest left part first does the same. Only pieces of text take part: no text
    grows into a special token or a byte.
    """
    scores = {p.piece: p.score for p in pieces if p.type in (_NORMAL, _USER_DEFINED, _UNUSED)}
    splits = [
        (-score, -at, piece[:at], piece[at:])
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(splits)]


def _escape(text: str) -> str:
    """A pattern (Oniguruma) that matches the text as it stands."""
    return "".join(char if char.isalnum() or char == _BLANK else f"\\x{{{ord(char):x}}}" for char in text)
