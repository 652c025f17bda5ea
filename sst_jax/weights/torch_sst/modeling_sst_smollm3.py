"""SmolLM3 with a state stream."""

from transformers import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer, SmolLM3ForCausalLM, SmolLM3Model

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTSmolLM3Config(SSTConfigMixin, SmolLM3Config):
    model_type = "sst_smollm3"
    sst: dict | None = None


class SSTSmolLM3DecoderLayer(StreamLayerMixin, SmolLM3DecoderLayer):
    pass


class SSTSmolLM3Model(StreamModel, SmolLM3Model):
    config: SSTSmolLM3Config
    layer_class = SSTSmolLM3DecoderLayer
    _no_split_modules = ("SSTSmolLM3DecoderLayer",)


class SSTSmolLM3ForCausalLM(StreamForCausalLM, SmolLM3ForCausalLM):
    config: SSTSmolLM3Config
    config_class = SSTSmolLM3Config
    model_class = SSTSmolLM3Model
