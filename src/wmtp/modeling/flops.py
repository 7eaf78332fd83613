"""How much arithmetic a training step needs, for the utilisation that is reported (MFU)."""

from __future__ import annotations

from wmtp.modeling.mtp_model import MTPModel


def flops_per_token(model: MTPModel, seq_len: int) -> float:
    """Estimate the floating-point operations of one forward and backward pass, per token of the sequence.

    `6 * (N - N_embedding + (H - 1) * V * D) + 12 * A * D * seq_len`, after PaLM (Chowdhery et al., 2022,
    appendix B): two operations a parameter forward and four backward, and the attention matrix, counted
    in full though causal attention needs half of it. N counts wrapped model and heads; the input embedding is
    looked up and not multiplied, unless it is tied, when it counts once, as the unembedding; the unembedding
    (V x D) is applied by each of the H heads; A is the number of layers with attention: the model's own, and
    one more for each head that is a decoder layer. Every token is taken as a target and all experts of a
    mixture as active; recomputation is not counted.
    """
    unembedding_size = model.unembedding_VD.numel()
    embedding = model.causal_lm.get_input_embeddings().get_parameter("weight")
    is_tied = embedding is model.unembedding_VD
    num_multiplied = model.num_parameters - (0 if is_tied else embedding.numel())
    num_multiplied += (model.horizon - 1) * unembedding_size
    num_attentions = model.config.get_text_config(decoder=True).num_hidden_layers
    if model.head_form in ("transformer", "sequential"):
        num_attentions += model.horizon - 1
    return float(6 * num_multiplied + 12 * num_attentions * model.hidden_size * seq_len)
