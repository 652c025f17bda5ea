"""Granite with a state stream."""

from transformers import GraniteConfig
from transformers.models.granite.modeling_granite import GraniteDecoderLayer, GraniteForCausalLM, GraniteModel

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTGraniteConfig(SSTConfigMixin, GraniteConfig):
    model_type = "sst_granite"
    sst: dict | None = None


class SSTGraniteDecoderLayer(StreamLayerMixin, GraniteDecoderLayer):
    def rejoin(self, x, out):
        return x.float() + out.float() * self.residual_multiplier

    def feed_forward(self, mixed, dtype):
        return super().feed_forward(mixed, dtype) * self.residual_multiplier


class SSTGraniteModel(StreamModel, GraniteModel):
    config: SSTGraniteConfig
    layer_class = SSTGraniteDecoderLayer
    _no_split_modules = ("SSTGraniteDecoderLayer",)

    def scale_embeddings(self, x):
        return x * self.embedding_multiplier


class SSTGraniteForCausalLM(StreamForCausalLM, GraniteForCausalLM):
    config: SSTGraniteConfig
    config_class = SSTGraniteConfig
    model_class = SSTGraniteModel
