"""Gemma 4 12B with a state stream."""

from transformers import Gemma4UnifiedTextConfig
from transformers.models.gemma4_unified.modeling_gemma4_unified import (
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedTextDecoderLayer,
    Gemma4UnifiedTextModel,
    Gemma4UnifiedTextModelOutputWithPast,
)

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTGemma4UnifiedConfig(SSTConfigMixin, Gemma4UnifiedTextConfig):
    model_type = "sst_gemma4_unified_text"
    sst: dict | None = None


class SSTGemma4UnifiedDecoderLayer(StreamLayerMixin, Gemma4UnifiedTextDecoderLayer):
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


class SSTGemma4UnifiedTextModel(StreamModel, Gemma4UnifiedTextModel):
    config: SSTGemma4UnifiedConfig
    layer_class = SSTGemma4UnifiedDecoderLayer
    _no_split_modules = ("SSTGemma4UnifiedDecoderLayer",)

    def forward(self, *args, **kwargs):
        return Gemma4UnifiedTextModelOutputWithPast(**super().forward(*args, **kwargs))

    def rotations(self, x, position_ids):
        return {kind: self.rotary_emb(x, position_ids, kind) for kind in set(self.config.layer_types)}


class SSTGemma4UnifiedForCausalLM(StreamForCausalLM, Gemma4UnifiedForCausalLM):
    config: SSTGemma4UnifiedConfig
    config_class = SSTGemma4UnifiedConfig
    model_class = SSTGemma4UnifiedTextModel
