"""Stage 2: parity with LAVIS's BLIP-2, the cache, prompts, questions, gradients, batch size 1."""

from __future__ import annotations

import inspect
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.blip2_t5 import Blip2T5
from lavis.models.blip2_models.modeling_opt import OPTAttention, OPTForCausalLM
from lavis.models.blip2_models.modeling_t5 import T5Config, T5ForConditionalGeneration
from lavis.tasks.captioning import CaptionTask
from lavis.tasks.vqa import VQATask
from spacy.util import is_package

import lavis_xformer
from lavis_xformer.errors import UserError
from lavis_xformer.images import clip_to_mae
from lavis_xformer.losses import NO_TARGET
from lavis_xformer.models import frozen, generation
from lavis_xformer.models.frozen import DTYPES
from lavis_xformer.models.fusion import FUSIONS
from lavis_xformer.models.generation import SPACY_MODEL, lemmatize
from lavis_xformer.models.opt import OptKernelAttention
from lavis_xformer.models.t5 import T5Language
from lavis_xformer.models.texts import Prompts, continuation, split, texts_to_learn

KINDS = ("opt", "t5")
SHARED = "visual_encoder ln_vision Qformer query_tokens".split()


def blip2_opt_like(ours: Any, folder: Path) -> Blip2OPT:
    """LAVIS's own class, and its OPT without cache, around copies of the same parts."""
    theirs = Blip2OPT.__new__(Blip2OPT)
    torch.nn.Module.__init__(theirs)
    for part in [*SHARED, "opt_proj"]:
        setattr(theirs, part, deepcopy(getattr(ours, part)))
    theirs.opt_model = OPTForCausalLM.from_pretrained(folder).requires_grad_(False).eval()
    theirs.opt_tokenizer = deepcopy(ours.language.tokenizer)
    theirs.eos_token_id = ours.language.end_id
    theirs.max_txt_len, theirs.prompt = ours.language.max_txt_len, ours.prompt
    theirs.prompt_length = theirs.opt_tokenizer(ours.prompt, return_tensors="pt").attention_mask.sum(1)
    return theirs


def blip2_t5_like(ours: Any, folder: Path) -> Blip2T5:
    theirs = Blip2T5.__new__(Blip2T5)
    torch.nn.Module.__init__(theirs)
    for part in [*SHARED, "t5_proj"]:
        setattr(theirs, part, deepcopy(getattr(ours, part)))
    config = T5Config.from_pretrained(folder)
    config.dense_act_fn = "gelu"
    theirs.t5_model = T5ForConditionalGeneration.from_pretrained(folder, config=config).requires_grad_(False).eval()
    theirs.t5_model.lm_head = deepcopy(ours.language.model.lm_head)
    theirs.t5_tokenizer = ours.language.tokenizer
    theirs.max_txt_len, theirs.prompt, theirs._apply_lemmatizer = ours.language.max_txt_len, ours.prompt, False
    return theirs


def end_early(model: Any, batch: dict[str, Any]) -> None:
    """Let the toy's texts end after a few tokens, some earlier than others, when they begin with "a"."""
    if model.language.kind == "t5":
        model.language.model.lm_head.weight.mul_(0.1)  # it is so sure that penalties change nothing
        return
    visual = model.projection(model.encode_queries(batch["image"]))
    options = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_new_tokens": 30}
    said = model.language.continue_(visual, ["a"] * len(visual), **options)
    model.language.end_id = int(said.flatten().mode().values)  # this toy never says a line break


def assert_same_losses_and_gradients(ours: Any, theirs: Any, samples: dict[str, Any]) -> None:
    mine, reference = ours(samples)["loss"], theirs(samples)["loss"]
    assert mine.item() == pytest.approx(reference.item(), rel=1e-6)  # T5's is 155, where fp32 has steps of 1.5e-5
    mine.backward()
    reference.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            wanted = expected.pop(name)
            fp32 = 1e-5 * wanted.abs().max().item() + 1e-9  # a key's bias has no gradient but rounding errors
            torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=fp32, msg=name)
    assert not [name for name in expected if not name.startswith("visual_encoder")]


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_without_fusion_opt_is_lavis_blip2_in_loss_and_gradients(
    prompt: str, make_stage2: Any, batch: dict[str, Any], opt_folder: Path
) -> None:
    ours = make_stage2("opt", "none", prompt=prompt)
    captions = [f"{prompt} {text}".strip() for text in ("a red star", "two", "left of it", "on a square")]
    assert_same_losses_and_gradients(ours, blip2_opt_like(ours, opt_folder), {**batch, "text_input": captions})


def test_without_fusion_t5_is_lavis_blip2_in_loss_and_gradients(
    make_stage2: Any, batch: dict[str, Any], t5_folder: Path
) -> None:
    ours = make_stage2("t5", "none")
    texts = {"text_input": ["a red", "two", "the", "one"], "text_output": ["star", "blue star", "left", "red"]}
    assert_same_losses_and_gradients(ours, blip2_t5_like(ours, t5_folder), {**batch, **texts})


@pytest.mark.parametrize("cached", [0, 3])
def test_attention_by_torchs_kernel_is_lavis_own(cached: int) -> None:
    torch.manual_seed(0)
    theirs = OPTAttention(16, 4, is_decoder=True).double()
    ours = deepcopy(theirs)
    ours.__class__ = OptKernelAttention
    padded = 2  # on the left, of the second text; LAVIS adds two masks there, which gives -inf
    lowest = torch.finfo(torch.double).min
    mask = torch.full((5, cached + 5), lowest, dtype=torch.double).triu(cached + 1).expand(2, 1, -1, -1).clone()
    mask[1, ..., :padded] += lowest
    given = torch.randn(2, 5, 16, dtype=torch.double)
    past = (torch.randn(2, 4, cached, 4, dtype=torch.double), torch.randn(2, 4, cached, 4, dtype=torch.double))
    found = []
    for attention in (ours, theirs):
        x = given.clone().requires_grad_(True)
        y, _, cache = attention(x, past_key_value=past if cached else None, attention_mask=mask)
        seen = y.flatten(0, 1)[[*range(5), *range(5 + max(0, padded - cached), 10)]]  # what no mask hides
        seen.square().sum().backward()
        found.append((seen, x.grad, *cache))
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


