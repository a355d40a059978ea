"""The frozen MAE against transformers' own, and its loading from every format."""

from __future__ import annotations

import re
from argparse import Namespace
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis_xformer import losses
from lavis_xformer.errors import UserError
from lavis_xformer.models.mae import MaskedAutoencoder, random_mask
from lavis_xformer.models.meta_mae import meta_config
from lavis_xformer.models.towers import build_mae


@pytest.fixture
def mae(tiny_mae_model: Any) -> MaskedAutoencoder:
    """A frozen autoencoder over 16 patches; transformers' own attends in its own way."""
    return MaskedAutoencoder(model=deepcopy(tiny_mae_model))


def test_reconstruction_equals_transformers_for_the_same_noise(mae: MaskedAutoencoder, tiny_mae_model: Any) -> None:
    pixels, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    theirs = tiny_mae_model(pixels, noise=noise)
    seen = mae.encode(pixels, mask_ratio=0.5, noise=noise)
    prediction = mae.decode(seen.tokens, seen.ids_restore)
    ours = losses.reconstruction(prediction, mae.target(pixels), seen.mask)
    assert torch.equal(seen.mask, theirs.mask)
    assert torch.allclose(prediction, theirs.logits, atol=1e-6)
    assert torch.allclose(ours, theirs.loss, atol=1e-6)


def test_whole_image_keeps_the_order_of_the_patches(mae: MaskedAutoencoder, tiny_mae_model: Any) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    ordered = torch.arange(16.0).expand(2, -1)
    tiny_mae_model.config.mask_ratio, ratio = 0.0, tiny_mae_model.config.mask_ratio
    theirs = tiny_mae_model.vit(pixels, noise=ordered).last_hidden_state
    tiny_mae_model.config.mask_ratio = ratio
    features = mae.encode(pixels)
    assert torch.allclose(features.tokens, theirs, atol=1e-6)
    assert not features.mask.any()


def test_gradients_pass_the_decoder_as_in_transformers(mae: MaskedAutoencoder, tiny_mae_model: Any) -> None:
    """Though the attention is torch's kernel, in the place of transformers' own steps."""
    _, _, order = random_mask(torch.randn(3, 16, 1), mask_ratio=0.5)
    tokens, gradients = torch.randn(3, 9, 24), []
    for decode in (mae.decode, lambda *given: tiny_mae_model.decoder(*given).logits):
        leaf = tokens.clone().requires_grad_()
        decode(leaf, order).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_whole_image_is_deterministic(mae: MaskedAutoencoder) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(mae.encode(pixels).tokens, mae.encode(pixels).tokens)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75])
def test_mask_hides_its_share_and_can_be_undone(ratio: float) -> None:
    patches = torch.arange(2 * 16.0).view(2, 16, 1)
    visible, mask, ids_restore = random_mask(patches, mask_ratio=ratio)
    assert mask.sum(1).tolist() == [16 * ratio] * 2
    padded = torch.cat([visible, torch.full((2, 16 - visible.shape[1], 1), -1.0)], dim=1)
    restored = padded.gather(1, ids_restore[..., None])
    assert torch.equal(restored[..., 0], torch.where(mask.bool(), -1.0, patches[..., 0]))


def test_every_sample_has_its_own_mask() -> None:
    _, mask, _ = random_mask(torch.zeros(4, 64, 1), mask_ratio=0.5)
    assert len(mask.unique(dim=0)) == 4


def test_gradients_pass_through_the_decoder_to_its_input_only(mae: MaskedAutoencoder) -> None:
    seen = mae.encode(torch.randn(1, 3, 32, 32), mask_ratio=0.5)
    tokens = seen.tokens.clone().requires_grad_()
    mae.decode(tokens, seen.ids_restore).square().sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().sum() > 0
    assert all(p.grad is None for p in mae.parameters())


