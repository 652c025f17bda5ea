"""OLMo 2 with a state stream."""

from transformers import Olmo2Config
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer, Olmo2ForCausalLM, Olmo2Model

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTOlmo2Config(SSTConfigMixin, Olmo2Config):
    model_type = "sst_olmo2"
    sst: dict | None = None


class SSTOlmo2DecoderLayer(StreamLayerMixin, Olmo2DecoderLayer):
    def attention_input(self, x):
        return x

    def rejoin(self, x, out):
        return x.float() + self.post_attention_layernorm(out.float())

    def feed_forward(self, mixed, dtype):
        return self.post_feedforward_layernorm(self.mlp(mixed.to(dtype)).float())


class SSTOlmo2Model(StreamModel, Olmo2Model):
    config: SSTOlmo2Config
    layer_class = SSTOlmo2DecoderLayer
    _no_split_modules = ("SSTOlmo2DecoderLayer",)


class SSTOlmo2ForCausalLM(StreamForCausalLM, Olmo2ForCausalLM):
    config: SSTOlmo2Config
    config_class = SSTOlmo2Config
    model_class = SSTOlmo2Model