def test_padding_is_attended_to_as_by_lavis_where_its_mask_has_a_wider_range_than_the_attention() -> None:
    torch.manual_seed(0)
    theirs = OPTAttention(16, 4, is_decoder=True)
    ours = deepcopy(theirs)
    ours.__class__ = OptKernelAttention
    given = torch.ones(1, 5, 16), {"attention_mask": torch.full((1, 1, 5, 5), torch.finfo(torch.float32).min)}
    with torch.autocast("cpu", torch.bfloat16):  # in which this minimum is -inf
        found = ours(given[0], **given[1])[0].float()
    torch.testing.assert_close(found, theirs(given[0], **given[1])[0], rtol=0, atol=0.02)


METHODS = {
    ("blip2_opt", "xformer_opt"): "forward generate",
    ("blip2_t5", "xformer_t5"): "forward generate predict_answers",
    ("blip2_t5", "xformer_opt"): "predict_answers",  # LAVIS's main branch has it for OPT, with these arguments
    ("blip2", "xformer"): "forward generate extract_features forward_image forward_text compute_itm compute_sim_matrix",
    ("blip2_feature_extractor", "xformer_feature_extractor"): "extract_features",
    ("blip2_image_text_matching", "xformer_image_text_matching"): "forward",
}


@pytest.mark.parametrize(("theirs", "ours"), METHODS)
def test_a_swap_is_one_string(theirs: str, ours: str) -> None:
    lavis_xformer.register()
    for name in METHODS[theirs, ours].split():
        reference, mine = (
            inspect.signature(getattr(registry.get_model_class(model), name)).parameters for model in (theirs, ours)
        )
        assert list(mine)[: len(reference) - ("kwargs" in reference)] == [key for key in reference if key != "kwargs"]
        chosen_by_configuration = {"prompt", "length_penalty"} if name == "predict_answers" else set()
        for key in reference.keys() - chosen_by_configuration:
            assert (mine[key].default, mine[key].kind) == (reference[key].default, reference[key].kind), (name, key)


