"""Sharded decoders: configuration, shards, the decoder and its generate step."""

from fastshard.models.config import ModelConfig
from fastshard.models.model import ShardedGeneralModel
from fastshard.models.shard import Shard

__all__ = ["ModelConfig", "Shard", "ShardedGeneralModel"]
