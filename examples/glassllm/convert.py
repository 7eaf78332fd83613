"""Turn the small trained model of the `glassllm` package into a Hugging Face Llama directory.

    pip install glassllm
    python examples/glassllm/convert.py models/glassllm-en --language en

The package keeps its model as NumPy arrays. Two things differ from Hugging Face's Llama besides the names:
matrices are stored [in, out] and applied as `x @ W`, so they are transposed; and rotary positions turn the
neighbouring columns 2i, 2i+1 of a head, where Hugging Face turns i and i + d/2, so the rows of the query and
key projections are reordered. Embedding and unembedding are one matrix, as they are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import glassllm
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from wmtp.modeling.formats.meta_native import to_half_split

# Name in the package -> name in Hugging Face's Llama, for one decoder layer.
LAYER_NAMES = {
    "norm1.gamma": "input_layernorm.weight",
    "attn.W_Q": "self_attn.q_proj.weight",
    "attn.W_K": "self_attn.k_proj.weight",
    "attn.W_V": "self_attn.v_proj.weight",
    "attn.W_O": "self_attn.o_proj.weight",
    "norm2.gamma": "post_attention_layernorm.weight",
    "ffn.W1": "mlp.gate_proj.weight",
    "ffn.W3": "mlp.up_proj.weight",
    "ffn.W2": "mlp.down_proj.weight",
}
# The package's tokenizer writes a space as this sign, and cuts text into these pieces before it merges.
SPACE = "▁"
PIECES = r"\n|▁*[^▁\n]+|▁+"


def convert_model(source: glassllm.GlassLM) -> LlamaForCausalLM:
    """Return the same model as a Hugging Face Llama, in fp32.

    Raises:
        RuntimeError: a parameter of the source has no place, or one of the Llama none to come from.
    """
    cfg = source.cfg
    arrays = {name: torch.from_numpy(array.data.copy()) for name, array in source.named_parameters().items()}
    rotary_heads = {"attn.W_Q": cfg.n_heads, "attn.W_K": cfg.n_kv_heads}

    def convert(name: str, tensor: Tensor) -> Tensor:
        weight = tensor.T.contiguous() if tensor.ndim == 2 else tensor
        return to_half_split(weight, rotary_heads[name]) if name in rotary_heads else weight

    # Already [vocabulary, dim]; the unembedding is the same matrix.
    embedding = arrays.pop("E")
    state = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding,
        "model.norm.weight": arrays.pop("norm_f.gamma"),
    }
    for full_name, tensor in arrays.items():
        _, index, name = full_name.split(".", 2)
        state[f"model.layers.{index}.{LAYER_NAMES[name]}"] = convert(name, tensor)
    model = LlamaForCausalLM(convert_config(source))
    model.load_state_dict(state, strict=True)
    return model.eval()


def convert_config(source: glassllm.GlassLM) -> LlamaConfig:
    """Return the configuration of the same model."""
    cfg = source.cfg
    return LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=source.blocks[0].ffn.W1.data.shape[1],
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        max_position_embeddings=cfg.max_len,
        rms_norm_eps=cfg.eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_base},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )


def convert_tokenizer(source: glassllm.Tokenizer, *, max_length: int) -> PreTrainedTokenizerFast:
    """Return the same tokenizer as a Hugging Face fast one.

    Ids are the same for every text but two kinds: the names of special tokens (`<eos>`) are tokens here and
    ordinary characters there, and an unknown character is decoded to `<unk>` and not to a sign of its own.
    """
    bpe = models.BPE(
        vocab=source.token_to_id, merges=source.merges, unk_token="<unk>", fuse_unk=False, byte_fallback=False
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<pad>", "<unk>", "<bos>", "<eos>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def convert(directory: Path, language: str = "en") -> None:
    """Write the package's model of this language, with its tokenizer, as a Hugging Face directory."""
    model, tokenizer = glassllm.load_pretrained(language)
    convert_model(model).save_pretrained(directory)
    convert_tokenizer(tokenizer, max_length=model.cfg.max_len).save_pretrained(directory)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the Hugging Face directory is written")
    parser.add_argument("--language", choices=glassllm.LANGUAGES, default="en")
    arguments = parser.parse_args()
    disable_progress_bar()
    convert(arguments.directory, arguments.language)


if __name__ == "__main__":
    main()
