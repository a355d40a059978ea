"""Small parts that the tests build themselves: nothing is loaded, nothing is fetched."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
torch.set_num_threads(1)  # toy models lose more to waiting threads than they gain

WORDS = "a the red blue green circle square star two three left right of above on one".split()


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A test that starts a run redirects the package's messages: the next one finds them as they were."""
    package = logging.getLogger("lavis_xformer")
    before = package.level, package.propagate, package.handlers
    yield
    level, package.propagate, package.handlers = before
    package.setLevel(level)


@pytest.fixture(scope="session")
def vocab_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT folder: a few words, a configuration of tiny size, no weights."""
    from transformers import BertConfig

    folder = tmp_path_factory.mktemp("bert")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_mae_model() -> Any:
    """transformers' ViTMAEForPreTraining at toy size: 32 px, 16 patches, Dm = 24."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(1)
    config = ViTMAEConfig(
        image_size=32,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        mask_ratio=0.5,
        norm_pix_loss=True,
        initializer_range=0.2,  # so that what is predicted differs from nothing
    )
    return ViTMAEForPreTraining(config).eval()


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole set of mini models, trained for a few steps; for all tests, which leave it as it is."""
    from lavis_xformer.mini import build

    out = tmp_path_factory.mktemp("mini")
    assert build.main(["--preset", "smoke", "--out", str(out)]) == 0
    return out


@pytest.fixture
def make_parts(vocab_folder: Path, tiny_mae_model: Any) -> Any:
    """A factory of a model's parts at toy size, ``make_parts(fusion, init)``; always the same seed."""
    from copy import deepcopy

    from toy_xformer import toy_parts
    from transformers import BertConfig

    from lavis_xformer.models import towers

    def make(fusion: str, init: str) -> dict[str, Any]:
        torch.manual_seed(0)
        return toy_parts(
            bert=BertConfig.from_pretrained(vocab_folder),
            mae=lambda: deepcopy(tiny_mae_model),
            tokenizer=towers.build_tokenizer(str(vocab_folder)),
            fusion=fusion,
            init=init,
        )

    return make


@pytest.fixture
def make_xformer(make_parts: Any) -> Any:
    """A factory of stage-1 models at toy size, ``make_xformer(fusion="dual", **arguments)``; always the same seed."""
    from lavis_xformer.models.stage1 import XFormer

    def make(fusion: str = "dual", init: str = "identity", **arguments: Any) -> XFormer:
        return XFormer(**make_parts(fusion, init), embed_dim=16, **arguments)

    return make


@pytest.fixture
def batch() -> dict[str, Any]:
    """Four images of 32 px and their captions."""
    generator = torch.Generator().manual_seed(3)
    return {
        "image": torch.randn(4, 3, 32, 32, generator=generator),
        "text_input": ["a red circle", "two blue squares on the left", "three green star", "one red star above"],
        "image_id": [0, 1, 2, 3],
    }


@pytest.fixture(scope="session")
def opt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPT folder in the hub's format at toy size: random weights, every byte a token, two merges."""
    import json

    from transformers import OPTConfig, OPTForCausalLM
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    folder = tmp_path_factory.mktemp("opt")
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values(), "Ġa", "re"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ a\nr e\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "add_bos_token": True}))
    torch.manual_seed(2)
    config = OPTConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=96,
        init_std=0.5,  # far from uniform, so that generated texts differ
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FlanT5 folder at toy size: random weights, a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    tokens = ["<pad>", "</s>", "<unk>", *WORDS, "Question:", "Answer:", "Short", "how", "many", "?"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=len(tokens),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        initializer_factor=4.0,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make_stage2(make_parts: Any, opt_folder: Path, t5_folder: Path) -> Any:
    """A factory of stage-2 models at toy size, ``make_stage2("opt", fusion="dual", **arguments)``; one seed."""
    from lavis_xformer.models.stage2 import XFormerOPT, XFormerT5

    def make(kind: str = "opt", fusion: str = "dual", init: str = "identity", **arguments: Any) -> Any:
        cls, folder = {"opt": (XFormerOPT, opt_folder), "t5": (XFormerT5, t5_folder)}[kind]
        language = cls.LANGUAGE.from_source(str(folder), max_txt_len=24)
        return cls(**make_parts(fusion, init), language=language, **arguments)

    return make


@pytest.fixture
def stage2_config(
    tmp_path_factory: pytest.TempPathFactory, vocab_folder: Path, opt_folder: Path, tiny_mae_model: Any
) -> Any:
    """Sections ``model`` and ``preprocess`` of ``xformer_opt`` at toy size, every part from a local folder."""
    import json

    from omegaconf import OmegaConf
    from safetensors.torch import save_file

    from lavis_xformer.models.towers import eva_vit

    clip, mae = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("mae")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 20, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    torch.manual_seed(4)
    (clip / "config.json").write_text(json.dumps({**sizes, "qkv_bias": True}))
    save_file(eva_vit(**sizes, qkv_bias=True).state_dict(), clip / "model.safetensors")
    tiny_mae_model.save_pretrained(mae)
    processor = {"name": "xformer_image_eval", "image_size": 16}
    return OmegaConf.create(
        {
            "model": {
                "arch": "xformer_opt",
                "model_type": "toy",
                "vit_model": str(clip),
                "image_size": 32,
                "mae_model": str(mae),
                "bert": str(vocab_folder),
                "num_query_token": 4,
                "fusion": "dual",
                "fusion_init": "normal",
                "opt_model": str(opt_folder),
            },
            "preprocess": {
                "vis_processor": {"train": processor, "eval": processor},
                "text_processor": {"train": {"name": "blip_caption"}, "eval": {"name": "blip_caption"}},
            },
        }
    )
