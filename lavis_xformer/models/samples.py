"""A model's input, checked where it is used: a dict of images and texts, and the numbers of a generation."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from lavis_xformer.errors import UserError, whole


def take(samples: Any, key: str) -> Any:
    """The value of a key of the samples.

    Raises:
        UserError: the samples are not a dict, or lack the key.
    """
    if not isinstance(samples, Mapping):
        raise UserError(f"samples is a {type(samples).__name__}; give a dict such as {{'image': images}}")
    if samples.get(key) is None:
        there = [name for name, value in samples.items() if value is not None]
        raise UserError(f"samples['{key}'] is missing; given: {there}")
    return samples[key]


def one_per_image(text: Any, count: int, *, name: str) -> list[str]:
    """One string for all images, or one for each -> a list of ``count`` strings.

    Raises:
        UserError: the text is anything else; ``name`` names it in the message.
    """
    texts = [text] * count if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not all(isinstance(entry, str) for entry in texts):
        raise UserError(f"{name} must be a string or a list of strings, not {text!r:.80}")
    if not texts:
        raise UserError(f"{name} is empty; give one string, or one for each of the {count} images")
    if len(texts) != count:
        raise UserError(f"{name} has {len(texts)} strings for {count} images; give one, or one for each image")
    return list(texts)


def texts_of(samples: Any, count: int | None = None) -> list[str]:
    """``samples['text_input']`` as a list of ``count`` strings, one for each image; of any number if None.

    Raises:
        UserError: it is missing, or doesn't fit.
    """
    texts = take(samples, "text_input")
    if count is None:
        count = len(texts) if isinstance(texts, list | tuple) else 1
    return one_per_image(texts, count, name="samples['text_input']")


def check_whole(least: int, **numbers: Any) -> None:
    """Refuse what is no whole number, or less than the least."""
    for name, number in numbers.items():
        whole(name, number, least=least)


def check_order(low: str, least: int, high: str, most: int) -> None:
    """Refuse a least length above the most."""
    if least > most:
        raise UserError(f"{low} is {least}, {high} only {most}; lower one or raise the other")


def check_sampling(**numbers: Any) -> None:
    """Refuse what is no number above 0, and a probability ``top_p`` above 1."""
    for name, number in numbers.items():
        if not isinstance(number, Real) or not float(number) > 0:
            raise UserError(f"{name} is {number!r}; it must be a number above 0")
    if numbers["top_p"] > 1:
        raise UserError(f"top_p is {numbers['top_p']}; it must be a probability, at most 1")
