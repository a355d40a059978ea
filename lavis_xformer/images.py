"""One image for two encoders: normalisation, packing, unpacking.

CLIP and MAE normalise pixels differently and may want different sizes, but must see the same crop and
flip. A packed image is one tensor, so every LAVIS collater can stack it and every LAVIS model that only asks
for its device and batch size can handle it.

:class:`OtherImages` picks another image for each of a batch (``shuffle_mae``).

B: batch, S: side of the packed image, Sc / Sm: side that CLIP / MAE wants, in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_xformer.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def pack(clip: Tensor, mae: Tensor) -> Tensor:
    """Stack the CLIP view and the MAE view of one crop into six channels.

    Args:
        clip: (3, Sc, Sc), normalised for CLIP.
        mae: (3, Sm, Sm), normalised for MAE.

    Returns:
        (6, S, S) with S = max(Sc, Sm); each view lies in the top-left corner of its channels, zeros elsewhere.
    """
    side = max(clip.shape[-1], mae.shape[-1])
    views = [F.pad(v, (0, side - v.shape[-1], 0, side - v.shape[-2])) for v in (clip, mae)]
    return torch.cat(views)  # (6, S, S)


def unpack(image: Tensor, *, clip_size: int, mae_size: int) -> tuple[Tensor, Tensor]:
    """Split a batch into what CLIP and what MAE sees.

    Args:
        image: (B, 6, S, S) from :func:`pack`, or (B, 3, Sc, Sc) normalised for CLIP by any LAVIS processor.
        clip_size: Sc, the side that CLIP wants.
        mae_size: Sm, the side that MAE wants.

    Returns:
        CLIP's view (B, 3, Sc, Sc) and MAE's view (B, 3, Sm, Sm), each in its own normalisation.

    Raises:
        UserError: the image has neither 3 nor 6 channels, is empty, does not have the model's size, or holds a larger
            view than CLIP or MAE wants (a smaller one is not noticed).
    """
    if image.ndim != 4 or image.shape[1] not in (3, 6):
        raise UserError(
            f"image has shape {tuple(image.shape)}; expected (B, 3, {clip_size}, {clip_size}) from a LAVIS "
            "processor or (B, 6, S, S) from xformer_image_train / xformer_image_eval"
        )
    packed = image.shape[1] == 6
    side = max(clip_size, mae_size) if packed else clip_size
    if image.shape[0] == 0 or image.shape[-2:] != (side, side):
        raise UserError(
            f"image has shape {tuple(image.shape)}; this model wants at least one image of {side} x {side} "
            "pixels: set image_size of the vis_processor, and its mae_image_size, to the model's"
        )
    if packed:
        views = ((clip_size, image[:, :3]), (mae_size, image[:, 3:]))
        if any(size < side and view[..., size, size].any() for size, view in views):  # where pack leaves zeros
            raise UserError(
                f"the image packs a larger view than this model wants: set image_size of the vis_processor to "
                f"{clip_size} pixels (CLIP's) and mae_image_size to {mae_size} (MAE's)"
            )
        return image[:, :3, :clip_size, :clip_size], image[:, 3:, :mae_size, :mae_size]
    return image, resize(clip_to_mae(image), mae_size)


def clip_to_mae(image: Tensor) -> Tensor:
    """Change CLIP's normalisation (B, 3, H, W) into MAE's (ImageNet's), exactly."""
    clip_mean, clip_std, mae_mean, mae_std = (
        image.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD)
    )
    return (image * clip_std + clip_mean - mae_mean) / mae_std


def resize(image: Tensor, side: int) -> Tensor:
    """Resize (B, 3, H, W) to (B, 3, side, side), bicubic with antialiasing; the identity if it fits already."""
    if image.shape[-2:] == (side, side):
        return image
    return F.interpolate(image, (side, side), mode="bicubic", antialias=True)


class OtherImages:
    """Picks a different image for each: from the batch or, if its images are all equal, the latest before it."""

    def __init__(self) -> None:
        self.latest: tuple[Tensor, ...] = ()  #: up to two different images, (1, ...)

    def of(self, images: Tensor) -> Tensor:
        """Images -> as many others, both (B, ...).

        An image's other is half a batch away if possible, since questions about the same image are adjacent.

        Raises:
            UserError: all images, with those before, are equal.
        """
        last = images[-1:].clone()
        if any(not torch.equal(image, last[0]) for image in images):
            others = images[[_different_row(images, row) for row in range(len(images))]]
            self.latest = (others[-1:], last)
            return others
        different = [image for image in self.latest if not torch.equal(image.to(last), last)][-1:]
        self.latest = (*different, last)
        if not different:
            raise UserError("model.shuffle_mae needs two different images, in this batch or earlier ones; found one")
        return different[0].to(last).expand_as(images)


def _different_row(images: Tensor, row: int) -> int:
    """The row of an image other than that of ``row``, tried from half a batch away on."""
    count = len(images)
    turned = ((row - count // 2 - turn) % count for turn in range(count))
    return next(other for other in turned if not torch.equal(images[other], images[row]))
