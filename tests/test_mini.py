"""The mini models train, resume to the bit, and load in the classes that the full-size ones use."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    OPTForCausalLM,
    T5ForConditionalGeneration,
    T5TokenizerFast,
    ViTMAEForPreTraining,
)

from lavis_xformer.assets import ROOT
from lavis_xformer.data.scenes import Question, vocabulary
from lavis_xformer.errors import UserError
from lavis_xformer.mini import build, pool
from lavis_xformer.mini.augment import colour_jitter, random_crop
from lavis_xformer.mini.language import Document, accuracy, encode, next_token_loss, opt_config
from lavis_xformer.mini.mae import mae_config, mae_loss
from lavis_xformer.mini.t5 import examine, pair, t5_config, t5_loss
from lavis_xformer.mini.training import Schedule, fit, generator
from lavis_xformer.models.opt import CachedOPT, attend_by_kernel


@pytest.fixture(scope="module")
def noted():
    """Texts and notes of 2000 scenes."""
    return pool.documents("t", seed=0, count=2000, noted=True)


@pytest.fixture(params=["built", "shipped"])
def mini(request):
    """The set just built, and the one that ships."""
    return request.getfixturevalue("smoke") if request.param == "built" else ROOT / "mini"


def test_build_leaves_cards_and_checksums(smoke):
    sums = json.loads((smoke / "SHA256SUMS.json").read_text())
    assert {name.split("/")[0] for name in sums} == set(build.PARTS)  # and no training state
    for part in build.PARTS:
        card = (smoke / part / "README.md").read_text()
        files = [name for name in sums if name.startswith(part)]
        assert files
        assert all(sums[name] in card for name in files)
        assert "--preset smoke" in card


def test_a_set_that_is_there_is_not_built_again(smoke):
    before = (smoke / "SHA256SUMS.json").read_text()
    with pytest.raises(UserError, match=r"already has bert, opt; name another folder, or continue by --resume"):
        build.main(["--preset", "smoke", "--only", "bert", "--only", "opt", "--out", str(smoke)])
    assert build.main(["--preset", "smoke", "--only", "bert", "--out", str(smoke), "--resume"]) == 0
    assert (smoke / "SHA256SUMS.json").read_text() == before


def test_a_part_of_other_settings_is_not_replaced(smoke, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(smoke, out)
    build_mae = ["--preset", "smoke", "--only", "bert", "--only", "mae", "--out", str(out), "--resume"]
    files = [path for path in out.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    for other in (["--seed", "1"], ["--longer", "2"], ["--preset", "quick"]):
        with pytest.raises(UserError, match=rf"--resume: {out}/mae has weights, and {out}/\.state no run of these"):
            build.main([*build_mae, *other])
    assert {path: path.read_bytes() for path in files} == before
    assert build.main(build_mae) == 0, "the same settings"
    weights = [out / "mae" / "model.safetensors", out / "SHA256SUMS.json"]
    assert [path.read_bytes() for path in weights] == [before[path] for path in weights]
    weights[0].unlink()
    assert build.main([*build_mae, "--seed", "1"]) == 0, "no weights to lose"
    next((out / ".state").glob("notes-*")).unlink()
    with pytest.raises(UserError, match=rf"--resume: {out}/opt has weights"):
        build.main(["--preset", "smoke", "--only", "opt", "--out", str(out), "--resume"])


def test_clip_is_lavis_vit_without_its_last_block(mini):
    from lavis_xformer.mini.clip import ClipConfig

    config = ClipConfig(**json.loads((mini / "clip" / "config.json").read_text()))
    assert config.depth == config.trained_depth - 1
    tower = config.tower(config.depth)
    tower.load_state_dict({k: v.float() for k, v in load_file(mini / "clip" / "model.safetensors").items()})
    tokens = tower(torch.zeros(1, 3, config.img_size, config.img_size))
    assert tokens.shape == (1, (config.img_size // config.patch_size) ** 2 + 1, config.embed_dim)
    assert tokens.isfinite().all()


def test_mae_loads_whole_in_transformers(mini):
    model, report = ViTMAEForPreTraining.from_pretrained(mini / "mae", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.norm_pix_loss
    assert model.config.mask_ratio == 0.75
    assert model(torch.rand(2, 3, 64, 64)).loss.isfinite()


def test_opt_loads_in_lavis_class_and_ends_lines_with_one_token(mini):
    from lavis.models.blip2_models.modeling_opt import OPTForCausalLM as LavisOPT

    model, report = LavisOPT.from_pretrained(mini / "opt", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(mini / "opt", use_fast=False)
    assert len(tokenizer("\n", add_special_tokens=False).input_ids) == 1
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id == model.config.bos_token_id == 2
    assert tokenizer.pad_token_id == model.config.pad_token_id == 1
    assert len(tokenizer) == model.config.vocab_size


def test_t5_loads_whole_and_gives_texts_back(mini):
    if not (mini / "t5").is_dir():
        pytest.skip("the set has no T5")
    model, report = T5ForConditionalGeneration.from_pretrained(mini / "t5", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.encoder.embed_tokens.weight is model.shared.weight
    tokenizer = T5TokenizerFast.from_pretrained(mini / "t5")
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1) == (0, model.config.eos_token_id)
    text = "Question: where is the zebra? Answer: top left " + " ".join(vocabulary())
    ids = tokenizer(text).input_ids
    assert ids == tokenizer(f" {text}").input_ids, "with or without a space before it, as in stage 2"
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_t5_is_asked_as_in_stage_2():
    rng = torch.Generator().manual_seed(0)
    asked = Document("2 red circle.", (Question("count", "how many circles?", "2"),))
    assert pair(asked, rng) == ("2 red circle. Question: how many circles? Answer:", "2")
    halves = {pair(Document("a red star"), rng) for _ in range(50)}
    assert halves == {("", "a red star"), ("a", "red star"), ("a red", "star")}


def test_t5_learns_by_heart(smoke, tmp_path):
    tokenizer = T5TokenizerFast.from_pretrained(smoke / "t5")
    asked = [Document(text, (Question("count", "how many?", text),)) for text in ("2", "star")]
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(t5_config(len(tokenizer)))
    before = examine(model.eval(), tokenizer, asked)["mean"]
    schedule = Schedule(steps=40, batch=8, lr=3e-3)
    fit(model, t5_loss(model, asked, tokenizer, batch=8), schedule=schedule, seed=0, state=tmp_path / "t5.pt")
    assert before < examine(model, tokenizer, asked)["mean"] == 100


def test_bert_knows_every_word_of_the_scenes(mini):
    tokenizer = BertTokenizer.from_pretrained(mini / "bert")
    assert all(tokenizer.tokenize(word) == [word] for word in vocabulary())
    assert json.loads((mini / "bert" / "config.json").read_text())["vocab_size"] == len(tokenizer)


def test_bert_spells_any_other_english(mini):
    tokenizer = BertTokenizer.from_pretrained(mini / "bert")
    assert tokenizer.unk_token_id not in tokenizer("Two zebras, one giraffe: 42 spots (approx.)").input_ids


def test_opt_tokenizer_gives_the_text_back(mini):
    tokenizer = AutoTokenizer.from_pretrained(mini / "opt", use_fast=False)
    text = "Question: where is the zebra? Answer: top left\n" + " ".join(vocabulary()) + "\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("muon", [0.0, 4.0])
def test_resumed_training_equals_uninterrupted(tmp_path, muon):
    images = pool.images(pool.TRAIN, seed=3, count=16)

    def train(state, **options):
        torch.manual_seed(0)
        model = ViTMAEForPreTraining(mae_config())
        schedule = Schedule(steps=4, batch=8, lr=1e-3, muon=muon)
        fit(model, mae_loss(model, images, batch=8), schedule=schedule, seed=1, state=tmp_path / state, **options)
        return model.state_dict()

    whole = train("whole.pt")
    train("parts.pt", stop_at=2)
    resumed = train("parts.pt", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for damaged in (b"", (tmp_path / "parts.pt").read_bytes()[:5000]):
        (tmp_path / "parts.pt").write_bytes(damaged)
        with pytest.raises(UserError, match=r"parts\.pt is damaged \(.*; remove it to train this part anew"):
            train("parts.pt", resume=True)


def test_answers_count_only_where_every_token_is_right(smoke):
    tokenizer = AutoTokenizer.from_pretrained(smoke / "opt", use_fast=False)
    asked = [Document("2 red circle.", (Question("count", "how many circles?", "2"),))]
    text = encode(asked, tokenizer)
    assert tokenizer.decode(text.tokens[0][text.answers[0]].tolist()) == " 2\n"
    torch.manual_seed(0)
    model = OPTForCausalLM(opt_config(len(tokenizer))).eval()
    assert accuracy(model, tokenizer, asked) == {"count": 0.0, "mean": 0.0}


def test_a_note_is_read_in_the_place_of_one_token(smoke):
    tokenizer = AutoTokenizer.from_pretrained(smoke / "opt", use_fast=False)
    torch.manual_seed(0)
    model = OPTForCausalLM(opt_config(len(tokenizer))).eval()
    notes = ("red circle: small dotted", "three objects on a plain ground")
    asked = Document("", (Question("count", "how many circles?", "2"),), notes)
    text = encode([asked, Document("a red star")], tokenizer)
    trained = attend_by_kernel(CachedOPT(opt_config(len(tokenizer)))).eval()  # the class that is trained
    trained.load_state_dict(model.state_dict())
    loss, hits, wanted = next_token_loss(trained, text.take(torch.tensor([0, 1]), torch.device("cpu")))

    words = model.get_input_embeddings()
    ids = [tokenizer(f" {note}", add_special_tokens=False, return_tensors="pt").input_ids[0] for note in notes]
    read = torch.stack([words(note).sum(0) / len(note) ** 0.5 for note in ids])
    after = tokenizer("Question: how many circles? Answer: 2\n", return_tensors="pt").input_ids[0]  # </s> first
    logits = model(inputs_embeds=torch.cat([read, words(after)])[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[len(notes) : -1], after[1:], reduction="none")
    torch.testing.assert_close(loss[0, 2 : 1 + len(after)], expected)
    assert (loss[0, 2 + len(after) :] == 0).all(), "padding"
    assert loss[0, 0] == 0, "the second note is not to be foreseen"
    assert tokenizer.decode(after[1:][wanted[0, 2 : 1 + len(after)]]) == " 2\n"
    plain = tokenizer("a red star\n", return_tensors="pt").input_ids
    logits = model(input_ids=plain).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, plain[0, 1:], reduction="none")
    torch.testing.assert_close(loss[1, : len(expected)], expected)
    assert hits.shape == loss.shape
    cut = encode([asked], tokenizer, length=6)
    assert cut.places[0].unique().tolist() == list(range(6)), "the rest does not fit"


def test_notes_fill_an_image_s_places_and_list_every_object(noted):
    documents = noted[:256]
    kinds = [(bool(d.notes), bool(d.text), bool(d.questions)) for d in documents]
    assert set(kinds) == {(True, False, True), (True, True, False), (False, True, True), (False, False, True),
                          (False, True, False)}  # fmt: skip
    lists = 0
    for document in documents:
        assert len(document.notes) in (0, pool.PLACES)
        for question in document.questions:
            if question.kind == "inventory":
                objects = [note for note in document.notes if ": " in note and not note.startswith("largest")]
                listed = question.answer.split(". ")
                assert sorted(objects) == sorted(listed)
                assert question is document.questions[-1]
                lists += 1
    assert 0.3 < lists / kinds.count((True, False, True)) < 0.7


def test_notes_say_what_the_description_says_and_only_where_asked_for(noted):
    plain = pool.documents("t", seed=0, count=64)
    assert not [d for d in plain if d.notes or any(question.kind == "inventory" for question in d.questions)]
    pairs = [(text.text, set(notes.notes)) for text, notes in zip(plain, noted[:64], strict=True) if notes.questions]
    pairs = [(text, notes - {"nothing"}) for text, notes in pairs if notes]
    assert len(pairs) == 24
    for text, notes in pairs:
        assert all(note in text for note in notes)


def test_no_text_asks_for_two_objects_both_ways_round(noted):
    found = 0
    for document in noted[:400]:
        asked = [question.text for question in document.questions if question.kind == "relation"]
        words = [tuple(sorted(re.findall(r"\w+", question))) for question in asked]
        assert len(set(words)) == len(words), asked
        found += len(words)
    assert found > 200


def test_the_words_of_an_object_s_note_say_all_without_their_order(noted):
    told = [note for document in noted for note in document.notes if "/" in note]
    assert len(set(told)) == len({tuple(sorted(re.findall(r"\w+/?", note))) for note in told}) > 1000


def test_schedule_warms_up_and_decays():
    schedule = Schedule(steps=100, batch=1, lr=1.0, warmup=0.1)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.02


def test_a_training_brought_home_early_is_the_longer_one_until_it_cools_down() -> None:
    planned = Schedule(steps=100, batch=1, lr=1.0)
    early = Schedule(steps=50, batch=1, lr=1.0, horizon=100, cooldown=0.4)
    assert [early.rate(step) for step in range(31)] == [planned.rate(step) for step in range(31)]
    cooling = [early.rate(step) for step in range(30, 50)]
    assert cooling == sorted(cooling, reverse=True)
    assert cooling[-1] == pytest.approx(0.05 * planned.rate(49))


def test_augmentation_without_strength_is_the_identity():
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(colour_jitter(images, generator(0, 0), strength=0.0), images)
    same = random_crop(images, generator(0, 0), smallest=0.5, share=0.0, flip=False)
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)


def test_pools_share_no_scene():
    first, second = (pool.images(split, seed=0, count=8) for split in (pool.TRAIN, pool.HELD_OUT))
    assert not (first[:, None] == second[None]).flatten(2).all(-1).any()


def test_no_gpu_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="use --device cpu"):
        build.main(["--out", "unused", "--device", "cuda"])


def test_a_folder_that_cannot_be_created_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*below can't be created: Not a directory"):
        build.main(["--out", str(tmp_path / "file" / "below")])


def test_recipes_are_plain_values():
    assert all(json.dumps(asdict(recipe)) for recipe in build.RECIPES.values())
