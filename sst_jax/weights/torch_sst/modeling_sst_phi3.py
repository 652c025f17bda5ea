"""Phi-3 and Phi-4 with a state stream."""

from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3ForCausalLM, Phi3Model

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTPhi3Config(SSTConfigMixin, Phi3Config):
    model_type = "sst_phi3"
    sst: dict | None = None


class SSTPhi3DecoderLayer(StreamLayerMixin, Phi3DecoderLayer):
    pass


class SSTPhi3Model(StreamModel, Phi3Model):
    config: SSTPhi3Config
    layer_class = SSTPhi3DecoderLayer
    _no_split_modules = ("SSTPhi3DecoderLayer",)


class SSTPhi3ForCausalLM(StreamForCausalLM, Phi3ForCausalLM):
    config: SSTPhi3Config
    config_class = SSTPhi3Config
    model_class = SSTPhi3Model
