"""Qwen 3 with a state stream."""

from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTQwen3Config(SSTConfigMixin, Qwen3Config):
    model_type = "sst_qwen3"
    sst: dict | None = None


class SSTQwen3DecoderLayer(StreamLayerMixin, Qwen3DecoderLayer):
    pass


class SSTQwen3Model(StreamModel, Qwen3Model):
    config: SSTQwen3Config
    layer_class = SSTQwen3DecoderLayer
    _no_split_modules = ("SSTQwen3DecoderLayer",)


class SSTQwen3ForCausalLM(StreamForCausalLM, Qwen3ForCausalLM):
    config: SSTQwen3Config
    config_class = SSTQwen3Config
    model_class = SSTQwen3Model
