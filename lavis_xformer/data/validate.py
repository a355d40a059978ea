"""``lavis-xformer validate FILE``: check a user's own images and texts, before a training does.

Ten images with captions, as JSON lines (a JSON list of the same objects works too)::

    {"image": "001.jpg", "caption": "a red kite over a beach"}
    {"image": "002.jpg", "caption": ["two dogs on a sofa", "a pair of sleeping dogs"]}
    ...
    {"image": "more/010.png", "caption": "an empty street at night"}

These are checked with ``lavis-xformer validate captions.jsonl --image-root photos/`` and used by the dataset builder
``image_text_json`` (see configs/datasets/image_text_json.yaml). Questions work the same way::

    {"image": "001.jpg", "question": "what colour is the kite?", "answer": ["red", "red", "orange"]}
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lavis_xformer.arguments import at_least, command_parser
from lavis_xformer.data.image_text import Keys, Pair, PairKeys, Question, QuestionKeys, Record, check, wrong_ids
from lavis_xformer.data.photos import PhotoError, open_photo
from lavis_xformer.data.records import expand, read_entries


def main(argv: Sequence[str] | None = None) -> int:
    """Check an annotation file and print what it holds; the command ``lavis-xformer validate``.

    Args:
        argv: the arguments after the command's name.

    Returns:
        0 if all is well, 1 if a row or an image is wrong.

    Raises:
        UserError: the file or the image folder can't be read at all.
    """
    options = _parser().parse_args(argv)
    keys: Keys = (
        QuestionKeys(
            image=options.image_key,
            question=options.question_key,
            answer=options.answer_key,
            question_id=options.id_key,
            answers_needed=bool(options.answer_key),
        )
        if options.question_key
        else PairKeys(image=options.image_key, caption=options.caption_key, image_id=options.id_key)
    )
    rows = read_entries(options.file, rows_key=options.rows_key)
    records, problems = check(rows, keys, image_root=options.image_root)
    if options.question_key and options.id_key:
        problems += wrong_ids([record for record in records if isinstance(record, Question)], options.id_key)
    if not options.fast:
        problems += undecodable(records, options.image_root)
    wrong = {number for number, _ in problems}
    records = [record for record in records if record.row not in wrong]
    print(f"{options.file}: {len(rows)} rows")
    for line in summary(records) if records else ["no good row"]:
        print(f"  {line}")
    print(f"  {len(problems)} problems" if problems else "  no problem found")
    for number, what in sorted(problems)[: options.show]:
        print(f"    row {number}: {what}")
    if len(problems) > options.show:
        print(f"    and {len(problems) - options.show} more (--show N shows more)")
    return 1 if problems else 0


def summary(records: Sequence[Record]) -> list[str]:
    """Describe good rows in a few lines: how many images, texts per image, words per text."""
    images = Counter(record.image_id if isinstance(record, Pair) else record.image for record in records)
    lines = [f"{len(records)} good rows, {len(images)} images"]
    pairs = [record for record in records if isinstance(record, Pair)]
    questions = [record for record in records if isinstance(record, Question)]
    if pairs:
        captions = [caption for pair in pairs for caption in pair.captions]
        lines.append(f"{len(captions) / len(images):.2f} captions per image, {_words(captions)}")
    if questions:
        answers = Counter(answer for question in questions for answer in question.answers)
        lines.append(f"{_words([q.question for q in questions])} per question")
        common = ", ".join(f"{answer} ({n})" for answer, n in answers.most_common(5))
        lines += [f"most common answers: {common}"] if answers else []
    return lines


def _words(captions: Sequence[str]) -> str:
    return f"{sum(len(c.split()) for c in captions) / len(captions):.1f} words on average"


def undecodable(records: Sequence[Record], image_root: str | Path) -> list[tuple[int, str]]:
    """Decode every image once; return the row number and error of the rows whose image fails."""
    faults = {}
    for image in tqdm(sorted({record.image for record in records}), "decoding", unit="image", disable=None):
        try:
            open_photo(expand(image_root) / image)
        except PhotoError as error:
            faults[image] = str(error)
    return [(record.row, faults[record.image]) for record in records if record.image in faults]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("validate", __doc__)
    add = parser.add_argument
    add("file", help="JSON list, JSON object that holds a list, JSON lines, or CSV")
    add("--image-root", default=".", help="folder that the rows' image paths are relative to (default: here)")
    add("--image-key", default="image", help="holds the path of the image (default: %(default)s)")
    add("--caption-key", default="caption", help="holds a string or a list of strings (default: %(default)s)")
    add("--id-key", help="id of the image (default: its path), or of the question")
    add("--question-key", help="check questions and answers in place of captions")
    add("--answer-key", default="answer", help='"" if there are only questions (default: %(default)s)')
    add("--rows-key", help="key of the list, if the file is an object with several lists")
    add("--fast", action="store_true", help="don't decode the images")
    add("--show", type=at_least(0), default=10, metavar="N", help="number of problems to show (default: %(default)s)")
    return parser
