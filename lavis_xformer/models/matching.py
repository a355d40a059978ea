"""``xformer_image_text_matching`` and ``xformer_feature_extractor``: stage 1 under LAVIS's other two names.

B: pairs, Q: queries, E: width of the shared space.
"""

from __future__ import annotations

from typing import Any

from lavis.common.registry import registry

from lavis_xformer import losses
from lavis_xformer.errors import one_of
from lavis_xformer.models.samples import take, texts_of
from lavis_xformer.models.stage1 import XFormer

MATCH_HEADS = ("itm", "itc")

registry.register_model("xformer_feature_extractor")(XFormer)


@registry.register_model("xformer_image_text_matching")
class XFormerITM(XFormer):
    """Does a text fit an image? The interface of LAVIS's ``Blip2ITM``."""

    def forward(
        self, samples: dict[str, Any], match_head: str = "itm", *, noise: Any = None, generator: Any = None
    ) -> Any:
        """Score B pairs.

        Args:
            samples: ``image`` (B, 3 or 6, S, S) and ``text_input``, B strings.
            match_head: ``itm``: logits (B, 2), column 1 says "they match"; ``itc``: cosine similarity (B, 1) of the
                best query.
            noise: of stage 1's ``forward``, ignored.
            generator: likewise.

        Raises:
            UserError: an unknown head.
        """
        one_of("match_head", match_head, MATCH_HEADS)
        image = take(samples, "image")
        text = self.tokenize(texts_of(samples, len(image)))
        if match_head == "itm":
            tokens = self.encode_image(image)
            return self.match(tokens.clip, tokens.mae_tokens, text.input_ids, text.attention_mask)
        z = self.encode_queries(image)
        image_feats = self.image_features(z)  # (B, Q, E)
        text_feats = self.text_features(self.forward_text(text))  # (B, E)
        return losses.similarity(image_feats, text_feats).diagonal().unsqueeze(1)  # (B, 1)
