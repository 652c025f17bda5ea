"""Mistral with a state stream."""

from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM, MistralModel

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTMistralConfig(SSTConfigMixin, MistralConfig):
    model_type = "sst_mistral"
    sst: dict | None = None


class SSTMistralDecoderLayer(StreamLayerMixin, MistralDecoderLayer):
    pass


class SSTMistralModel(StreamModel, MistralModel):
    config: SSTMistralConfig
    layer_class = SSTMistralDecoderLayer
    _no_split_modules = ("SSTMistralDecoderLayer",)


class SSTMistralForCausalLM(StreamForCausalLM, MistralForCausalLM):
    config: SSTMistralConfig
    config_class = SSTMistralConfig
    model_class = SSTMistralModel
