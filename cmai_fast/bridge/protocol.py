"""The protocol of all bridges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class ModelBridge(Protocol):
    """The three-part view of a model: E_v (`encode_image`), E_t (`encode_text`) and F (`fuse`).

    A batch is what the model's own forward takes. `inputs` splits it into the inputs of `encode_image` apart from
    `pixel_values`, and the keyword inputs of `encode_text`, `fuse` and `losses`. N is the number of samples.

    Attributes:
        model: the model itself; a bridge has no weights of its own and changes none.
        needs: the keys that a batch must have apart from `pixel_values`.
        image_keys, text_keys: the keys that the image side and the text side take of a batch.
        image_dim, text_dim: the widths of h_v and h_t.
        image_size: height and width of the model's images; None if they are not fixed.
        context: the maximum number of tokens of a sample; None: unknown.
    """

    model: Any
    needs: tuple[str, ...]
    image_keys: tuple[str, ...]
    text_keys: tuple[str, ...]
    image_dim: int
    text_dim: int
    image_size: int | None
    context: int | None

    @property
    def text_model(self) -> Any:
        """The language model without its head, or the text encoder."""

    @property
    def vision_side(self) -> list[nn.Module]:
        """The modules of E_v, such as the vision tower and the projector."""

    @property
    def vision_parameters(self) -> list[nn.Parameter]:
        """The parameters that E_v reads."""

    def inputs(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The inputs of `encode_image` in a batch, apart from `pixel_values`, and those of `fuse` and `encode_text`."""

    def select(
        self, inputs: Mapping[str, Tensor], rows: Tensor, images_per_row: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The part of these inputs that belongs to `rows` (n,) of the batch. `images_per_row` (N,); None: one each."""

    def own_texts(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The texts for comparing rows: tokens (N, L), and a mask of those that count."""

    def image_tokens(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The number of tokens of h_v of each row (N,), the rest being padding; None if all have the same number."""

    def images_per_row(self, pixel_values: Tensor, *args: Any, **image_inputs: Any) -> Tensor:
        """The number of images of each sample (N,)."""

    def encode_image(self, pixel_values: Tensor, *args: Any, **image_inputs: Any) -> Tensor:
        """E_v: normalised `pixel_values`, laid out as the model takes them, to h_v (N, T, image_dim)."""

    def encode_text(self, *args: Any, **text_inputs: Any) -> Tensor:
        """E_t: the text without the image to h_t (N, text_dim)."""

    def fuse(self, image_features: Tensor, *args: Any, **text_inputs: Any) -> tuple[Tensor, Tensor]:
        """F: h_v and the text to logits (N, L', V) and targets (N, L'), -100 where a row has no target."""

    def losses(self, image_features: Tensor, **text_inputs: Any) -> tuple[Tensor, Tensor]:
        """L_task (N,), differentiable, and whether the model is right (N,), from the result of `fuse`."""
