"""Gemma 3 with a state stream."""

from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM, Gemma3TextModel

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTGemma3Config(SSTConfigMixin, Gemma3TextConfig):
    model_type = "sst_gemma3_text"
    sst: dict | None = None


class SSTGemma3DecoderLayer(StreamLayerMixin, Gemma3DecoderLayer):
    def rejoin(self, x, out):
        return x.float() + self.post_attention_layernorm(out.float())

    def feed_forward(self, mixed, dtype):
        out = self.mlp(self.pre_feedforward_layernorm(mixed).to(dtype))
        return self.post_feedforward_layernorm(out.float())


class SSTGemma3TextModel(StreamModel, Gemma3TextModel):
    config: SSTGemma3Config
    layer_class = SSTGemma3DecoderLayer
    _no_split_modules = ("SSTGemma3DecoderLayer",)

    def rotations(self, x, position_ids):
        return {kind: self.rotary_emb(x, position_ids, kind) for kind in set(self.config.layer_types)}


class SSTGemma3ForCausalLM(StreamForCausalLM, Gemma3ForCausalLM):
    config: SSTGemma3Config
    config_class = SSTGemma3Config
    model_class = SSTGemma3TextModel
