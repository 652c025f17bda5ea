"""Ministral 3 with a state stream."""

from transformers import Ministral3Config
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3DecoderLayer,
    Ministral3ForCausalLM,
    Ministral3Model,
)

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTMinistral3Config(SSTConfigMixin, Ministral3Config):
    model_type = "sst_ministral3"
    sst: dict | None = None


class SSTMinistral3DecoderLayer(StreamLayerMixin, Ministral3DecoderLayer):
    def attention_arguments(self, steps):
        return {"position_ids": steps.positions}


class SSTMinistral3Model(StreamModel, Ministral3Model):
    config: SSTMinistral3Config
    layer_class = SSTMinistral3DecoderLayer
    _no_split_modules = ("SSTMinistral3DecoderLayer",)


class SSTMinistral3ForCausalLM(StreamForCausalLM, Ministral3ForCausalLM):
    config: SSTMinistral3Config
    config_class = SSTMinistral3Config
    model_class = SSTMinistral3Model
