"""Losses against naive references, value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lavis_xformer import losses


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Six images of three queries, six texts."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(6, 3, 5, generator=generator), dim=-1).requires_grad_()
    text = F.normalize(torch.randn(6, 5, generator=generator), dim=-1).requires_grad_()
    return image, text


def test_similarity_takes_the_best_query(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    image, text = features
    sim = losses.similarity(image, text).tolist()
    for i in range(6):
        for j in range(6):
            assert sim[i][j] == pytest.approx(max((image[i, q] @ text[j]).item() for q in range(3)), abs=1e-6)


def test_similarity_ignores_the_order_of_the_queries(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    image, text = features
    assert torch.allclose(losses.similarity(image, text), losses.similarity(image.flip(1), text))


def test_similarity_keeps_its_precision_under_autocast(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    image, text = features
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses.similarity(image, text)
        low = losses.similarity(image.bfloat16(), text.bfloat16())
    assert torch.equal(mixed, losses.similarity(image, text))
    assert low.dtype == torch.float32
    assert torch.allclose(low, losses.similarity(image.bfloat16().float(), text.bfloat16().float()), atol=1e-6)


def test_itc_equals_a_naive_loop_in_value_and_gradient(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    image, text = features
    sim = losses.similarity(image, text) / 0.07
    value = losses.itc(sim, sim.t(), torch.arange(6))
    gradient = torch.autograd.grad(value, image, retain_graph=True)[0]

    def direction(scores: torch.Tensor) -> torch.Tensor:
        total = scores.new_zeros(())
        for row in range(6):
            log_p = scores[row] - torch.logsumexp(scores[row], 0)
            total = total - (0.9 * log_p[row] + 0.1 * log_p.mean())
        return total / 6

    naive = (direction(sim) + direction(sim.t())) / 2
    assert value.item() == pytest.approx(naive.item(), abs=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(naive, image)[0], atol=1e-5)


def test_hard_negatives_never_draw_the_partner_and_prefer_the_similar() -> None:
    generator = torch.Generator().manual_seed(0)
    sim = torch.zeros(4, 8)
    sim[:, 7] = 5.0
    targets = torch.tensor([4, 5, 6, 7])
    draws = torch.stack([losses.hard_negatives(sim, targets, generator) for _ in range(300)])  # (500, 4)
    assert not (draws == targets).any()
    assert (draws[:, :3] == 7).float().mean() > 0.9
    assert set(draws[:, 3].tolist()) == set(range(7)), "equal ones are all drawn"
    own = torch.arange(4)
    assert not (losses.hard_negatives(50 * torch.eye(4), own, generator) == own).any(), "a partner has no floor"


def test_even_the_least_similar_negative_is_drawn_as_often_as_in_blip2() -> None:
    sim = torch.zeros(100_000, 8)
    sim[:, 7] = 50.0
    draws = losses.hard_negatives(sim, torch.zeros(100_000, dtype=torch.long), torch.Generator().manual_seed(0))
    assert (draws != 7).float().mean().item() == pytest.approx(6 * 1e-4, rel=0.5)  # six negatives, LAVIS's floor


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hard_negatives_survive_what_is_not_finite(value: float) -> None:
    sim = torch.zeros(3, 3)
    sim[1] = value
    negatives = losses.hard_negatives(sim, torch.arange(3))
    assert (negatives != torch.arange(3)).all()


def test_hard_negatives_refuse_a_single_sample() -> None:
    with pytest.raises(ValueError, match="no negative"):
        losses.hard_negatives(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))


def test_itg_predicts_each_token_from_those_before_and_no_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[9, 3, 4, 0, 0], [9, 5, 6, 7, 0]])
    logits = torch.randn(2, 5, 10, generator=generator)
    terms = []
    for row in range(2):
        for position in range(4):
            if ids[row, position + 1] != 0:
                log_p = logits[row, position].log_softmax(-1)
                terms.append(-(0.9 * log_p[ids[row, position + 1]] + 0.1 * log_p.mean()))
    assert losses.itg(logits, ids, pad_id=0).item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-5)


def test_reconstruction_counts_masked_patches_only() -> None:
    target = torch.zeros(1, 4, 3)
    prediction = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1).expand(1, 4, 3)
    mask = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    assert losses.reconstruction(prediction, target, mask).item() == pytest.approx((4 + 16) / 2)


def test_token_losses_are_float32_whatever_the_logits_are() -> None:
    logits, labels = torch.randn(1, 3, 7).bfloat16(), torch.tensor([[2, 0, losses.NO_TARGET]])
    assert losses.token_losses(logits, labels).dtype == torch.float32
    assert torch.equal(losses.token_losses(logits, labels), losses.token_losses(logits.float(), labels))
