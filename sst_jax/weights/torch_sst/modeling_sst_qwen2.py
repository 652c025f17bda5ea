"""Qwen 2.5 with a state stream."""

from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTQwen2Config(SSTConfigMixin, Qwen2Config):
    model_type = "sst_qwen2"
    sst: dict | None = None


class SSTQwen2DecoderLayer(StreamLayerMixin, Qwen2DecoderLayer):
    pass


class SSTQwen2Model(StreamModel, Qwen2Model):
    config: SSTQwen2Config
    layer_class = SSTQwen2DecoderLayer
    _no_split_modules = ("SSTQwen2DecoderLayer",)


class SSTQwen2ForCausalLM(StreamForCausalLM, Qwen2ForCausalLM):
    config: SSTQwen2Config
    config_class = SSTQwen2Config
    model_class = SSTQwen2Model
