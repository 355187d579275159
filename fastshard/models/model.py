"""ShardedGeneralModel: one shard on one device, with exo's generate step."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastshard.models.config import ModelConfig
from fastshard.models.shard import Shard


class ShardedGeneralModel(nn.Module):
    """The layers of ``shard`` on one device, and one step of generation through them.

    Attributes:
        config: ``ModelConfig``.
        shard: ``Shard``.
        model: The decoder (``ShardTransformerDecoder``). ``model.state_dict()`` has torchtune's
            names with global layer indices: ``layers.{i}.attn.{q,k,v,output}_proj.weight`` (and
            ``.bias``), ``layers.{i}.attn.{q,k}_norm.scale``, ``layers.{i}.mlp.w1/w2/w3.weight``,
            ``layers.{i}.sa_norm.scale``, ``layers.{i}.mlp_norm.scale``; ``tok_embeddings.weight``
            on the first shard, and on the last where the head is tied to it; ``norm.scale`` on
            the last; ``output.weight`` on the last where the head is not tied.
        dtype: Of the weights and of the hidden state.
        device: Where the weights are.
        use_cache: Whether ``generate`` keeps keys and values between calls.
        max_generated_tokens: Room that the cache leaves behind a prompt.
    """

    def __init__(
        self,
        config: ModelConfig | Mapping,
        shard: Shard,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float16,
        use_cache: bool = False,
        max_generated_tokens: int = 1024,
    ):
        """Build with random weights; ``device="meta"`` allocates nothing (then ``to_empty``)."""
        super().__init__()
        raise NotImplementedError

    def generate(
        self,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        hidden_state: Tensor | None = None,
        curr_pos: int = 0,
        *,
        first_key: Tensor | None = None,
        num_logits: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run the shard's layers over the next tokens.

        Args:
            tokens: ``[b, s]`` int64, on a first shard only. With a cache, those not yet cached.
            mask: ``[1 | b, T, S]``, the whole one or its rows; bool (True = attend) or float
                (additive). None: causal.
            input_pos: ``[1 | b, T]`` positions for RoPE, whole or of these tokens. None: counted.
            hidden_state: ``[b, s, hidden_size]`` in the model's dtype, on other shards only.
            curr_pos: Index of the first of these tokens (with a cache) or of the last (without);
                0 starts a new prompt.
            first_key: ``[b]`` first key of each row that is no left padding.
            num_logits: Logits of this many last positions only.

        Returns:
            ``(hidden, None)`` after the shard's last layer, ``[b, s, hidden_size]`` in the model's
            dtype; of the last shard ``(None, logits)``, ``[b, s, vocab_size]`` float32.
        """
        raise NotImplementedError