def meta_state(model: Any) -> dict[str, torch.Tensor]:
    """Write a ViTMAE in Meta's own naming: the inverse of the conversion, spelled out."""
    state: dict[str, torch.Tensor] = {}
    theirs = model.state_dict()
    for name, tensor in theirs.items():
        if ".attention.attention." in name:
            continue
        new = name.replace("vit.embeddings.patch_embeddings.projection", "patch_embed.proj")
        new = new.replace("vit.embeddings.cls_token", "cls_token")
        new = new.replace("vit.embeddings.position_embeddings", "pos_embed")
        new = new.replace("vit.layernorm", "norm").replace("vit.encoder.layer", "blocks")
        new = new.replace("decoder.decoder_layers", "decoder_blocks").replace("decoder.decoder_", "decoder_")
        new = new.replace("decoder.mask_token", "mask_token")
        new = new.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        new = new.replace("attention.output.dense", "attn.proj")
        new = new.replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")
        state[new] = tensor
    for name in theirs:
        if match := re.match(r"(.*)\.attention\.attention\.query\.(weight|bias)", name):
            stem, kind = match.groups()
            parts = [theirs[f"{stem}.attention.attention.{p}.{kind}"] for p in ("query", "key", "value")]
            block = stem.replace("vit.encoder.layer", "blocks").replace("decoder.decoder_layers", "decoder_blocks")
            state[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return state


@pytest.fixture(scope="module")
def meta_model() -> Any:
    """A ViTMAE of a shape that Meta's files can express: heads of 64, decoder heads of 32."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(2)
    return ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=32, patch_size=8, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, layer_norm_eps=1e-6, decoder_hidden_size=64, decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2, decoder_intermediate_size=32, mask_ratio=0.5,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("file", "normalised"), [("mae_pretrain_vit_x_full.pth", True), ("mae_visualize_vit_x.pth", False)]
)
def test_metas_files_give_transformers_model(file: str, normalised: bool, meta_model: Any, tmp_path: Path) -> None:
    from lavis_xformer.models.towers import build_mae

    torch.save({"model": meta_state(meta_model)}, tmp_path / file)
    mae = build_mae(str(tmp_path / file))
    assert mae.model.config.norm_pix_loss is normalised
    pixels, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    meta_model.config.norm_pix_loss = normalised
    theirs = meta_model(pixels, noise=noise)
    seen = mae.encode(pixels, mask_ratio=0.5, noise=noise)
    prediction = mae.decode(seen.tokens, seen.ids_restore)
    assert torch.allclose(prediction, theirs.logits, atol=1e-5)
    assert torch.allclose(losses.reconstruction(prediction, mae.target(pixels), seen.mask), theirs.loss, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "patch"), [(768, 12, 12, 16), (1024, 24, 16, 16), (1280, 32, 16, 14)]
)
def test_metas_models_have_their_published_sizes(width: int, depth: int, heads: int, patch: int) -> None:
    """Those of the hub's facebook/vit-mae-{base,large,huge}; the number of heads shows in no weight."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "pos_embed": (1, 1 + (224 // patch) ** 2, width),
        "blocks.0.mlp.fc1.weight": (4 * width, width),
        f"blocks.{depth - 1}.mlp.fc1.weight": (4 * width, width),
        "decoder_embed.weight": (512, width),
        "decoder_blocks.0.mlp.fc1.weight": (2048, 512),
        "decoder_blocks.7.mlp.fc1.weight": (2048, 512),
    }
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = meta_config(state, norm_pix_loss=True)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (width, depth, heads)
    assert (config.decoder_num_hidden_layers, config.decoder_num_attention_heads) == (8, 16)
    assert (config.image_size, config.patch_size, config.intermediate_size) == (224, patch, 4 * width)
    assert config.layer_norm_eps == 1e-6  # of Meta's code; transformers' default is another


@pytest.mark.parametrize(("width", "decoder"), [(96, 512), (768, 48), (24, 512)])
def test_files_that_are_none_of_metas_are_refused_since_they_name_no_heads(width: int, decoder: int) -> None:
    state = {
        "patch_embed.proj.weight": torch.zeros(width, 3, 16, 16),
        "decoder_embed.weight": torch.zeros(decoder, width),
        "pos_embed": torch.zeros(1, 197, width),
    }
    with pytest.raises(UserError, match=f"a MAE of width {width} and {decoder} is none of Meta's, .* hub's format"):
        meta_config(state, norm_pix_loss=True)


