"""What stage 2 learns to say: prompts and targets, from a batch's captions, or from its questions and answers.

B: images, A: texts (as many as images, or several answers for each).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lavis_xformer.errors import UserError, template
from lavis_xformer.models.language import Dialogue
from lavis_xformer.models.samples import one_per_image, take, texts_of


class Prompts(NamedTuple):
    """What precedes captions and answers."""

    caption: str  #: before every caption
    answer: str  #: before every answer; ``{}`` stands for the question
    splits: bool = False  #: move a random beginning of each caption into its prompt, see :func:`split`


class Texts(NamedTuple):
    """Prompts and targets of the language model: A dialogues, most of them of one turn."""

    dialogues: Sequence[Dialogue]
    weights: Tensor | None = None  #: (A,)
    images: Tensor | None = None  #: (A,) the image of each text; None if each has its own


def texts_to_learn(samples: Mapping[str, Any], prompts: Prompts, generator: torch.Generator | None = None) -> Texts:
    """Return the prompts, which are excluded from the loss, and the targets of a batch.

    Args:
        samples: as in ``XFormerStage2.forward``.
        prompts: what precedes captions and answers.
        generator: decides where captions are split.

    Raises:
        UserError: texts that don't fit the images, or questions (``question_id``) without answers.
    """
    answers = samples.get("answer")
    if "question_id" in samples and None in ([None] if answers is None else list(answers)):
        raise UserError("samples['question_id']: questions without answers, which can't be scored; leave them out")
    if answers is not None and "text_output" not in samples:
        return _answers(samples, prompts, generator)
    count = len(samples["image"])
    texts = texts_of(samples, count)
    if "text_output" in samples:
        said = one_per_image(samples["text_output"], count, name="samples['text_output']")
        return Texts([[(text, spaced(text, target))] for text, target in zip(texts, said, strict=True)])
    return Texts([[_caption(text, prompts, generator)] for text in texts])


def _caption(text: str, prompts: Prompts, generator: torch.Generator | None) -> tuple[str, str]:
    """A caption's prompt and target."""
    caption = continuation(prompts.caption, text)
    return split(prompts.caption, caption, generator) if prompts.splits else (prompts.caption, caption)


def _answers(samples: Mapping[str, Any], prompts: Prompts, generator: torch.Generator | None) -> Texts:
    """B questions, or lists of them, with A answers."""
    count, questions = len(samples["image"]), take(samples, "text_input")
    if not (isinstance(questions, list) and any(isinstance(question, list) for question in questions)):
        questions = one_per_image(questions, count, name="samples['text_input']")
    each = samples.get("n_answers")
    each = torch.ones(len(questions), dtype=torch.long) if each is None else torch.as_tensor(each).cpu()
    answers = samples["answer"]
    answers = [answers] * len(questions) if isinstance(answers, str) else answers  # one for all, as a question may be
    if not answers:
        raise UserError("samples['answer'] has no answers")
    if not len(each) == len(questions) == count or int(each.sum()) != len(answers):
        raise UserError(
            f"samples['answer'] has {len(answers)} answers to {len(questions)} questions about {count} images; "
            "samples['n_answers'] must say how many belong to each"
        )
    weights = samples.get("weight")
    weights = None if weights is None else torch.as_tensor(weights)
    if weights is not None and len(weights) != len(answers):
        raise UserError(f"samples['weight'] has {len(weights)} entries for {len(answers)} answers; give one for each")
    images = torch.arange(len(questions)).repeat_interleave(each)  # (A,)
    asked = [questions[i] for i in images.tolist()]
    dialogues = [_dialogue(*turns, prompts, generator) for turns in zip(asked, answers, strict=True)]
    return Texts(dialogues, weights=weights, images=images)


def _dialogue(
    questions: str | Sequence[str], answers: str | Sequence[str], prompts: Prompts, generator: torch.Generator | None
) -> Dialogue:
    """Question and answer, or several of each, as prompts and targets."""
    if isinstance(questions, str) and isinstance(answers, str):
        questions, answers = [questions], [answers]
    elif isinstance(questions, str) or isinstance(answers, str) or not len(questions) == len(answers) > 0:
        raise UserError(
            f"samples['answer']: {answers!r:.80} does not answer {questions!r:.80}; a list of questions needs a "
            "list of as many answers"
        )
    return [
        (ask(prompts.answer, question), f" {answer}") if question else _caption(answer, prompts, generator)
        for question, answer in zip(questions, answers, strict=True)
    ]


def ask(prompt: str, question: str) -> str:
    """Put the question where the prompt says ``{}``; an empty prompt is the bare question.

    Raises:
        UserError: the prompt has no place for the question.
    """
    return template("prompt", prompt).replace("{}", question) or question


def continuation(prompt: str, caption: str) -> str:
    """The caption as it follows the prompt, which the text processor may already have prepended, as whole words."""
    rest = caption.removeprefix(prompt)
    within_word = (prompt[-1:] + rest[:1]).isascii() and prompt[-1:].isalnum() and rest[:1].isalnum()
    prepended = caption.startswith(prompt) and not within_word
    return rest if prepended else spaced(prompt, caption)


def spaced(before: str, after: str) -> str:
    """``after`` as it follows ``before``: with a space between them if neither has one."""
    joined = not before or before[-1].isspace() or not after or after[0].isspace()
    return after if joined else f" {after}"


def split(prompt: str, caption: str, generator: torch.Generator | None = None) -> tuple[str, str]:
    """Move a random number of the caption's words, but not all, to the prompt.

    Prefix language modelling, with which BLIP-2 trains encoder-decoder models (arXiv 2301.12597, section 3.3, which
    doesn't say where it splits).
    """
    said = caption.lstrip(" ")
    words, space = said.split(" "), caption.removesuffix(said)
    cut = int(torch.randint(len(words), (), generator=generator))
    if not cut:
        return prompt, caption
    return f"{prompt}{space}{' '.join(words[:cut])}", f" {' '.join(words[cut:])}"
