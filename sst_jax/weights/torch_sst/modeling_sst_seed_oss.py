"""Seed-OSS with a state stream."""

from transformers import SeedOssConfig
from transformers.models.seed_oss.modeling_seed_oss import SeedOssDecoderLayer, SeedOssForCausalLM, SeedOssModel

from .configuration_sst import SSTConfigMixin
from .modeling_sst import StreamForCausalLM, StreamLayerMixin, StreamModel


class SSTSeedOssConfig(SSTConfigMixin, SeedOssConfig):
    model_type = "sst_seed_oss"
    sst: dict | None = None


class SSTSeedOssDecoderLayer(StreamLayerMixin, SeedOssDecoderLayer):
    pass


class SSTSeedOssModel(StreamModel, SeedOssModel):
    config: SSTSeedOssConfig
    layer_class = SSTSeedOssDecoderLayer
    _no_split_modules = ("SSTSeedOssDecoderLayer",)


class SSTSeedOssForCausalLM(StreamForCausalLM, SeedOssForCausalLM):
    config: SSTSeedOssConfig
    config_class = SSTSeedOssConfig
    model_class = SSTSeedOssModel
