"""Train the real stage-1 model at toy size on this process's part of fixed batches.

Every step's terms, the first step's gradients and the final weights come out. Everything random is an argument, and the
likeliest negative stands for the drawn one.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, ViTMAEConfig, ViTMAEForPreTraining

from lavis_xformer import distributed
from lavis_xformer.distributed import rank, world_size
from lavis_xformer.engine.step import Stepper
from lavis_xformer.models import towers
from lavis_xformer.models.fusion import build_fusion
from lavis_xformer.models.mae import MaskedAutoencoder
from lavis_xformer.models.stage1 import XFormer

STEPS, BATCH = 20, 8  # samples of all processes
WORDS = "a the red blue green circle square star two three left right".split()


def toy_parts(*, bert, mae, tokenizer, fusion="dual", init="identity"):
    """The parts of a model of either stage, of 32 px, by a BERT's configuration, what makes an MAE, and a tokenizer."""
    return {
        "visual_encoder": towers.eva_vit(
            img_size=32, patch_size=8, embed_dim=20, depth=2, num_heads=2, mlp_ratio=2, qkv_bias=True
        ),
        "mae": MaskedAutoencoder(model=mae()),
        "qformer": towers.QFormer(towers.qformer_config(bert, num_queries=4, vision_width=20, cross_attention_freq=2)),
        "tokenizer": tokenizer,
        "fusion": build_fusion(fusion, query_width=32, clip_width=20, mae_width=24, heads=4, init=init),
        "image_size": 32,
        "max_txt_len": 12,
    }


def build():
    """The model of conftest's ``make_xformer``, random throughout."""
    torch.manual_seed(0)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    bert = BertConfig(
        vocab_size=len(tokens), hidden_size=32, max_position_embeddings=32, initializer_range=0.3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )  # fmt: skip
    mae = ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=24, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=32, norm_pix_loss=True, **sizes
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(tokens))
        tokenizer = towers.build_tokenizer(folder)
    parts = toy_parts(bert=bert, mae=lambda: ViTMAEForPreTraining(mae), tokenizer=tokenizer, init="normal")
    return XFormer(**parts, embed_dim=16)


def joined_batches():
    """Images, captions of different lengths and mask noise of every step, for all processes together."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        lengths = torch.randint(1, 9, (BATCH,), generator=generator).tolist()
        words = [torch.randint(len(WORDS), (n,), generator=generator).tolist() for n in lengths]
        images = torch.randn(BATCH, 3, 32, 32, generator=generator)
        noise = torch.rand(BATCH, 16, generator=generator)
        yield images, [" ".join(WORDS[i] for i in row) for row in words], noise


def likeliest(weights, count, generator=None):
    return weights.argmax(-1, keepdim=True)


def train():
    """Return the terms of every step (means over processes), the first gradients and the final weights."""
    bare = build().train()
    model = DistributedDataParallel(bare, broadcast_buffers=False) if world_size() > 1 else bare
    trained = {name: p for name, p in bare.named_parameters() if p.requires_grad}
    stepper = Stepper(
        model=model,
        # The usual eps would make a whole step of the rounding of gradients that are 0 in theory (biases of keys).
        optimizer=torch.optim.AdamW(trained.values(), lr=1e-3, eps=1e-3),
        forward=lambda model, part: model(part, noise=part["noise"]),
    )
    size = BATCH // world_size()
    mine = slice(rank() * size, (rank() + 1) * size)
    history, first_gradients = [], {}
    with mock.patch("torch.multinomial", likeliest):
        for images, captions, noise in joined_batches():
            part = {"image": images[mine], "text_input": captions[mine], "noise": noise[mine]}
            terms = stepper.gradients([part])
            history.append({name: distributed.total(value).item() / world_size() for name, value in terms.items()})
            first_gradients = first_gradients or {name: p.grad.clone() for name, p in trained.items()}
            stepper.apply()
    return {"history": history, "gradients": first_gradients, "weights": {n: p.detach() for n, p in trained.items()}}
