"""Sharded decoders: configuration, shards, the decoder and its generate step."""

from fastshard.models.config import ModelConfig
from fastshard.models.decoder import GeneralMHA, ShardTransformerDecoder
from fastshard.models.footprint import ModelBytes, model_bytes
from fastshard.models.model import ShardedGeneralModel
from fastshard.models.part import WHOLE, TensorPart, divided
from fastshard.models.shard import Shard

__all__ = [
    "WHOLE",
    "GeneralMHA",
    "ModelBytes",
    "ModelConfig",
    "Shard",
    "ShardTransformerDecoder",
    "ShardedGeneralModel",
    "TensorPart",
    "divided",
    "model_bytes",
]
