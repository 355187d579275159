"""``fastshard.load``: a checkpoint's shard on a device, ready to generate."""

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import torch

from fastshard.checkpoint import (
    Checkpoint,
    GenerationDefaults,
    TextTokenizer,
    load_weights,
)
from fastshard.devices import (
    available_bytes,
    check_device,
    check_dtype,
    default_device,
    default_dtype,
)
from fastshard.dist import TensorParallel, check_cover, check_fit
from fastshard.generate import ShardChain, TextGenerator
from fastshard.models import GeneralMHA, Shard, ShardedGeneralModel

Report = Callable[[int, int], None]
"""Called while weights are copied, with elements done and elements in all."""


class TextModel(ShardedGeneralModel, TextGenerator):
    """A ``ShardedGeneralModel`` with its checkpoint's tokenizer: of all layers, it streams text."""

    tokenizer: TextTokenizer | None = None
    generation_defaults: GenerationDefaults = GenerationDefaults()

    def _check_whole(self, caller: str) -> None:
        if self.shard.get_layer_count() != self.config.num_layers:
            raise ValueError(
                f"{caller} needs all {self.config.num_layers} layers, this shard holds layers "
                f"{self.shard.start_layer}-{self.shard.end_layer}: put all shards into a ShardChain"
            )


def load(
    source: str | Path | None = None,
    *,
    shard: Shard | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    use_cache: bool = True,
    max_generated_tokens: int = 1024,
    tensor_parallel: TensorParallel | None = None,
) -> TextModel:
    """Load a checkpoint, or only the layers of one shard of it.

    Args:
        source: Hugging Face directory or hub id ``owner/name``; None is the embedded demo model.
        shard: Layers to load; no byte of the others is read. None: all.
        device: None: the GPU where there is one and this build has kernels, else the CPU.
        dtype: Of weights and activations. None: float32 on a CPU; on a GPU the checkpoint's own
            16-bit type, bfloat16 for float32 checkpoints.
        use_cache: Whether ``generate`` keeps keys and values between calls; ``stream`` needs it.
        max_generated_tokens: Room that the cache leaves behind a prompt.
        tensor_parallel: The ranks that share each layer: only this one's part is loaded, and all of
            them then call the model together. None: this process alone.

    Raises:
        FileNotFoundError: there is no such source.
        CheckpointError: (a ``ValueError``) its files are missing or wrong; says file and tensor.
        ValueError: the shard is not of this model, or its layers cannot be shared so.
        TypeError: the dtype is none that the device runs: a GPU runs float16 and bfloat16.
        RuntimeError: the device is not there, or the shard does not fit on it.
    """
    checkpoint = Checkpoint(demo_model() if source is None else source)
    shard = shard or whole(checkpoint)
    models = _load(
        checkpoint,
        [shard],
        device,
        dtype,
        use_cache,
        max_generated_tokens,
        tensor_parallel=tensor_parallel,
    )
    return models[0]


def load_chain(
    checkpoint: Checkpoint,
    layers: Sequence[range],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    max_generated_tokens: int = 1024,
    report: Report | None = None,
) -> ShardChain:
    """Load all layers as several shards on one device.

    Args:
        layers: Half-open ranges of layers, one a shard, in order.

    Raises:
        ValueError: they leave a layer out or hold one twice. Else as ``load``.
    """
    n_layers = checkpoint.config.num_layers
    check_cover(layers, n_layers)
    shards = [Shard(checkpoint.name, part.start, part.stop - 1, n_layers) for part in layers]
    return ShardChain(_load(checkpoint, shards, device, dtype, True, max_generated_tokens, report))


def load_shard(
    checkpoint: Checkpoint,
    shard: Shard,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    max_generated_tokens: int = 1024,
    tensor_parallel: TensorParallel | None = None,
    report: Report | None = None,
) -> TextModel:
    """Load one shard's layers, or a rank's part of them; no other byte is read. As ``load``."""
    return _load(
        checkpoint,
        [shard],
        device,
        dtype,
        True,
        max_generated_tokens,
        report,
        tensor_parallel,
    )[0]


def demo_model() -> Path:
    """Directory of the embedded model."""
    return Path(str(files("fastshard") / "demo"))


def whole(checkpoint: Checkpoint) -> Shard:
    """The shard that holds all layers."""
    n_layers = checkpoint.config.num_layers
    return Shard(checkpoint.name, 0, n_layers - 1, n_layers)


def _load(
    checkpoint: Checkpoint,
    shards: Sequence[Shard],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    use_cache: bool,
    max_generated_tokens: int,
    report: Report | None = None,
    tensor_parallel: TensorParallel | None = None,
) -> list[TextModel]:
    """All shards on one device; the weights are checked and fit before any memory is taken."""
    config = checkpoint.config
    for shard in shards:
        if shard.n_layers != config.num_layers:
            raise ValueError(
                f"shard must be of {checkpoint.name}'s {config.num_layers} layers, "
                f"got n_layers={shard.n_layers}"
            )
    device = default_device() if device is None else torch.device(device)
    check_device(device)
    dtype = dtype or default_dtype(checkpoint.raw_config, device)
    check_dtype(dtype, device)
    build, tp = GeneralMHA, 1
    if tensor_parallel is not None:
        build, tp = tensor_parallel.build, tensor_parallel.size
    check_fit(config, shards, device, dtype, max_generated_tokens, available_bytes(device), tp)

    models = [
        TextModel(config, shard, "meta", dtype, use_cache, max_generated_tokens, build=build)
        for shard in shards
    ]
    total = sum(t.numel() for model in models for t in model.model.state_dict().values())
    done = 0

    def count(num_elements: int) -> None:
        nonlocal done
        done += num_elements
        if report:
            report(done, total)

    for model in models:
        model.to_empty(device=device)
        targets, parts = model.model.state_dict(), model.model.parts
        load_weights(targets, checkpoint.weights, config, model.shard, count, parts=parts)
        model.requires_grad_(False).eval()
        model.tokenizer = checkpoint.tokenizer
        model.generation_defaults = checkpoint.generation_defaults
    return models
