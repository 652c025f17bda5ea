"""Gemma 4 with a state stream."""

from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4ForCausalLM,
    Gemma4TextDecoderLayer,
    Gemma4TextModel,
    Gemma4TextModelOutputWithPast,
)

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTGemma4Config(SSTConfigMixin, Gemma4TextConfig):
    model_type = "sst_gemma4_text"
    sst: dict | None = None


class SSTGemma4DecoderLayer(StreamLayerMixin, Gemma4TextDecoderLayer):
    @property
    def output_scale(self):
        return self.layer_scalar.float()

    def attention_arguments(self, steps):
        return {"shared_kv_states": {}}  # which no layer of a dense model reads

    def rejoin(self, x, out):
        return x.float() + self.post_attention_layernorm(out.float())

    def feed_forward(self, mixed, dtype):
        out = self.mlp(self.pre_feedforward_layernorm(mixed).to(dtype))
        return self.post_feedforward_layernorm(out.float())


class SSTGemma4TextModel(StreamModel, Gemma4TextModel):
    config: SSTGemma4Config
    layer_class = SSTGemma4DecoderLayer
    _no_split_modules = ("SSTGemma4DecoderLayer",)

    def forward(self, *args, **kwargs):
        return Gemma4TextModelOutputWithPast(**super().forward(*args, **kwargs))

    def rotations(self, x, position_ids):
        return {kind: self.rotary_emb(x, position_ids, kind) for kind in set(self.config.layer_types)}


class SSTGemma4ForCausalLM(StreamForCausalLM, Gemma4ForCausalLM):
    config: SSTGemma4Config
    config_class = SSTGemma4Config
    model_class = SSTGemma4TextModel
