"""How MAE's features meet BLIP-2's queries: the one seam for every ablation.

A fusion has three hooks, the identity by default: :meth:`Fusion.visual_tokens` changes what the Q-Former reads,
:meth:`Fusion.align` changes M, and :meth:`Fusion.refine` does that and changes what the Q-Former returns. With
:class:`NoFusion` the model is BLIP-2.

B: batch, Q: queries, D: width of the Q-Former, Nc / Dc: number and width of CLIP's tokens C,
Nm / Dm: number and width of MAE's tokens M, L: queries of an attention, S: its keys.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_xformer.errors import UserError, one_of, whole

Init = Literal["identity", "normal"]
BERT_STD = 0.02  # standard deviation of BERT's initial weights


class Attention(nn.Module):
    """Multi-head attention from one stream to another, or to itself."""

    def __init__(self, *, width: int, context_width: int, heads: int) -> None:
        """Make the four projections.

        Args:
            width: of the queries and of the output.
            context_width: of the keys and values.
            heads: must divide ``width``.

        Raises:
            UserError: ``heads`` doesn't divide ``width``.
        """
        super().__init__()
        if width % whole("model.fusion_heads", heads, least=1):
            raise UserError(f"model.fusion_heads: {heads} heads don't divide the attention width {width}")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend from x (B, L, width) to context (B, S, context_width); returns (B, L, width)."""
        query, key, value = self._heads(x, context)
        return self._join(F.scaled_dot_product_attention(query, key, value))

    def with_map(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Like :meth:`forward`, but also returns the attention map (B, heads, L, S), each row of which sums to 1."""
        query, key, value = self._heads(x, context)
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        return self._join(weights @ value), weights

    def _heads(self, x: Tensor, context: Tensor) -> list[Tensor]:
        """Queries (B, heads, L, width / heads), keys and values (B, heads, S, width / heads)."""
        projections = (self.query(x), self.key(context), self.value(context))
        return [projected.unflatten(-1, (self.heads, -1)).transpose(1, 2) for projected in projections]

    def _join(self, attended: Tensor) -> Tensor:
        """(B, heads, L, width / heads) -> (B, L, width)."""
        return self.out(attended.transpose(1, 2).flatten(-2))


class CrossAttentionBlock(nn.Module):
    """A pre-norm transformer decoder layer: [self-attention,] cross-attention, feed-forward."""

    def __init__(
        self,
        *,
        width: int,
        context_width: int,
        heads: int,
        self_attention: bool = True,
        init: Init = "identity",
        std: float = BERT_STD,
    ) -> None:
        """Make the layer.

        Args:
            width: of the stream that is updated.
            context_width: of the stream that is read.
            heads: attention heads.
            self_attention: whether the stream attends to itself first.
            init: ``identity`` starts every output projection at zero, so that the layer returns its input.
            std: standard deviation of the initial weights.

        Raises:
            UserError: ``heads`` doesn't divide ``width``, or there is no such ``init``.
        """
        super().__init__()
        one_of("init", init, get_args(Init))
        self.self_norm = nn.LayerNorm(width) if self_attention else None
        self.self_attention = Attention(width=width, context_width=width, heads=heads) if self_attention else None
        self.cross_norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(context_width)
        self.cross_attention = Attention(width=width, context_width=context_width, heads=heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.apply(partial(_initialise, std=std))
        if init == "identity":
            for attention in (self.self_attention, self.cross_attention):
                if attention is not None:
                    _zero(attention.out)
            _zero(self.feed_forward[-1])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Update x (B, L, width) from context (B, S, context_width); returns (B, L, width)."""
        if self.self_attention is not None and self.self_norm is not None:
            normed = self.self_norm(x)
            x = x + self.self_attention(normed, normed)
        x = x + self.cross_attention(self.cross_norm(x), self.context_norm(context))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Fusion(nn.Module):
    """Interface of every fusion; the base class is the identity."""

    needs_mae: bool = True
    #: whether ``align`` changes M: only then is M of use beyond ``visual_tokens``, and its reconstruction trains
    #: something
    aligns_mae: bool = False
    #: whether ``heads`` is by default CLIP's number, not the Q-Former's
    clip_heads: bool = False

    def visual_tokens(self, clip: Tensor, mae: Tensor | None) -> Tensor:
        """What the Q-Former reads, C and M -> C or other tokens: (B, Nc, Dc) and (B, Nm, Dm) -> (B, any, Dc)."""
        return clip

    def align(self, mae: Tensor | None, queries: Tensor) -> Tensor | None:
        """M (B, Nm, Dm) and Zq (B, Q, D) -> M' (B, Nm, Dm) alone."""
        return mae

    def refine(self, queries: Tensor, mae: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Zq (B, Q, D) and M (B, Nm, Dm) -> Z' (B, Q, D) and M' (B, Nm, Dm)."""
        return queries, mae


class NoFusion(Fusion):
    """BLIP-2: the Q-Former sees CLIP alone and its output is used as it is."""

    needs_mae = False


class DualCrossAttention(Fusion):
    """X-Former (arXiv 2407.13851, section 3): M' = CA1(M, Zq), then Z' = CA2(Zq, M')."""

    aligns_mae = True

    def __init__(
        self,
        *,
        query_width: int,
        mae_width: int,
        heads: int,
        depth: int = 1,
        self_attention: bool = True,
        init: Init = "identity",
        std: float = BERT_STD,
    ) -> None:
        """Make the two blocks.

        M is projected to the Q-Former's width for the first block and back for MAE's decoder.

        Args:
            query_width: D.
            mae_width: Dm.
            heads: attention heads of both blocks.
            depth: layers in each of the two blocks.
            self_attention: whether each layer begins with self-attention.
            init: ``identity``: M' = M and Z' = Zq exactly at the start; or ``normal``.
            std: standard deviation of the initial weights, as in the Q-Former.

        Raises:
            UserError: ``heads`` doesn't divide ``query_width``, or there is no such ``init``.
        """
        super().__init__()
        block = {"width": query_width, "heads": heads, "self_attention": self_attention, "std": std}
        self.mae_in = nn.Linear(mae_width, query_width)
        self.align_blocks = _stack(depth, context_width=query_width, init="normal", **block)
        self.mae_out = nn.Linear(query_width, mae_width)
        self.enrich_blocks = _stack(depth, context_width=mae_width, init=init, **block)
        _initialise(self.mae_in, std=std)
        _initialise(self.mae_out, std=std)
        if init == "identity":
            _zero(self.mae_out)

    def align(self, mae: Tensor | None, queries: Tensor) -> Tensor:
        """The first cross-attention: M (B, Nm, Dm) attends to Zq (B, Q, D); returns M' (B, Nm, Dm)."""
        assert mae is not None
        x = self.mae_in(mae)  # (B, Nm, D)
        for block in self.align_blocks:
            x = block(x, queries)
        return mae + self.mae_out(x)

    def enrich(self, queries: Tensor, aligned: Tensor) -> Tensor:
        """The second cross-attention: Zq (B, Q, D) attends to M' (B, Nm, Dm); returns Z' (B, Q, D)."""
        for block in self.enrich_blocks:
            queries = block(queries, aligned)
        return queries

    def refine(self, queries: Tensor, mae: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Zq (B, Q, D) and M (B, Nm, Dm) -> Z' (B, Q, D) and M' (B, Nm, Dm)."""
        aligned = self.align(mae, queries)
        return self.enrich(queries, aligned), aligned


class Concat(Fusion):
    """The paper's ablation "concatenation": the Q-Former reads C and a projection of M side by side."""

    def __init__(self, *, clip_width: int, mae_width: int, std: float = BERT_STD) -> None:
        """Make the projection of M from ``mae_width`` (Dm) to ``clip_width`` (Dc); ``std`` as in DualCrossAttention."""
        super().__init__()
        self.mae_norm = nn.LayerNorm(mae_width)
        self.mae_in = nn.Linear(mae_width, clip_width)
        _initialise(self.mae_in, std=std)

    def visual_tokens(self, clip: Tensor, mae: Tensor | None) -> Tensor:
        """(B, Nc, Dc) and (B, Nm, Dm) -> (B, Nc + Nm, Dc)."""
        return torch.cat([clip, self.mae_in(self.mae_norm(mae))], dim=1)


class EarlyCrossAttention(Fusion):
    """The paper's ablation "early cross-attention": C attends to M before the Q-Former reads C."""

    clip_heads = True

    def __init__(
        self,
        *,
        clip_width: int,
        mae_width: int,
        heads: int,
        depth: int = 1,
        self_attention: bool = True,
        init: Init = "identity",
        std: float = BERT_STD,
    ) -> None:
        """Make ``depth`` blocks of CLIP's width; the other arguments as in DualCrossAttention."""
        super().__init__()
        block = {"width": clip_width, "heads": heads, "self_attention": self_attention, "std": std}
        self.blocks = _stack(depth, context_width=mae_width, init=init, **block)

    def visual_tokens(self, clip: Tensor, mae: Tensor | None) -> Tensor:
        """(B, Nc, Dc) and (B, Nm, Dm) -> (B, Nc, Dc)."""
        for block in self.blocks:
            clip = block(clip, mae)
        return clip


FUSIONS: dict[str, type[Fusion]] = {
    "dual": DualCrossAttention,
    "none": NoFusion,
    "concat": Concat,
    "early": EarlyCrossAttention,
}


def build_fusion(name: str, **offered: Any) -> Fusion:
    """Make the fusion of this name, with those of the sizes and options offered that its constructor names."""
    wanted = parameters_of(FUSIONS[name])
    return FUSIONS[name](**{key: value for key, value in offered.items() if key in wanted})


def parameters_of(built: type) -> set[str]:
    """Names that a class's constructor takes, with those that it passes on to the class it derives from."""
    names: set[str] = set()
    for cls in built.__mro__:
        if "__init__" in vars(cls):
            given = inspect.signature(vars(cls)["__init__"]).parameters.values()
            names |= {one.name for one in given if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in given):
                break
    return names - {"self"}


def _stack(depth: int, **block: Any) -> nn.ModuleList:
    """``depth`` blocks with the same arguments."""
    return nn.ModuleList(CrossAttentionBlock(**block) for _ in range(depth))


def _initialise(module: nn.Module, *, std: float) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
