"""OLMo 3 with a state stream."""

from transformers import Olmo3Config
from transformers.models.olmo3.modeling_olmo3 import Olmo3DecoderLayer, Olmo3ForCausalLM, Olmo3Model

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTOlmo3Config(SSTConfigMixin, Olmo3Config):
    model_type = "sst_olmo3"
    sst: dict | None = None


class SSTOlmo3DecoderLayer(StreamLayerMixin, Olmo3DecoderLayer):
    def attention_input(self, x):
        return x

    def rejoin(self, x, out):
        return x.float() + self.post_attention_layernorm(out.float())

    def feed_forward(self, mixed, dtype):
        return self.post_feedforward_layernorm(self.mlp(mixed.to(dtype)).float())


class SSTOlmo3Model(StreamModel, Olmo3Model):
    config: SSTOlmo3Config
    layer_class = SSTOlmo3DecoderLayer
    _no_split_modules = ("SSTOlmo3DecoderLayer",)

    def rotations(self, x, position_ids):
        return {kind: self.rotary_emb(x, position_ids, kind) for kind in set(self.config.layer_types)}


class SSTOlmo3ForCausalLM(StreamForCausalLM, Olmo3ForCausalLM):
    config: SSTOlmo3Config
    config_class = SSTOlmo3Config
    model_class = SSTOlmo3Model
