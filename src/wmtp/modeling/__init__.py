"""The MTP model: a Hugging Face causal language model with heads for the tokens after the next."""

from wmtp.modeling.flops import flops_per_token
from wmtp.modeling.generation import GenerateOptions, GenerateOutput
from wmtp.modeling.hidden_states import extract_hidden_states
from wmtp.modeling.mtp_model import MTPModel
from wmtp.modeling.outputs import LayerArguments, MTPOutput, TrunkOutput
from wmtp.modeling.probe import evaluating
from wmtp.modeling.trainable import LateParameters, choose_trainable, trainable_parameters
from wmtp.modeling.value_head import ValueHead

__all__ = [
    "GenerateOptions",
    "GenerateOutput",
    "LateParameters",
    "LayerArguments",
    "MTPModel",
    "MTPOutput",
    "TrunkOutput",
    "ValueHead",
    "choose_trainable",
    "evaluating",
    "extract_hidden_states",
    "flops_per_token",
    "trainable_parameters",
]
