"""Llama (and what shares its layout, such as SmolLM2) with a state stream."""

from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTLlamaConfig(SSTConfigMixin, LlamaConfig):
    model_type = "sst_llama"
    sst: dict | None = None


class SSTLlamaDecoderLayer(StreamLayerMixin, LlamaDecoderLayer):
    pass


class SSTLlamaModel(StreamModel, LlamaModel):
    config: SSTLlamaConfig
    layer_class = SSTLlamaDecoderLayer
    _no_split_modules = ("SSTLlamaDecoderLayer",)


class SSTLlamaForCausalLM(StreamForCausalLM, LlamaForCausalLM):
    config: SSTLlamaConfig
    config_class = SSTLlamaConfig
    model_class = SSTLlamaModel
