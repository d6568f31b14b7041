"""Training without the dropout, so that what else differs from evaluation can be seen."""

from typing import Any

from torch.overrides import TorchFunctionMode

DROPOUTS = (
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout", "dropout_",
    "alpha_dropout_", "feature_alpha_dropout_", "feature_dropout_",
)  # fmt: skip
# Place of dropout_p among the arguments; what these call inside is not seen once more.
DROPOUT_P = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}


class without_dropout(TorchFunctionMode):
    """Every function of PyTorch that drops numbers hands them on, wherever it is called from."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called by PyTorch in place of every function of its own."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name in DROPOUT_P:
            args = tuple(0.0 if at == DROPOUT_P[name] else value for at, value in enumerate(args))
            kwargs = {key: 0.0 if key == "dropout_p" else value for key, value in kwargs.items()}
        return func(*args, **kwargs)