def test_t5_has_no_type_that_runs_by_itself() -> None:
    with pytest.raises(UserError, match="xformer_t5 has no default model type: name one of mini_t5, pretrain_flant5xl"):
        lavis_xformer.load_model_and_preprocess("xformer_t5")
    with pytest.raises(UserError, match=r"model\.t5_model: .* is not shipped; .*build-mini --only t5 --out DIR"):
        lavis_xformer.load_model_and_preprocess("xformer_t5", "mini_t5")


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_prefix_lm_splits_captions_in_training_only(prompt: str, make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("t5", prompt=prompt, prefix_lm=True)
    captions = [continuation(prompt, text) for text in batch["text_input"]]
    halves = [split(prompt, text, torch.Generator().manual_seed(seed)) for text in captions for seed in range(20)]
    assert {begun + rest for begun, rest in halves} == {prompt + text for text in captions}
    assert all(rest.strip() for _, rest in halves)
    assert "".join(split(prompt, "  a b", torch.Generator().manual_seed(1))) == f"{prompt}  a b"
    every = {captions[0].split().index(word) for word in captions[0].split()}
    begun = [len(split("", captions[0], torch.Generator().manual_seed(seed))[0].split()) for seed in range(300)]
    assert {cut for cut in begun if abs(begun.count(cut) - 300 / len(every)) < 40} == every, "each as often as any"

    replay = torch.Generator().manual_seed(5)
    halves = [split(prompt, text, replay) for text in captions]
    texts = {"text_input": [begun for begun, _ in halves], "text_output": [rest for _, rest in halves]}
    trained = model.train()(batch, generator=torch.Generator().manual_seed(5))["loss"]
    assert torch.equal(trained, model({**batch, **texts})["loss"])
    assert torch.equal(model.eval()(batch)["loss"], make_stage2("t5", prompt=prompt).eval()(batch)["loss"])


def test_prefix_lm_splits_captions_beside_questions_as_those_alone(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("t5", prefix_lm=True).train()
    captions, seeds = batch["text_input"], range(5)
    joined = {"image": batch["image"], "text_input": [""] * 4, "answer": captions}
    losses = [
        [model(samples, generator=torch.Generator().manual_seed(seed))["loss"].item() for seed in seeds]
        for samples in (batch, joined)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert len(set(losses[1])) > 1


@pytest.mark.parametrize(
    ("before", "after"),
    [("a photo of", "a star"), ("a photo of ", "a star"), ("a photo of", " a star"), ("", "a photo of a star")],
)
def test_prompt_and_target_are_two_words(before: str, after: str, make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt")
    texts = {"image": batch["image"][:1], "text_input": [before], "text_output": [after]}
    ids, *_ = model.language.encode(texts_to_learn(texts, Prompts(model.prompt, model.vqa_prompt)).dialogues)
    assert model.language.tokenizer.decode(ids[0]) == "</s>a photo of a star\n"
    assert before + continuation(before, after) == "a photo of a star"


def test_a_caption_that_begins_within_a_word_as_the_prompt_does_is_a_whole_caption() -> None:
    assert continuation("a photo", "a photograph of a star") == " a photograph of a star"
    assert continuation("a", "an elephant") == " an elephant"
    assert continuation("a photo of", "a photo of a star") == " a star"
    assert continuation("photo:", "photo:a star") == "a star"
    assert continuation("一张照片", "一张照片猫") == "猫", "words are not separated everywhere"


WAYS = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 3, "length_penalty": -1.0, "repetition_penalty": 1.5, "min_length": 6},
    "captions": {"num_beams": 3, "num_captions": 2},
    "nucleus": {"use_nucleus_sampling": True, "num_beams": 1, "temperature": 0.7, "num_captions": 2},
}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_opt_with_cache_says_what_lavis_says_without(
    way: str, make_stage2: Any, batch: dict[str, Any], opt_folder: Path
) -> None:
    ours = make_stage2("opt", "none", prompt="a photo of").eval()
    theirs = blip2_opt_like(ours, opt_folder).eval()
    said = []
    for model in (ours, theirs):
        torch.manual_seed(7)
        said.append(model.generate(batch, max_length=12, **WAYS[way]))
    assert said[0] == said[1]
    assert len(said[0]) == 4 * WAYS[way].get("num_captions", 1)
    assert any(said[0])


@pytest.mark.parametrize("way", sorted(WAYS))
def test_t5_with_cache_says_what_lavis_says_without(
    way: str, make_stage2: Any, batch: dict[str, Any], t5_folder: Path
) -> None:
    ours = make_stage2("t5", "none", prompt="a").eval()
    theirs = blip2_t5_like(ours, t5_folder).eval()
    said = []
    for model in (ours, theirs):
        torch.manual_seed(7)
        said.append([text.strip() for text in model.generate(batch, max_length=12, **WAYS[way])])
    assert said[0] == said[1]
    assert any(said[0])


@pytest.mark.parametrize("kind", KINDS)
def test_penalty_and_fewest_tokens_change_what_is_said_as_in_lavis(
    kind: str, make_stage2: Any, batch: dict[str, Any], opt_folder: Path, t5_folder: Path
) -> None:
    ours = make_stage2(kind, "none", prompt="a").eval()
    end_early(ours, batch)
    theirs = (blip2_opt_like(ours, opt_folder) if kind == "opt" else blip2_t5_like(ours, t5_folder)).eval()
    counted = {"opt": 2, "t5": 1}[kind]  # by min_length: the prompt, or the start token
    said = []
    for mine, reference in (
        ({}, {"length_penalty": 1.0}),
        ({"length_penalty": -2.0}, {"length_penalty": -2.0}),
        ({"length_penalty": 3.0}, {"length_penalty": 3.0}),
        ({"min_length": counted + 4}, {"min_length": counted + 4}),
        ({"min_new_tokens": 4}, {"min_length": counted + 4}),
    ):
        said.append(ours.generate(batch, num_beams=3, max_length=12, **mine))
        assert said[-1] == [text.strip() for text in theirs.generate(batch, num_beams=3, max_length=12, **reference)]
    default, short, long, *enough = said
    assert default not in (short, long, *enough)


def test_answers_of_t5_are_lavis_answers(make_stage2: Any, batch: dict[str, Any], t5_folder: Path) -> None:
    ours = make_stage2("t5", "none").eval()
    theirs = blip2_t5_like(ours, t5_folder).eval()
    samples = {**batch, "text_input": ["how many star ?", "how many red circle ?", "left ?", "how many ?"]}
    asked = "Question: {} Short Answer:"
    mine = ours.predict_answers(samples, prompt=asked, min_len=0)
    assert mine == [text.strip() for text in theirs.predict_answers(samples, prompt=asked, min_len=0)]


@pytest.mark.parametrize(("kind", "penalty", "precision"), [("opt", 0.0, "fp16"), ("t5", -1.0, "bf16")])
def test_length_penalty_and_precision_are_lavis_unless_told(
    kind: str, penalty: float, precision: str, make_stage2: Any
) -> None:
    model = make_stage2(kind)
    assert (model.vqa_length_penalty, model.language.precision) == (penalty, precision)
    assert make_stage2(kind, vqa_length_penalty=0.5).vqa_length_penalty == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_ranking_takes_the_answer_of_least_loss(kind: str, make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2(kind, init="normal", vqa_prompt="{}").eval()
    samples = {**batch, "text_input": ["how many star ?", "the left of", "on a", "one or two"]}
    answers = ["two", "three star", "red", "on", "left"]
    expected = []
    for image, question in zip(samples["image"], samples["text_input"], strict=True):
        losses = []
        for answer in answers:
            one = {"image": image[None], "text_input": [question], "answer": [answer]}
            tokens = model.language.predict(torch.zeros(1, 1, 32), [[("a", f" {answer}")]])[1] != NO_TARGET
            losses.append(model(one)["loss"].item() * int(tokens.sum()))  # the sum over the answer's tokens
        expected.append(answers[losses.index(min(losses))])
    ranked = model.predict_answers(samples, inference_method="rank", answer_list=answers)
    assert ranked == expected
    assert model.predict_answers(samples, inference_method="rank", answer_list=np.array(answers)) == expected
    for wrong in ("yes", [], None, ["yes", ""]):
        with pytest.raises(UserError, match="chooses from answer_list, a list of texts"):
            model.predict_answers(samples, inference_method="rank", answer_list=wrong)
    assert len(set(ranked)) > 1, "or the images and questions don't matter"


def test_what_is_told_reaches_the_language_model(
    make_stage2: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_stage2("opt", vqa_length_penalty=-2.0, apply_lemmatizer=True).eval()
    told: list[dict[str, Any]] = []

    def say(visual: torch.Tensor, prompts: list[str], **options: Any) -> list[str]:
        told.append({"queries": visual.shape[1], **options})
        return ["two cats"] * len(prompts)

    def rank(visual: torch.Tensor, prompts: list[str], answers: list[str], *, candidates: int) -> list[str]:
        told.append({"answers": answers, "candidates": candidates})
        return answers[:1] * len(prompts)

    monkeypatch.setattr(model.language, "generate", say)
    monkeypatch.setattr(model.language, "answer", say)
    monkeypatch.setattr(model.language, "rank", rank)
    monkeypatch.setattr(generation, "lemmatize", lambda answer: f"lemmas of {answer}")
    assert model.predict_answers(batch, num_beams=3, max_len=7, min_len=2) == ["lemmas of two cats"] * 4
    lengths = {"max_new_tokens": 7, "min_new_tokens": 2, "length_penalty": -2.0}
    assert told.pop() == {"queries": 4, "num_beams": 3, **lengths}
    model.predict_answers({"text_input": "how many ?"})
    assert told.pop()["queries"] == 0, "without an image there is no prefix, not one of nothing"
    model.predict_answers(batch, length_penalty=0.5)
    assert told.pop()["length_penalty"] == 0.5
    model.generate(batch, use_nucleus_sampling=True, num_captions=2, top_p=0.5)
    wanted = {"do_sample": True, "num_beams": 1, "num_return_sequences": 2, "top_p": 0.5}
    assert told.pop().items() >= wanted.items(), "sampling has no beams, whatever their default"
    ranked = model.predict_answers(
        batch, inference_method="rank", answer_list=["two", "a red star"], num_ans_candidates=1
    )
    assert ranked == ["two"] * 4
    assert told.pop() == {"answers": [" two", " a red star"], "candidates": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_ranking_reads_those_that_begin_likeliest(kind: str, make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2(kind, init="normal").eval()
    answers = ["a", "two"]  # which begin with two tokens in either toy
    options = {"inference_method": "rank", "answer_list": answers, "num_ans_candidates": 1}
    for image in batch["image"]:
        visual = model.projection(model.encode_queries(image[None]))
        for question in ("how many ?", "left"):
            first = {}
            for answer in answers:
                asked = model.vqa_prompt.replace("{}", question)
                logits, labels = model.language.predict(visual, [[(asked, f" {answer}")]])
                begun = logits[0, labels[0] != NO_TARGET][0]
                first[answer] = begun[labels[0][labels[0] != NO_TARGET][0]].item()
            likeliest = max(answers, key=first.__getitem__)
            assert len(set(first.values())) == 2
            samples = {"image": image[None], "text_input": question}
            assert model.predict_answers(samples, **options) == [likeliest]


def test_opt_ends_with_the_line(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt").eval()
    assert model.language.tokenizer.decode(model.language.end_id) == "\n"
    visual = model.projection(model.encode_queries(batch["image"][:1]))
    options = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_new_tokens": 9}
    whole = model.language.continue_(visual, ["a"], **options)[0].tolist()
    model.language.end_id = whole[4]  # this toy never says a line break
    ended = model.language.continue_(visual, ["a"], **options)[0].tolist()
    assert ended == whole[: whole.index(whole[4]) + 1]


def test_the_cache_is_used_and_faster(make_stage2: Any, batch: dict[str, Any], opt_folder: Path) -> None:
    ours = make_stage2("opt", "none").eval()
    theirs = blip2_opt_like(ours, opt_folder).eval()
    lengths: dict[str, list[int]] = {"ours": [], "theirs": []}
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.opt_model.model.decoder.layers[0].register_forward_pre_hook(
            lambda module, args, seen=lengths[name]: seen.append(args[0].shape[1])
        )
    seconds = []
    for model in (ours, theirs):
        start = time.perf_counter()
        model.generate(batch, num_beams=5, max_length=40, min_length=40)
        seconds.append(time.perf_counter() - start)
    print(f"40 tokens, 5 beams: {seconds[0]:.3f} s with the cache, {seconds[1]:.3f} s without")
    assert set(lengths["ours"][1:]) == {1}
    assert lengths["theirs"][-1] > 40


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_several_lengths_give_what_each_gives_alone(
    kind: str, make_stage2: Any, batch: dict[str, Any]
) -> None:
    model = make_stage2(kind, init="normal").eval()
    prompts = ["a", "Question: how many red star ? Answer:", "the red", "two blue square on the left of a"]
    together = model.generate({**batch, "prompt": prompts}, max_length=8, num_beams=2)
    alone = [
        model.generate({"image": image[None], "prompt": prompt}, max_length=8, num_beams=2)[0]
        for image, prompt in zip(batch["image"], prompts, strict=True)
    ]
    assert together == alone
    questions = {**batch, "text_input": prompts}
    templates = ["{} Answer:", "{}", "Question: {}", "{} ?"]
    asked = model.predict_answers(questions, prompt=templates, max_len=6)
    filled = [template.replace("{}", prompt) for template, prompt in zip(templates, prompts, strict=True)]
    assert asked == model.predict_answers({**batch, "text_input": filled}, prompt="", max_len=6)


@pytest.mark.parametrize(("length_penalty", "fewest"), [(-2.0, 0), (1.0, 0), (3.0, 0), (0.0, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_depends_on_no_other(
    kind: str, length_penalty: float, fewest: int, make_stage2: Any, batch: dict[str, Any]
) -> None:
    model = make_stage2(kind, init="normal").eval()
    end_early(model, batch)
    prompts = ["a", "Question: how many red star ? Answer:", "the red", "two blue square on the left of a"]
    for key, call in (
        ("prompt", partial(model.generate, max_length=12, min_length=fewest)),
        ("text_input", partial(model.predict_answers, prompt="", max_len=12, min_len=fewest)),
    ):
        alone = [
            call({"image": image[None], key: [prompt]}, length_penalty=length_penalty)[0]
            for image, prompt in zip(batch["image"], prompts, strict=True)
        ]
        assert call({**batch, key: prompts}, length_penalty=length_penalty) == alone


def test_the_question_does_not_count_in_its_answer(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt", init="normal").eval()
    asked = {**batch, "text_input": ["a", "two", "the red", "left"], "prompt": ["a", "two", "the red", "one"]}
    with mock.patch.object(model.language.model, "generate", wraps=model.language.model.generate) as spy:
        model.predict_answers(asked, max_len=2)
        model.generate(asked, max_length=2)
    counted = [call.kwargs["input_ids"].shape for call in spy.call_args_list]
    assert counted == [(4, 1), (1, 2), (2, 4), (1, 7)], "of an answer's prompt the last token alone counts"


@pytest.mark.parametrize("kind", KINDS)
def test_fewest_and_most_tokens(kind: str, make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2(kind, "none").eval()
    end_early(model, batch)
    counted: list[int] = []
    decode = model.language.tokenizer.batch_decode

    def count(ids: torch.Tensor, **options: Any) -> list[str]:
        counted.append(ids.shape[1] - (kind == "t5"))  # whose output begins with its start token
        return decode(ids, **options)

    model.language.tokenizer.batch_decode = count
    one = {"image": batch["image"][1:2], "prompt": "a", "text_input": "a"}
    for call, most, fewest in (
        (partial(model.generate, one, num_beams=1), "max_length", "min_new_tokens"),
        (partial(model.predict_answers, one, prompt="", num_beams=1), "max_len", "min_len"),
    ):
        for limits in ({most: 30}, {most: 30, fewest: 20}, {most: 2}, {most: 30, fewest: 30}):
            call(**limits)
        itself, enough, cut, exact = counted[-4:]
        assert 2 < itself < 20 <= enough
        assert (cut, exact) == (2, 30)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_have_lavis_names(kind: str, make_stage2: Any) -> None:
    model = make_stage2(kind)
    assert getattr(model, f"{kind}_model") is model.language.model
    assert getattr(model, f"{kind}_tokenizer") is model.language.tokenizer
    assert getattr(model, f"{kind}_proj") is model.projection


@pytest.mark.parametrize("kind", KINDS)
def test_dual_starts_as_blip2(kind: str, make_stage2: Any, batch: dict[str, Any]) -> None:
    dual, blip2 = make_stage2(kind, "dual").eval(), make_stage2(kind, "none").eval()
    blip2.load_state_dict({k: v for k, v in dual.state_dict().items() if not k.startswith(("fusion", "mae"))})
    assert torch.equal(dual(batch)["loss"], blip2(batch)["loss"])
    assert dual.generate(batch, num_beams=2) == blip2.generate(batch, num_beams=2)
    features = [model.extract_features(batch).image_embeds for model in (dual, blip2)]
    assert torch.equal(*features)
    assert features[0].shape == (4, 4, 32)
    assert not features[0].requires_grad


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(
    kind: str, fusion: str, make_stage2: Any, batch: dict[str, Any]
) -> None:
    model = make_stage2(kind, fusion, init="normal")
    model.train()
    model(batch)["loss"].backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n in trained if model.get_parameter(n).grad is None] == []
    frozen = ("visual_encoder", "mae.", f"{kind}_model")
    assert not [n for n in trained if n.startswith(frozen)]
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith(frozen))
    for tower in (model.visual_encoder, model.language.model):
        assert not any(module.training for module in tower.modules())
    assert model.Qformer.training


@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_one(kind: str, make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2(kind)
    one = {"image": batch["image"][:1], "text_input": batch["text_input"][:1]}
    output = model(one)
    output["loss"].backward()
    assert all(value.ndim == 0 and torch.isfinite(value) for value in output.values())
    assert len(model.generate(one, num_beams=2, max_length=4)) == 1
    assert len(model.predict_answers(one, max_len=4)) == 1


def test_the_question_bears_no_loss_and_the_answer_does(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt", vqa_prompt="Question: {} Answer:").eval()
    ids, mask, labels = model.language.encode([[("Question: a? Answer:", " red")], [("Q", " two stars")]])
    for row, text in enumerate([" red\n", " two stars\n"]):
        assert model.language.tokenizer.decode(labels[row][labels[row] != -100]) == text
        assert (mask[row] == (ids[row] != 1)).all()
    one = {"image": batch["image"][:2], "text_input": ["how many?", "left?"], "answer": ["two", "red"]}
    other = {**one, "text_input": ["how many?", "left?"], "answer": ["two", "blue"]}
    assert model(one)["loss"] != model(other)["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_has_a_weight(kind: str, make_stage2: Any, batch: dict[str, Any]) -> None:
    asked = {"image": batch["image"][:2], "text_input": ["how many ?"] * 2, "answer": ["two", "2", "star"]}
    asked |= {"n_answers": torch.tensor([2, 1]), "weight": torch.tensor([1.0, 0.5])}
    with pytest.raises(UserError, match=r"samples\['weight'\] has 2 entries for 3 answers"):
        make_stage2(kind)(asked)


def test_answers_of_lavis_vqa_datasets_are_weighted(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt").eval()
    samples = {
        "image": batch["image"][:2],
        "text_input": ["how many?", "left?"],
        "answer": ["two", "2", "star"],
        "n_answers": torch.tensor([2, 1]),
        "weight": torch.tensor([0.75, 0.25, 1.0]),
    }
    loss = model(samples)["loss"]
    total = counted = 0.0
    for i, answer, weight in ((0, "two", 0.75), (0, "2", 0.25), (1, "star", 1.0)):
        one = {"image": batch["image"][i : i + 1], "text_input": [samples["text_input"][i]], "answer": [answer]}
        tokens = len(model.language.tokenizer(f" {answer}\n", add_special_tokens=False).input_ids)
        total, counted = total + weight * tokens * model(one)["loss"], counted + weight * tokens
    assert torch.allclose(loss, total / counted, atol=1e-5)
    with pytest.raises(UserError, match="3 answers to 2 questions"):
        model({**samples, "n_answers": torch.tensor([1, 1])})
    assert torch.equal(model({**samples, "n_answers": [2, 1], "weight": [0.75, 0.25, 1.0]})["loss"], loss)
    with pytest.raises(UserError, match="has no answers"):
        model({**samples, "answer": [], "n_answers": torch.tensor([0, 0])})


def test_one_answer_may_be_for_all_and_none_is_a_caption(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt").eval()
    asked = {"image": batch["image"][:2], "text_input": "a star?"}
    assert torch.equal(model({**asked, "answer": "no"})["loss"], model({**asked, "answer": ["no", "no"]})["loss"])
    asked["text_input"] = ["a star", "a dog"]
    assert torch.equal(model({**asked, "answer": None})["loss"], model(asked)["loss"])


def test_a_dialogue_reads_its_image_and_earlier_turns_once(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt", init="normal", vqa_prompt="Question: {} Answer:").eval()
    one = {"image": batch["image"][:1], "text_input": [["how many?", "left?"]], "answer": [["two", "red star"]]}
    tokenizer = model.language.tokenizer
    turns = [("Question: how many? Answer:", " two"), ("Question: left? Answer:", " red")]
    ids, _, labels = model.language.encode([turns])
    assert tokenizer.decode(ids[0]) == "</s>Question: how many? Answer: two\nQuestion: left? Answer: red\n"
    assert tokenizer.decode(labels[0][labels[0] != -100]) == " two\n red\n"
    first, second = (len(tokenizer(f" {answer}\n", add_special_tokens=False).input_ids) for answer in one["answer"][0])
    alone = model({**one, "text_input": ["how many?"], "answer": ["two"]})["loss"]
    told = "how many? Answer: two\nQuestion: left?"
    after = model({**one, "text_input": [told], "answer": ["red star"]})["loss"]
    assert torch.allclose(model(one)["loss"], (first * alone + second * after) / (first + second), atol=1e-5)


def test_t5_answers_every_turn_of_a_dialogue_by_itself(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("t5", init="normal").eval()
    mixed = {"text_input": [["how many?", "left?"], "where?"], "answer": [["two", "red star"], "left"]}
    apart = {"text_input": ["how many?", "left?", "where?"], "answer": ["two", "red star", "left"]}
    images, weights = batch["image"][[0, 0, 1]], {"weight": torch.tensor([0.5, 2.0])}
    assert torch.allclose(
        model({"image": batch["image"][:2], **mixed, **weights})["loss"],
        model({"image": images, **apart, "weight": torch.tensor([0.5, 0.5, 2.0])})["loss"],
        atol=1e-6,
    )
    even = model({"image": images, **apart})["loss"]
    assert not torch.allclose(model({"image": batch["image"][:2], **mixed, **weights})["loss"], even, atol=1e-3)


@pytest.mark.parametrize("answer", ["two", ["two"], []])
def test_a_dialogue_needs_an_answer_to_every_question(answer: Any, make_stage2: Any, batch: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="a list of questions needs a list of as many answers"):
        make_stage2("opt")({"image": batch["image"][:1], "text_input": [["a?", "b?"]], "answer": [answer]})


def test_a_long_question_keeps_its_answer_and_a_long_answer_is_cut(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt")
    _, _, labels = model.language.encode([[("is it?", " red star" * 9)]])
    assert int((labels != NO_TARGET).sum()) == model.language.max_txt_len - 1 == 23  # </s> is the other, as in LAVIS
    samples = {"image": batch["image"][:1], "text_input": ["is a red star on it " * 2], "answer": ["two"]}
    assert torch.isfinite(model(samples)["loss"])
    with pytest.raises(UserError, match="opt_model reads at most 96"):
        model({**samples, "text_input": ["is a red star on it " * 9]})


def test_t5_reads_a_long_question_to_its_end_and_cuts_a_long_answer(make_stage2: Any) -> None:
    language = make_stage2("t5").language
    _, labels = language.predict(torch.zeros(1, 2, 32), [[("red", " star" * 40)]])
    assert labels.shape[1] == language.max_txt_len == 24
    ends = [
        language.predict(torch.zeros(1, 2, 32), [[("red " * 40 + end, " two")]])[0] for end in ("star", "blue square")
    ]
    assert not torch.allclose(*ends)


def test_reconstruction_in_both_stages(make_stage2: Any, batch: dict[str, Any]) -> None:
    noise = torch.rand(4, 16)
    plain = make_stage2("opt", init="normal")(batch)
    both = make_stage2("opt", init="normal", loss_weights={"rec": 2.0})(batch, noise=noise)
    assert set(plain) == {"loss", "loss_lm"}
    model = make_stage2("opt", init="normal", loss_weights={"rec": 2.0})
    runs: list[int] = []
    model.visual_encoder.register_forward_hook(lambda *_: runs.append(1))
    assert torch.equal(model(batch, noise=noise)["loss_rec"], both["loss_rec"])
    assert len(runs) == 1, "CLIP runs once"
    assert torch.equal(both["loss_lm"], plain["loss_lm"]), "the language model still sees the whole image"
    assert both["loss"].item() == pytest.approx((both["loss_lm"] + 2 * both["loss_rec"]).item(), rel=1e-6)
    model.mask_ratio = 0.75
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # Z' far from Zq
    seen = model.encode_image(batch["image"], mask_ratio=0.75, noise=noise)
    zq = model.query_image(seen.clip).last_hidden_state
    expected = model.reconstruction_loss(model.fusion.align(seen.mae_tokens, zq), seen)  # M' = CA1(M, Zq)
    assert torch.allclose(model(batch, noise=noise)["loss_rec"], expected, atol=1e-6)


def test_packed_and_plain_images_give_the_same(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt", init="normal").eval()
    packed = {**batch, "image": torch.cat([batch["image"], clip_to_mae(batch["image"])], dim=1)}
    assert torch.allclose(model(packed)["loss"], model(batch)["loss"], atol=1e-6)


def test_bad_input_is_one_clear_line(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt").eval()

    def refused(words: str, call: Any = model.generate, **changes: Any) -> None:
        with pytest.raises(UserError, match=words):
            call({**batch, **changes})

    refused(r"samples\['prompt'\] is empty", prompt=[])
    refused("has 2 strings for 4 images", prompt=["a", "the"])
    refused("must be a string or a list of strings", prompt=[1, 2, 3, 4])
    refused(r"samples\['text_input'\] is missing; given: \['image', 'image_id'\]", model, text_input=None)
    for call in (model, model.generate, model.predict_answers, model.extract_features):
        with pytest.raises(UserError, match="samples is a Tensor; give a dict"):
            call(batch["image"])
    refused("has 1 strings for 4 images", call=model, text_input=["a"])
    refused(r"image has shape \(0, 3, 32, 32\)", image=torch.zeros(0, 3, 32, 32))
    refused(r"image has shape \(4, 3, 0, 0\)", image=torch.zeros(4, 3, 0, 0))
    refused(r"image has shape \(4, 1, 32, 32\)", image=torch.zeros(4, 1, 32, 32))
    refused(r"image has shape \(3, 32, 32\)", image=torch.zeros(3, 32, 32))
    refused("is a list, not a float tensor", image=[1])
    refused("take 101 tokens, but model.opt_model reads at most 96", partial(model.generate, max_length=96))
    with pytest.raises(UserError, match="'ranks'; did you mean 'rank'"):
        model.predict_answers(batch, inference_method="ranks")
    for answers in (None, [], ["a", ""]):
        with pytest.raises(UserError, match="chooses from answer_list"):
            model.predict_answers(batch, inference_method="rank", answer_list=answers)
    with pytest.raises(UserError, match="num_captions is 2, num_beams 1"):
        model.generate(batch, num_beams=1, num_captions=2)
    with pytest.raises(UserError, match="xformer_feature_extractor"):
        model.extract_features(batch, mode="text")
    with pytest.raises(UserError, match=r"model\.loss_weights: 'itc'"):
        make_stage2("opt", loss_weights={"itc": 1})
    with pytest.raises(UserError, match="mask_ratio is 1"):
        make_stage2("opt", mask_ratio=1)
    with pytest.raises(UserError, match=r"model\.vqa_prompt: 'Answer:' has no \{\}"):
        make_stage2("opt", vqa_prompt="Answer:")
    for name, text in (("prompt", 5), ("vqa_prompt", ["{}"])):
        with pytest.raises(UserError, match=rf"model\.{name} is .*; it must be text: quote it"):
            make_stage2("opt", **{name: text})
    with pytest.raises(UserError, match=r"prompt: 'Question: \{question\}' has no \{\}, where the question goes"):
        model.predict_answers(batch, prompt="Question: {question}")


@pytest.mark.parametrize(
    ("method", "argument", "value", "right"),
    [
        ("generate", "num_captions", 0, "whole number, 1 or more"),
        ("generate", "num_beams", 0, "whole number, 1 or more"),
        ("generate", "max_length", 2.5, "whole number, 1 or more"),
        ("generate", "min_length", -1, "whole number, 0 or more"),
        ("generate", "min_new_tokens", -1, "whole number, 0 or more"),
        ("generate", "top_p", 0.0, "number above 0"),
        ("generate", "top_p", 1.5, "probability, at most 1"),
        ("generate", "temperature", "1", "number above 0"),
        ("generate", "repetition_penalty", float("nan"), "number above 0"),
        ("predict_answers", "num_beams", None, "whole number, 1 or more"),
        ("predict_answers", "max_len", 0, "whole number, 1 or more"),
        ("predict_answers", "min_len", -1, "whole number, 0 or more"),
        ("predict_answers", "num_ans_candidates", 0, "whole number, 1 or more"),
    ],
)
def test_a_number_that_makes_no_sense_is_named(
    method: str, argument: str, value: Any, right: str, make_stage2: Any, batch: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=f"^{argument} is {value!r}; it must be a {right}$"):
        getattr(make_stage2("opt"), method)(batch, **{argument: value})


@pytest.mark.parametrize("kind", KINDS)
def test_a_min_length_beyond_reach_is_refused(kind: str, make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2(kind)
    with pytest.raises(UserError, match="min_length is 7, but at most 6 tokens count"):  # </s> or T5's start, and 5
        model.generate(batch, max_length=5, min_length=7)
    assert len(model.generate(batch, max_length=5, min_length=6)) == 4
    for ask in (
        partial(model.generate, max_length=5, min_new_tokens=6),
        partial(model.predict_answers, max_len=5, min_len=6),
    ):
        with pytest.raises(UserError, match=r"min_(new_tokens|len) is 6, (but at most|max_len only) 5"):
            ask(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_lavis_own_tasks_ask_it(kind: str, make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2(kind).eval()
    vqa = VQATask(
        num_beams=2,
        max_len=4,
        min_len=1,
        evaluate=True,
        num_ans_candidates=8,
        inference_method="generate",
        prompt="Question: {} Short answer:",
    )
    asked = vqa.valid_step(model, {**batch, "question_id": torch.tensor([5, 6, 7, 8])})
    assert [answer["question_id"] for answer in asked] == [5, 6, 7, 8]
    captioning = CaptionTask(num_beams=2, max_len=4, min_len=1, evaluate=True)
    assert [caption["image_id"] for caption in captioning.valid_step(model, batch)] == [0, 1, 2, 3]
    assert vqa.train_step(model, batch).requires_grad


def test_lemmas_need_spacys_model() -> None:
    if is_package(SPACY_MODEL):
        assert lemmatize("two cats") == "two cat"
        return
    with pytest.raises(UserError, match="python -m spacy download en_core_web_sm"):
        lemmatize("two cats")


def test_captions_are_learned_by_heart(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(30):
        loss = model(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.75 * history[0]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_never_mixes_dtypes(
    kind: str, precision: str, make_stage2: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens on a GPU, on a CPU: frozen parts in half precision, the trained ones in fp32."""
    model = make_stage2(kind, init="normal")
    reference = model(batch)["loss"].item()
    monkeypatch.setattr(frozen, "compute_dtype", lambda device, name: DTYPES[precision])
    for outside in (False, True):  # as the runner does with run.amp
        with torch.autocast("cpu", dtype=DTYPES[precision], enabled=outside):
            loss = model(batch)["loss"]
        assert loss.item() == pytest.approx(reference, rel=0.05)
        loss.backward()
    assert model.language.model.dtype == DTYPES[precision]
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert len(model.generate(batch, num_beams=2, max_length=4)) == 4
    monkeypatch.undo()
    assert len(model.generate(batch, num_beams=2, max_length=4)) == 4, "and back to a CPU's fp32"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_stored_in_half_precision_run_on_a_cpu(
    kind: str, make_stage2: Any, batch: dict[str, Any], opt_folder: Path, t5_folder: Path, tmp_path: Path
) -> None:
    model = make_stage2(kind)
    model.language.model.half().save_pretrained(tmp_path)
    model.language.tokenizer.save_pretrained(tmp_path)
    stored = type(model.language).from_source(str(tmp_path))
    assert stored.model.dtype == torch.float16
    visual = torch.zeros(1, 2, stored.width)
    assert torch.isfinite(stored.loss(visual, [[("a", "star")]]))
    assert stored.model.dtype == torch.float32


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_loss_of_two_processes_is_that_of_the_joined_batch(
    kind: str, weighted: bool, make_stage2: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_stage2(kind).eval()
    texts = ["a", "two blue squares on the left", "three green star", "one red star above"]
    joined = {"image": batch["image"], "text_input": texts}
    if weighted:
        joined = {**joined, "text_input": ["what?"] * 4, "answer": texts, "weight": torch.tensor([1.0, 0.5, 0.1, 2])}
    parts = [{name: value[rows] for name, value in joined.items()} for rows in (slice(0, 1), slice(1, 4))]
    tokens: list[torch.Tensor] = []
    monkeypatch.setattr("lavis_xformer.distributed.gather", lambda own: tokens.append(own) or own)
    expected, *_ = [model(part)["loss_lm"] for part in (joined, *parts)]
    assert not torch.equal(tokens[1], tokens[2])
    monkeypatch.setattr("lavis_xformer.distributed.gather", lambda own: torch.cat(tokens[1:]))
    assert torch.stack([model(part)["loss_lm"] for part in parts]).mean().item() == pytest.approx(expected.item(), 1e-5)


def test_lengths_and_penalties_that_make_no_sense_are_named(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt").eval()
    samples = {"image": batch["image"], "text_input": "how many?"}
    with pytest.raises(UserError, match="min_len is 11, max_len only 10"):
        model.predict_answers(samples, min_len=11)
    for penalty in ("1", float("nan")):
        for ask in (model.generate, model.predict_answers):
            with pytest.raises(UserError, match=r"length_penalty is .*; it must be a finite number"):
                ask(samples, length_penalty=penalty)


@pytest.mark.parametrize(("kept", "now"), [("gated-gelu", "gelu"), ("relu", "relu"), ("gated-silu", "silu")])
def test_only_flan_t5s_activation_is_laviss(kept: str, now: str, t5_folder: Path, tmp_path: Path) -> None:
    model = T5ForConditionalGeneration.from_pretrained(t5_folder)
    sizes = {key: value for key, value in model.config.to_dict().items() if key not in ("dense_act_fn", "is_gated_act")}
    config = T5Config(**{**sizes, "feed_forward_proj": kept})
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((t5_folder / "tokenizer.json").read_bytes())
    assert T5Language.from_source(str(tmp_path)).model.config.dense_act_fn == now


def test_no_penalty_is_told_too(make_stage2: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = make_stage2("t5").eval(), []
    monkeypatch.setattr(model.language, "answer", lambda *given, **options: told.append(options) or ["a"] * 4)
    model.predict_answers(batch, length_penalty=0)
    assert told[0]["length_penalty"] == 0, "and not T5's own, -1"


def test_a_prompt_counts_in_the_fewest_tokens_that_can_be_reached(make_stage2: Any) -> None:
    language = make_stage2("opt").language
    options = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_new_tokens": 3}
    visual = torch.zeros(1, 2, language.width)
    most = 3 + len(language.tokenizer("a red circle").input_ids)
    assert len(language.generate(visual, ["a red circle"], min_length=most, **options)) == 1
    with pytest.raises(UserError, match=rf"min_length is {most + 1}, but at most {most} tokens count"):
        language.generate(visual, ["a red circle"], min_length=most + 1, **options)