def test_metas_file_of_unknown_kind_asks_which(meta_model: Any, tmp_path: Path) -> None:
    from lavis_xformer.models.towers import build_mae

    options = Namespace(model="mae_vit_large_patch16", norm_pix_loss=True)  # as main_pretrain.py saves them
    torch.save({"model": meta_state(meta_model), "epoch": 799, "args": options}, tmp_path / "mine.pth")
    with pytest.raises(UserError, match="mae_norm_pix_loss"):
        build_mae(str(tmp_path / "mine.pth"))
    assert build_mae(str(tmp_path / "mine.pth"), norm_pix_loss=True).model.config.norm_pix_loss is True


def test_encoder_only_files_are_refused_with_the_file_to_use(meta_model: Any, tmp_path: Path) -> None:
    from lavis_xformer.models.towers import build_mae

    encoder = {k: v for k, v in meta_state(meta_model).items() if "decoder" not in k and k != "mask_token"}
    torch.save({"model": encoder}, tmp_path / "mae_pretrain_vit_huge.pth")
    with pytest.raises(UserError, match=r"encoder only.*mae_pretrain_vit_huge_full\.pth"):
        build_mae(str(tmp_path / "mae_pretrain_vit_huge.pth"))


def test_hub_folder_loads_and_without_decoder_is_refused(tiny_mae_model: Any, tmp_path: Path) -> None:
    from lavis_xformer.models.towers import build_mae

    tiny_mae_model.save_pretrained(tmp_path / "whole")
    mae = build_mae(str(tmp_path / "whole"))
    pixels = torch.randn(1, 3, 32, 32)
    own = MaskedAutoencoder(model=tiny_mae_model)
    assert torch.equal(mae.encode(pixels).tokens, own.encode(pixels).tokens)
    tiny_mae_model.vit.save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="encoder only"):
        build_mae(str(tmp_path / "encoder"))
    state = {name: weight for name, weight in tiny_mae_model.state_dict().items() if "layer.1.output" not in name}
    tiny_mae_model.save_pretrained(tmp_path / "torn", state_dict=state)
    with pytest.raises(UserError, match=r"torn' doesn't fit ViTMAEForPreTraining: \['vit\.encoder\.layer\.1\.output"):
        build_mae(str(tmp_path / "torn"))


def test_unreachable_hub_and_pickled_code_are_refused_by_name(tmp_path: Path) -> None:
    from lavis_xformer.models.towers import build_mae

    with pytest.raises(UserError, match=r"model\.mae_model: 'nobody/nothing' is not a local path"):
        build_mae("nobody/nothing")
    torch.save({"model": Path("code")}, tmp_path / "mae_pretrain_x_full.pth")
    with pytest.raises(UserError, match="pickled code are refused"):
        build_mae(str(tmp_path / "mae_pretrain_x_full.pth"))


@pytest.mark.parametrize(("ratio", "seen"), [(0.7, 4), (0.9, 1)])
def test_a_fraction_of_a_patch_is_hidden_as_in_mae(ratio: float, seen: int) -> None:
    visible, mask, _ = random_mask(torch.randn(2, 16, 3), mask_ratio=ratio)
    assert visible.shape[1] == seen
    assert (mask == 0).sum(dim=1).tolist() == [seen, seen]


def test_a_decoder_of_raw_pixels_is_taken_for_one_if_told(tiny_mae_model: Any) -> None:
    mae = MaskedAutoencoder(model=deepcopy(tiny_mae_model), norm_pix_loss=False)
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(mae.target(pixels), mae.model.patchify(pixels))


def test_a_file_may_be_said_to_predict_raw_pixels(meta_model: Any, tmp_path: Path) -> None:
    for name in ("mine.pth", "mine_full.pth"):
        torch.save({"model": meta_state(meta_model)}, tmp_path / name)
        assert build_mae(str(tmp_path / name), norm_pix_loss=False).model.config.norm_pix_loss is False
