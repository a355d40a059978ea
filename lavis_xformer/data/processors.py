"""Image processors that show one crop to two encoders, each in its own normalisation and size.

Used like any LAVIS processor, by name in a YAML::

    vis_processor:
      train: {name: xformer_image_train, image_size: 224, mae_image_size: 224, hflip: false}
      eval: {name: xformer_image_eval, image_size: 224}

Both return one packed tensor (6, S, S), see :func:`lavis_xformer.images.pack`, which LAVIS's
collaters stack.
S: max(Sc, Sm); Sc / Sm: side that CLIP / MAE wants, in pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as tv
from torchvision.transforms.functional import InterpolationMode

from lavis_xformer.data.photos import to_rgb
from lavis_xformer.errors import UserError, one_of, switch, whole
from lavis_xformer.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, pack

_CROP_RATIO = (3 / 4, 4 / 3)  # torchvision's own default


class _TwoViewProcessor(BaseProcessor):
    """What training and evaluation share: the two normalisations and the packing."""

    keys: tuple[str, ...] = ("image_size", "mae_image_size", "mean", "std", "mae_mean", "mae_std")

    def __init__(
        self,
        *,
        image_size: int = 224,
        mae_image_size: int | None = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        mae_mean: Sequence[float] = IMAGENET_MEAN,
        mae_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        """Prepare the two views.

        Args:
            image_size: Sc, the side of CLIP's view in pixels.
            mae_image_size: Sm, the side of MAE's view; Sc where it is None.
            mean: CLIP's mean per channel, of pixels in [0, 1].
            std: CLIP's standard deviation per channel.
            mae_mean: MAE's mean per channel.
            mae_std: MAE's standard deviation per channel.
        """
        super().__init__()
        del self.transform  # LAVIS's default is a lambda, which can't be pickled for spawned loader workers
        self.clip_size = whole("image processor: image_size", image_size, least=1)
        mae_size = image_size if mae_image_size is None else mae_image_size
        self.mae_size = whole("image processor: mae_image_size", mae_size, least=1)
        self.clip_normalize = transforms.Normalize(mean, std)
        self.mae_normalize = transforms.Normalize(mae_mean, mae_std)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> _TwoViewProcessor:
        """Build the processor from its YAML node; None and null mean the defaults."""
        given = {str(key): value for key, value in (cfg or {}).items() if key != "name"}
        for key in given:
            one_of("image processor", key, cls.keys)
        return cls(**{key: value for key, value in given.items() if value is not None})

    def __call__(self, item: Image.Image) -> Tensor:
        """Turn a PIL image into the packed views.

        Args:
            item: an image of any mode and size.

        Returns:
            (6, S, S) float: CLIP's view in channels 0-2, MAE's in 3-5.

        Raises:
            UserError: not an image, or one without pixels.
        """
        view = self.choose_view(to_rgb(item))
        clip = tv.to_tensor(view(self.clip_size))  # (3, Sc, Sc) in [0, 1]
        mae = clip if self.mae_size == self.clip_size else tv.to_tensor(view(self.mae_size))
        return pack(self.clip_normalize(clip), self.mae_normalize(mae))

    @abstractmethod
    def choose_view(self, image: Image.Image) -> Callable[[int], Image.Image]:
        """Make all random choices once; return a function that renders the chosen view at a given side."""


@registry.register_processor("xformer_image_eval")
class XFormerImageEvalProcessor(_TwoViewProcessor):
    """The whole image resized to a square; channels 0-2 equal LAVIS's ``blip_image_eval``."""

    def choose_view(self, image: Image.Image) -> Callable[[int], Image.Image]:
        """The whole image, at any side."""
        return lambda side: tv.resize(image, [side, side], InterpolationMode.BICUBIC)


@registry.register_processor("xformer_image_train")
class XFormerImageTrainProcessor(_TwoViewProcessor):
    """One random resized crop and flip for both views, like LAVIS's ``blip2_image_train``.

    Draws from torch's global generator in torchvision's order: with the same seed, channels 0-2
    equal LAVIS's.
    """

    keys = (*_TwoViewProcessor.keys, "min_scale", "max_scale", "hflip")

    def __init__(self, *, min_scale: float = 0.5, max_scale: float = 1.0, hflip: bool = True, **views: Any) -> None:
        """Prepare crop and flip.

        Args:
            min_scale: smallest area of the crop, as a share of the image's.
            max_scale: largest area of the crop.
            hflip: mirror half of the images. Set it to false if captions mention left and right, as
                those of the synthetic scenes do: a mirrored image would contradict its caption.
            views: the arguments of :class:`XFormerImageEvalProcessor`.

        Raises:
            UserError: not 0 < min_scale <= max_scale <= 1, or ``hflip`` is neither True nor False.
        """
        super().__init__(**views)
        switch("image processor: hflip", hflip)
        if not 0 < min_scale <= max_scale <= 1:
            raise UserError(
                f"image processor: min_scale {min_scale} and max_scale {max_scale} must satisfy "
                "0 < min_scale <= max_scale <= 1"
            )
        self.scale = [min_scale, max_scale]
        self.hflip = hflip

    def choose_view(self, image: Image.Image) -> Callable[[int], Image.Image]:
        """A random crop, mirrored or not."""
        box = transforms.RandomResizedCrop.get_params(image, self.scale, list(_CROP_RATIO))
        mirrored = self.hflip and bool(torch.rand(1) < 0.5)

        def view(side: int) -> Image.Image:
            """The chosen view at a side."""
            crop = tv.resized_crop(image, *box, [side, side], InterpolationMode.BICUBIC)
            return tv.hflip(crop) if mirrored else crop

        return view
