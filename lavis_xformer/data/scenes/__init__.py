"""Rendered scenes with their captions, questions and ground truth: numpy and PIL only."""

from lavis_xformer.data.scenes.qa import ANSWERS, QUESTION_KINDS, Question, ask, majority_share, questions
from lavis_xformer.data.scenes.render import render
from lavis_xformer.data.scenes.text import LEVELS, caption, captions, coarse_caption, description, fine_caption
from lavis_xformer.data.scenes.words import vocabulary
from lavis_xformer.data.scenes.world import (
    PRESETS,
    Scene,
    SceneObject,
    make_scene,
    relations,
    scene_rng,
    visible_shares,
)

__all__ = [
    "ANSWERS",
    "LEVELS",
    "PRESETS",
    "QUESTION_KINDS",
    "Question",
    "Scene",
    "SceneObject",
    "ask",
    "caption",
    "captions",
    "coarse_caption",
    "description",
    "fine_caption",
    "majority_share",
    "make_scene",
    "questions",
    "relations",
    "render",
    "scene_rng",
    "visible_shares",
    "vocabulary",
]
