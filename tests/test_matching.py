"""Matching and features under LAVIS's other names: parity with its Blip2ITM, and what M adds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM
from test_stage1 import blip2_like

import lavis_xformer
from lavis_xformer.errors import UserError
from lavis_xformer.models.matching import XFormerITM
from lavis_xformer.models.stage1 import XFormer


@pytest.fixture
def make_itm(make_xformer: Any) -> Any:
    """A factory of matching models at toy size."""

    def make(fusion: str, **arguments: Any) -> XFormerITM:
        model = make_xformer(fusion, **arguments).eval()
        model.__class__ = XFormerITM
        return model

    return make


@pytest.mark.parametrize(("head", "shape"), [("itm", (4, 2)), ("itc", (4, 1))])
def test_without_fusion_both_heads_are_lavis_heads(
    head: str, shape: tuple[int, int], make_itm: Any, batch: dict[str, Any]
) -> None:
    ours = make_itm("none")
    theirs = blip2_like(ours).eval()
    theirs.__class__ = Blip2ITM
    mine = ours(batch, match_head=head)
    assert mine.shape == shape
    for row in range(4):  # LAVIS's doesn't pad
        one = {"image": batch["image"][row : row + 1], "text_input": batch["text_input"][row]}
        assert torch.allclose(mine[row : row + 1], theirs(one, match_head=head), atol=1e-5)
        assert torch.allclose(mine[row : row + 1], ours(one, match_head=head), atol=1e-5)


@pytest.mark.parametrize("head", ["itm", "itc"])
def test_both_heads_see_m(head: str, make_itm: Any, batch: dict[str, Any]) -> None:
    model = make_itm("dual", init="normal")
    before = model(batch, match_head=head)
    model.fusion.mae_in.weight.data.zero_()
    assert not torch.allclose(before, model(batch, match_head=head))


def test_an_unknown_head_is_named(make_itm: Any, batch: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="match_head: 'itk'; did you mean 'itm'"):
        make_itm("none")(batch, match_head="itk")
    with pytest.raises(TypeError, match="match_hed"):
        make_itm("none")(batch, match_hed="itc")


class Loader(list[dict[str, torch.Tensor]]):
    """Batches of images beside the texts to retrieve, as LAVIS's retrieval task has them."""

    dataset = SimpleNamespace(text=["a red star", "two blue cats", "a dog", "three"], image=["a", "b", "c"])


@torch.no_grad()
def test_retrieval_is_itc_reranked_by_itm() -> None:
    model: Any
    model, *_ = lavis_xformer.load_model_and_preprocess("xformer", "mini", is_eval=True)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.fusion.enrich_blocks[0].cross_attention.out.weight, std=0.1)
    images, texts = torch.randn(3, 3, 64, 64), Loader.dataset.text
    loader = Loader([{"image": images[:2]}, {"image": images[2:]}])
    to_text, to_image = model.compute_sim_matrix(loader, SimpleNamespace(k_test=2))
    assert (to_text.shape, to_image.shape) == ((3, 4), (4, 3))

    seen = model.extract_features({"image": images}, "image").image_embeds_proj  # (3, Q, E)
    read = model.extract_features({"text_input": texts}, "text").text_embeds_proj[:, 0]  # (4, E)
    itc = (seen @ read.T).amax(dim=1)  # (3, 4)
    _, tokens = model.forward_image(images)
    words = model.tokenize(texts)
    for row in range(3):
        every = tokens[row].expand(4, -1, -1)
        both = itc[row] + model.compute_itm(every, words.input_ids, words.attention_mask)
        best = itc[row].topk(2).indices.tolist()
        assert to_text[row, best] == pytest.approx(both[best].numpy(), abs=1e-4)
        assert sorted(set(range(4)) - set(best)) == [i for i in range(4) if to_text[row, i] == -100]
    with torch.autocast("cpu", torch.bfloat16):
        again = model.compute_sim_matrix(loader, SimpleNamespace(k_test=2))
        similarities = XFormerITM.forward(model, {"image": images, "text_input": texts[:3]}, match_head="itc")
    assert (again[0] == to_text).all()
    assert (again[1] == to_image).all()
    assert similarities.dtype == torch.float32, "else similar pairs tie"
    with pytest.raises(UserError, match=r"k_test is 0"):
        model.compute_sim_matrix(loader, SimpleNamespace(k_test=0))
    with pytest.raises(UserError, match=r"k_test is 4, but there are only 3"):
        model.compute_sim_matrix(loader, SimpleNamespace(k_test=4))


def test_lavis_knows_all_names() -> None:
    lavis_xformer.register()

    assert registry.get_model_class("xformer_feature_extractor") is XFormer
    assert registry.get_model_class("xformer_image_text_matching") is XFormerITM
    assert {"xformer", "xformer_opt", "xformer_t5"} <= set(registry.list_models())
