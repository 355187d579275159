"""CapturedStep: decode steps of torchtune's ``generate`` as one CUDA graph."""

import torch
from torch import Tensor
from torchtune import modules
from torchtune.generation import sample

from fastshard.decode.static import capture, is_gpu
from fastshard.integrations.torchtune.attention import Attention


class CapturedStep:
    """Goes to torchtune's ``generate`` as its ``custom_generate_next_token``.

    Of an accelerated model on a GPU, with caches, the first step of a token runs as it is, the
    second is captured, and from then on the graph is replayed: the host launches once a step. It is
    captured again where weights or caches are elsewhere in memory, or shapes differ. Any other step
    runs as it is. One object serves one prompt after the other.
    """

    def __init__(self):
        self._model: modules.TransformerDecoder | None = None  # whose addresses the key has
        self._parameters: list[dict] = []  # of its modules
        self._key: tuple | None = None
        self._replay = None

    @torch.no_grad()
    def __call__(
        self,
        model: modules.TransformerDecoder,
        input_pos: Tensor,
        x: Tensor,
        q: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As torchtune's ``generate_next_token``.

        Args:
            model: Accelerated or not.
            input_pos: ``[b, s]``, ``[s]`` or ``[b]`` positions.
            x: ``[b, s]`` tokens.
            q: ``[b, vocab_size]``, what torchtune's ``sample`` draws by.
            mask: ``[b | 1, s, S]``.
            temperature: Divides the logits.
            top_k: Only so many tokens are drawn from.

        Returns:
            Tokens, ``[b, 1]`` int32, and logits, ``[b, 1, vocab_size]`` float32.
        """
        logits = self.logits(model, tokens=x, mask=mask, input_pos=input_pos)[:, -1]
        tokens = sample(logits.clone(), temperature=temperature, top_k=top_k, q=q)
        return tokens, logits.unsqueeze(1)

    def logits(self, model: modules.TransformerDecoder, **inputs: Tensor | None) -> Tensor:
        """``model(tokens=, mask=, input_pos=)``, by a replay where it can be."""
        if model is not self._model:
            self._parameters = [module._parameters for module in model.modules()]
        key = _key(model, self._parameters, inputs)
        if key is None or key != self._key:
            self._model, self._key, self._replay = model, key, None
            return model(**inputs)
        if self._replay is None:
            self._capture(model, inputs)
        else:
            for layer in model.layers:
                layer.attn.kv_cache.follow(*inputs["tokens"].shape)
        for name, value in inputs.items():
            self._inputs[name].copy_(value)
        self._replay()
        return self._out.clone()

    def _capture(self, model: modules.TransformerDecoder, inputs: dict[str, Tensor]) -> None:
        """Record the step, which counts on the host alone, as ``follow`` does."""
        caches = [layer.attn.kv_cache for layer in model.layers]
        for cache in caches:
            cache.next_slots(*inputs["tokens"].shape)  # what it reads of the device, it reads here
        self._inputs = {name: value.clone() for name, value in inputs.items()}

        def launch() -> None:
            self._out = model(**self._inputs)

        try:
            self._replay = capture(launch, inputs["tokens"].device)
        except Exception:
            for cache in caches:
                cache.recount()
            raise


def _key(
    model: modules.TransformerDecoder, parameters: list[dict], inputs: dict[str, Tensor]
) -> tuple | None:
    """Shapes, and where weights and caches are; None where the step cannot be captured."""
    tokens = inputs["tokens"]
    if not is_gpu(tokens.device) or tokens.shape[1] != 1 or any(v is None for v in inputs.values()):
        return None
    addresses = [p.data_ptr() for own in parameters for p in own.values() if p is not None]
    for layer in model.layers:
        attn = layer.attn
        if type(attn) is not Attention or attn.kv_cache is None or not attn.cache_enabled:
            return None
        cache = attn.kv_cache
        held = (attn.packed_weight, cache.k_cache, cache.v_cache, cache.cache_pos)
        addresses += [tensor.data_ptr() for tensor in held]
    kinds = ((value.shape, value.stride(), value.dtype) for value in inputs.values())
    return id(model), *kinds, *addresses
