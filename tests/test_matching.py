"""Matching and features under LAVIS's other names: parity with its Blip2ITM, and what M adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM
from test_stage1 import blip2_like

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
    with pytest.raises(UserError, match="no head 'itk'; did you mean 'itm'"):
        make_itm("none")(batch, match_head="itk")


def test_lavis_knows_all_names() -> None:
    import lavis_xformer.models.registry  # noqa: F401

    assert registry.get_model_class("xformer_feature_extractor") is XFormer
    assert registry.get_model_class("xformer_image_text_matching") is XFormerITM
    assert {"xformer", "xformer_opt", "xformer_t5"} <= set(registry.list_models())
