"""The MTP model: a Hugging Face causal language model with heads for the tokens after the next."""

from wmtp.modeling.hidden_states import extract_hidden_states
from wmtp.modeling.mtp_model import MTPModel
from wmtp.modeling.outputs import LayerArguments, MTPOutput, TrunkOutput

__all__ = ["LayerArguments", "MTPModel", "MTPOutput", "TrunkOutput", "extract_hidden_states"]
