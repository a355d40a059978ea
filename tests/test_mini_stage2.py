"""The shipped mini language model behind X-Former, as a fresh install has it: offline, on a CPU."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from PIL import Image

import lavis_xformer
from lavis_xformer.errors import UserError


@pytest.fixture(scope="module")
def loaded() -> Any:
    return lavis_xformer.load_model_and_preprocess("xformer_opt", is_eval=True)


def test_it_says_something_about_any_image(loaded: Any) -> None:
    model, vis, _ = loaded
    for mode, size in (("RGB", (64, 64)), ("L", (80, 30)), ("RGBA", (7, 300))):
        image = vis["eval"](Image.new(mode, size)).unsqueeze(0)
        captions = model.generate({"image": image}, num_captions=2)
        assert len(captions) == 2
        assert all(isinstance(text, str) and text for text in captions)
        answers = model.predict_answers({"image": image, "text_input": ["how many objects are there?"]})
        assert len(answers) == 1


def test_images_without_pixels_are_refused(loaded: Any) -> None:
    _, vis, _ = loaded
    with pytest.raises(UserError, match="the image is empty: 0 x 5 pixels"):
        vis["eval"](Image.new("RGB", (0, 5)))
    with pytest.raises(UserError, match="takes a PIL image"):
        vis["eval"](torch.zeros(3, 64, 64))


def test_it_says_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        lavis_xformer.load_model_and_preprocess("xformer_opt")
    assert "no model type given, taking 'mini'" in caplog.text
    assert "knows synthetic scenes only" in caplog.text
