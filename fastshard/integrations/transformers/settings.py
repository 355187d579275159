"""What accelerating changes in a model besides its modules: settings, and how it is saved."""

from contextlib import contextmanager

from transformers import PreTrainedModel

from fastshard.integrations.transformers.attention import NAME
from fastshard.integrations.transformers.step import StepForward
from fastshard.integrations.transformers.step_rules import may_step
from fastshard.nn.linear import PackedLinears

_ATTRIBUTE = "_fastshard_settings"


class Settings:
    """A model's settings before it was accelerated."""

    def __init__(self, model: PreTrainedModel):
        self._attn_implementation = model.config._attn_implementation
        self._trained = [name for name, p in model.named_parameters() if p.requires_grad]
        config = getattr(model, "generation_config", None)
        self._disable_compile = None if config is None else config.disable_compile

    def change(self, model: PreTrainedModel) -> None:
        """Set what an accelerated model needs, and remember these in it."""
        model.set_attn_implementation(NAME)
        model.requires_grad_(False)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.disable_compile = True
        model.__dict__[_ATTRIBUTE] = self
        model.__dict__["save_pretrained"] = _Saving(model, self)
        if may_step(model):
            model.__dict__["forward"] = StepForward(model)

    @staticmethod
    def restore(model: PreTrainedModel) -> None:
        """Set everything as it was before ``change``."""
        before = model.__dict__.pop(_ATTRIBUTE)
        for name in ("save_pretrained", "forward"):
            model.__dict__.pop(name, None)
        model.set_attn_implementation(before._attn_implementation)
        for name in before._trained:
            model.get_parameter(name).requires_grad_(True)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.disable_compile = before._disable_compile

    @contextmanager
    def compiling(self, model: PreTrainedModel):
        """Let ``generate`` compile as before, while the context lasts."""
        config = getattr(model, "generation_config", None)
        if config is None:
            yield
            return
        present, config.disable_compile = config.disable_compile, self._disable_compile
        try:
            yield
        finally:
            config.disable_compile = present


class _Saving:
    """Stands in for ``save_pretrained``; writes what that would write of the plain model.

    transformers takes weights whose rows alternate in memory for one tied tensor, and refuses them.
    """

    def __init__(self, model: PreTrainedModel, before: Settings):
        self._model = model
        self._before = before

    def __call__(self, save_directory, *args, **kwargs) -> None:
        """As ``PreTrainedModel.save_pretrained``."""
        model = self._model
        if not args and kwargs.get("state_dict") is None:
            kwargs["state_dict"] = _state_dict(model)
        with self._before.compiling(model):
            type(model).save_pretrained(model, save_directory, *args, **kwargs)


def _state_dict(model: PreTrainedModel) -> dict:
    """The model's state dict, alternating rows copied to the host, where they are written from."""
    state = model.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, PackedLinears):
            for child in module._packed_rows:
                name = f"{path}.{child}.weight"
                state[name] = state[name].cpu().contiguous()
    return state
