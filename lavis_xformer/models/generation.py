"""What a stage-2 model says: captions and answers, under the names and arguments of LAVIS's BLIP-2.

B: images, Q: queries, D: width of the Q-Former, L: width of the language model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from lavis.models.blip_models.blip_outputs import BlipOutputFeatures
from torch import Tensor, nn

from lavis_xformer.errors import UserError, number, one_of, template, text
from lavis_xformer.models.base import XFormerBase
from lavis_xformer.models.language import LanguageModel
from lavis_xformer.models.samples import check_order, check_sampling, check_whole, one_per_image, take
from lavis_xformer.models.texts import ask

METHODS = ("generate", "rank")  # of answering
SPACY_MODEL = "en_core_web_sm"


class GenerativeModel(XFormerBase):
    """Z' through one linear layer is the prefix of a frozen language model; MAE sees the whole image."""

    def __init__(
        self,
        *,
        language: LanguageModel,
        prompt: str = "",
        vqa_prompt: str = "Question: {} Short answer:",
        vqa_length_penalty: float | None = None,
        apply_lemmatizer: bool = False,
        **parts: Any,
    ) -> None:
        """Put the language model behind the shared parts, without the Q-Former's text branch.

        Parts have LAVIS's names: ``opt_model``, ``opt_proj`` and ``opt_tokenizer``, or those of ``t5``.

        Args:
            language: frozen.
            prompt: before every caption.
            vqa_prompt: before every answer; ``{}`` stands for the question.
            vqa_length_penalty: of answers; LAVIS's (0 for OPT, -1 for T5) where it is None.
            apply_lemmatizer: answer in base forms of nouns and verbs, as LAVIS does for OK-VQA.
            parts: of :class:`XFormerBase`.

        Raises:
            UserError: a prompt is not text, or has no place for the question.
        """
        super().__init__(**parts)
        text("model.prompt", prompt)
        template("model.vqa_prompt", vqa_prompt)
        self.drop_text_branch()
        self._language = language
        self.max_txt_len = language.max_txt_len
        self.add_module(f"{language.kind}_model", language.model)
        setattr(self, f"{language.kind}_tokenizer", language.tokenizer)
        self.add_module(f"{language.kind}_proj", nn.Linear(self.Qformer.config.hidden_size, language.width))
        self.prompt = prompt
        self.vqa_prompt = vqa_prompt
        self.vqa_length_penalty = language.DEFAULT_LENGTH_PENALTY if vqa_length_penalty is None else vqa_length_penalty
        self.apply_lemmatizer = apply_lemmatizer

    @property
    def language(self) -> LanguageModel:
        """The language model; as in LAVIS, what is assigned to ``opt_model`` or its like and ``max_txt_len`` counts."""
        language = self._language
        language.model = getattr(self, f"{language.kind}_model")
        language.tokenizer = getattr(self, f"{language.kind}_tokenizer")
        language.max_txt_len = self.max_txt_len
        return language

    @property
    def projection(self) -> nn.Linear:
        """From Z' to the language model: ``opt_proj`` or ``t5_proj``."""
        return getattr(self, f"{self._language.kind}_proj")

    @torch.no_grad()
    def generate(
        self,
        samples: dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
        min_new_tokens: int | None = None,
    ) -> list[str]:
        """Caption images, or continue a prompt about them: B * ``num_captions`` texts, those of an image side by side.

        Args:
            samples: ``image`` (B, 3 or 6, S, S); ``prompt``, a string or one for each image, may replace the model's.
            use_nucleus_sampling: sample instead of searching with beams, by ``top_p`` and ``temperature``.
            num_beams: 1 means greedy.
            max_length: most tokens that are generated.
            min_length: fewest tokens; as in LAVIS, OPT counts those of the text's own prompt too, here and in the two
                penalties.
            top_p: probability mass that sampling keeps.
            repetition_penalty: 1 means none.
            length_penalty: of beam search; above 0 favours long texts.
            num_captions: texts per image.
            temperature: of sampling.
            min_new_tokens: fewest tokens that are generated.

        Raises:
            UserError: prompts that don't fit the images, more captions than beams, or a number that makes no sense.
        """
        check_whole(1, num_beams=num_beams, max_length=max_length, num_captions=num_captions)
        check_whole(0, min_length=min_length, min_new_tokens=min_new_tokens or 0)
        check_sampling(top_p=top_p, repetition_penalty=repetition_penalty, temperature=temperature)
        if not use_nucleus_sampling and num_captions > num_beams:
            raise UserError(f"num_captions is {num_captions}, num_beams {num_beams}; take more beams, or sample")
        prefix = self.projection(self.encode_queries(take(samples, "image")))  # (B, Q, L)
        return self.language.generate(
            prefix,
            one_per_image(samples.get("prompt", self.prompt), len(prefix), name="samples['prompt']"),
            do_sample=use_nucleus_sampling,
            num_beams=1 if use_nucleus_sampling else num_beams,
            max_new_tokens=max_length,
            min_length=min_length,
            min_new_tokens=min_new_tokens,
            top_p=top_p,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            length_penalty=number("length_penalty", length_penalty),
            num_return_sequences=num_captions,
        )

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict[str, Any],
        num_beams: int = 5,
        inference_method: str = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: Sequence[str] | None = None,
        prompt: str | Sequence[str] | None = None,
        length_penalty: float | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Answer B questions about images; the signature of LAVIS's ``Blip2T5`` and of its main branch.

        Args:
            samples: ``image`` (B, 3 or 6, S, S) and ``text_input``, B questions or one for all. Without ``image`` the
                language model answers alone, the baseline of what needs no image.
            num_beams: 1 means greedy.
            inference_method: ``generate``, or ``rank``: choose from ``answer_list``, as LAVIS's ``blip_vqa`` does.
            max_len: most tokens of a generated answer.
            min_len: fewest tokens of a generated answer.
            num_ans_candidates: how many answers, those that begin likeliest, are ranked whole.
            answer_list: what to choose from.
            prompt: in which ``{}`` stands for the question, or one for each image; "" asks the bare question, as in
                LAVIS; None takes the model's ``vqa_prompt``.
            length_penalty: of beam search, which counts the answer, not the question; None takes the model's
                ``vqa_length_penalty``.
            kwargs: what other tasks of LAVIS pass.

        Raises:
            UserError: questions or prompts that don't fit the images, nothing to rank, or a value that makes no sense.
        """
        check_whole(1, num_beams=num_beams, max_len=max_len, num_ans_candidates=num_ans_candidates)
        check_whole(0, min_len=min_len)
        check_order("min_len", min_len, "max_len", max_len)
        penalty = number("length_penalty", self.vqa_length_penalty if length_penalty is None else length_penalty)
        one_of("run.inference_method", inference_method, METHODS)
        prefix, asked = self._ask(samples, prompt)
        if inference_method == "rank":
            return self._rank(prefix, asked, answer_list, num_ans_candidates)
        answers = self.language.answer(
            prefix,
            asked,
            num_beams=num_beams,
            max_new_tokens=max_len,
            min_new_tokens=min_len,
            length_penalty=penalty,
        )
        return [lemmatize(answer) for answer in answers] if self.apply_lemmatizer else answers

    def _ask(self, samples: dict[str, Any], prompt: str | Sequence[str] | None) -> tuple[Tensor, list[str]]:
        """Prefixes (B, Q, L), of no queries where there are no images, and the questions in their prompts."""
        questions = take(samples, "text_input")
        if "image" in samples:
            prefix = self.projection(self.encode_queries(samples["image"]))  # (B, Q, L)
        else:
            count = len(questions) if isinstance(questions, list | tuple) else 1
            prefix = torch.zeros(count, 0, self.language.width, device=self.device)
        questions = one_per_image(questions, len(prefix), name="samples['text_input']")
        prompts = one_per_image(self.vqa_prompt if prompt is None else prompt, len(prefix), name="prompt")
        return prefix, [ask(one, question) for one, question in zip(prompts, questions, strict=True)]

    def _rank(self, prefix: Tensor, asked: list[str], answers: Sequence[str] | None, candidates: int) -> list[str]:
        """Choose an answer for each of B prefixes (B, Q, L)."""
        if answers is None or isinstance(answers, str) or not len(answers) or not all(answers):
            raise UserError(
                "run.inference_method: 'rank' chooses from answer_list, a list of texts; it is missing, a single text, "
                "or has an empty answer"
            )
        said = [f" {answer}" for answer in answers]  # as in training
        return [text.strip() for text in self.language.rank(prefix, asked, said, candidates=candidates)]

    @torch.no_grad()
    def extract_features(self, samples: dict[str, Any], mode: str = "image") -> BlipOutputFeatures:
        """Features of images.

        Args:
            samples: ``image`` (B, 3 or 6, S, S).
            mode: ``image``: ``image_embeds`` (B, Q, D), which is Z', and ``image_embeds_proj`` (B, Q, L), the prefix.

        Raises:
            UserError: another mode; stage 2 has no text branch.
        """
        if mode != "image":
            raise UserError(f"mode: stage 2 has no features '{mode}', only 'image'; use xformer_feature_extractor")
        z = self.encode_queries(take(samples, "image"))
        return BlipOutputFeatures(image_embeds=z, image_embeds_proj=self.projection(z))


def lemmatize(answer: str) -> str:
    """Bring nouns and verbs to their base forms, as LAVIS does.

    Raises:
        UserError: spaCy's English model is not installed.
    """
    words = english()(answer)
    return " ".join(word.lemma_ if word.pos_ in ("NOUN", "VERB") else word.text for word in words)


@functools.cache
def english() -> Any:
    """SpaCy's English model, which finds lemmas.

    Raises:
        UserError: it is not installed.
    """
    import spacy  # LAVIS brings it

    try:
        return spacy.load(SPACY_MODEL)
    except OSError as error:
        raise UserError(
            f"model.apply_lemmatizer needs spaCy's {SPACY_MODEL}: python -m spacy download {SPACY_MODEL}, "
            "or set it to False"
        ) from error
