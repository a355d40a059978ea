"""``lavis-xformer build-mini``: train every frozen model of the mini world from scratch.

Each part gets a folder (weights in half precision, config.json, model card), and the set gets its SHA256SUMS.json.
Each part's training state is kept in ``<out>/.state``; ``--resume`` continues from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertTokenizer, T5ForConditionalGeneration, ViTMAEForPreTraining

from lavis_xformer import __version__
from lavis_xformer.arguments import at_least, command_parser
from lavis_xformer.assets import write_sums
from lavis_xformer.data.scenes import vocabulary
from lavis_xformer.errors import UserError
from lavis_xformer.files import make_folder
from lavis_xformer.mini import pool
from lavis_xformer.mini.cards import write_card
from lavis_xformer.mini.clip import TEXT_TOKENS, ClipConfig, MiniClip, clip_loss, retrieval, shipped_state
from lavis_xformer.mini.language import Document, accuracy, encode, language_loss, opt_config, perplexity, prepare
from lavis_xformer.mini.mae import mae_config, mae_loss, reconstruction
from lavis_xformer.mini.t5 import examine, t5_config, t5_loss
from lavis_xformer.mini.tokenizers import write_bert, write_opt, write_t5
from lavis_xformer.mini.training import Schedule, StepLoss, fit
from lavis_xformer.models.opt import CachedOPT, attend_by_kernel


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How much data and training one preset uses."""

    scenes: int
    wordings: int
    documents: int
    heldout: int
    clip: Schedule
    mae: Schedule
    opt: Schedule
    notes: Schedule
    t5: Schedule

    def longer(self, factor: float) -> Recipe:
        """The same recipe with ``factor`` times the steps, at least one for each part."""
        schedules = {part: getattr(self, part) for part in ("clip", "mae", "opt", "notes", "t5")}
        return replace(self, **{k: replace(v, steps=max(1, round(factor * v.steps))) for k, v in schedules.items()})


PRESETS = "smoke: seconds, for tests; quick: about half an hour on two cores; full: the shipped models, hours"
RECIPES = {
    "smoke": Recipe(
        scenes=64,
        wordings=2,
        documents=64,
        heldout=12,
        clip=Schedule(steps=4, batch=16, lr=1e-3),
        mae=Schedule(steps=4, batch=16, lr=1e-3),
        opt=Schedule(steps=4, batch=8, lr=1e-3),
        notes=Schedule(steps=4, batch=8, lr=1e-3, muon=2.0),
        t5=Schedule(steps=4, batch=8, lr=1e-3),
    ),
    "quick": Recipe(
        scenes=20_000,
        wordings=4,
        documents=20_000,
        heldout=1000,
        clip=Schedule(steps=500, batch=128, lr=1e-3),
        mae=Schedule(steps=700, batch=256, lr=1e-3),
        opt=Schedule(steps=1000, batch=13, lr=3e-3),
        notes=Schedule(steps=800, batch=8, lr=1e-3, muon=2.0),
        t5=Schedule(steps=500, batch=64, lr=3e-3),
    ),
    "full": Recipe(
        scenes=60_000,
        wordings=4,
        documents=160_000,
        heldout=1000,
        clip=Schedule(steps=10_000, batch=128, lr=1e-3, horizon=20_000, cooldown=0.4),
        mae=Schedule(steps=10_000, batch=256, lr=1.5e-3, horizon=20_000, cooldown=0.25),
        opt=Schedule(steps=15_600, batch=13, lr=3e-3),
        notes=Schedule(steps=4200, batch=96, lr=1.5e-3, muon=2.0),  # minutes on a GPU, hours on a CPU
        t5=Schedule(steps=15_600, batch=64, lr=3e-3),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the command: output folder, recipe, seed and device."""

    out: Path
    recipe: Recipe
    seed: int
    resume: bool
    device: torch.device
    command: str

    def state(self, training: str) -> Path:
        """File of one training's state; only a run of equal settings has the same."""
        schedule: Schedule = getattr(self.recipe, training)
        settings = json.dumps([asdict(schedule), self.recipe.scenes, self.recipe.wordings, self.recipe.documents])
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        return self.out / ".state" / f"{training}-seed{self.seed}-{digest}.pt"

    def fit(self, training: str, module: nn.Module, loss: StepLoss) -> float:
        """Train a model on one schedule; returns the seconds it took."""
        schedule: Schedule = getattr(self.recipe, training)
        state = self.state(training)
        return fit(module, loss, schedule=schedule, seed=self.seed, state=state, resume=self.resume, title=training)

    def finish(self, part: str, data: str, seconds: float, figures: dict[str, float]) -> None:
        """Write the model card of one part."""
        schedule: Schedule | None = getattr(self.recipe, part, None)
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        facts = {
            "command": f"`{self.command}`",
            "seed": self.seed,
            "data": data,
            "training": json.dumps(asdict(schedule)) if schedule else "none",
            "time": f"{seconds / 60:.1f} min",
            "machine": gpu or f"{platform.machine()}, {os.cpu_count()} cores",
            "written by": f"lavis_xformer {__version__}",
        }
        write_card(self.out / part, facts, figures)
        print(f"{part}: " + ", ".join([f"{seconds:.0f} s", *(f"{k} {v:.4g}" for k, v in figures.items())]))


def build_bert(job: Job) -> None:
    """Vocabulary and sizes of the Q-Former."""
    write_bert(job.out / "bert", vocabulary())
    job.finish("bert", "the vocabulary of the scenes, letters and digits", 0.0, {})


def build_clip(job: Job) -> None:
    """CLIP stand-in; its text tower uses the Q-Former's word pieces."""
    recipe, config = job.recipe, ClipConfig()
    tokenizer = write_bert(job.out / "bert", vocabulary())
    images = pool.images(pool.TRAIN, seed=job.seed, count=recipe.scenes)
    texts = pool.coarse_captions(pool.TRAIN, seed=job.seed, count=recipe.scenes, wordings=recipe.wordings)
    captions = _word_pieces(texts, tokenizer).view(recipe.scenes, recipe.wordings, -1)
    model = MiniClip(config=config, vocabulary=len(tokenizer)).to(job.device)
    seconds = job.fit("clip", model, clip_loss(model, images, captions, batch=recipe.clip.batch))
    held_out = pool.images(pool.HELD_OUT, seed=job.seed, count=recipe.heldout)
    texts = pool.coarse_captions(pool.HELD_OUT, seed=job.seed, count=recipe.heldout, wordings=1)
    figures = retrieval(model, held_out, _word_pieces(texts, tokenizer))
    save_weights(job.out / "clip", shipped_state(model, config), asdict(config))
    data = f"{recipe.scenes} scenes ({pool.PRESET}), {recipe.wordings} coarse captions each"
    job.finish("clip", data, seconds, figures)


def build_mae(job: Job) -> None:
    """MAE stand-in."""
    recipe = job.recipe
    images = pool.images(pool.TRAIN, seed=job.seed, count=recipe.scenes)
    model = ViTMAEForPreTraining(mae_config()).to(job.device)
    seconds = job.fit("mae", model, mae_loss(model, images, batch=recipe.mae.batch))
    held_out = pool.images(pool.HELD_OUT, seed=job.seed, count=recipe.heldout)
    figures = reconstruction(model, held_out, seed=job.seed)
    config = model.config.to_dict() | {"architectures": ["ViTMAEForPreTraining"]}
    save_weights(job.out / "mae", model.state_dict(), config)
    job.finish("mae", f"{recipe.scenes} scenes ({pool.PRESET}), images alone", seconds, figures)


def build_opt(job: Job) -> None:
    """Language model and its tokenizer, trained first on texts, then on texts and notes."""
    recipe = job.recipe
    documents = pool.documents(pool.TRAIN, seed=job.seed, count=recipe.documents)
    tokenizer = write_opt(job.out / "opt", _said(documents))
    model = attend_by_kernel(CachedOPT(opt_config(len(tokenizer))))  # as in stage 2
    prepare(model)
    model.to(job.device)
    seconds = job.fit("opt", model, language_loss(model, encode(documents, tokenizer), batch=recipe.opt.batch))
    documents = pool.documents(pool.TRAIN, seed=job.seed, count=recipe.documents, noted=True)
    loss = language_loss(model, encode(documents, tokenizer), batch=recipe.notes.batch, noise=0.1)
    seconds += job.fit("notes", model, loss)
    noted = pool.examination(pool.HELD_OUT, seed=job.seed, count=4 * recipe.heldout, as_notes=True)
    asked = pool.examination(pool.HELD_OUT, seed=job.seed, count=4 * recipe.heldout)
    blind = [replace(document, text="") for document in asked]
    drawn = pool.documents(pool.HELD_OUT, seed=job.seed, count=recipe.heldout)
    captions = [text for text in drawn if not text.questions]
    figures = {"perplexity of captions": perplexity(model, tokenizer, captions)}
    figures |= {f"answers {k} %": v for k, v in accuracy(model, tokenizer, asked).items()}
    figures |= {f"from notes {k} %": v for k, v in accuracy(model, tokenizer, noted).items()}
    figures |= {f"blind {k} %": v for k, v in accuracy(model, tokenizer, blind).items()}
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
    config = model.config.to_dict() | {"architectures": ["OPTForCausalLM"]}
    save_weights(job.out / "opt", state, config)
    data = f"{recipe.documents} texts of scenes, then {recipe.notes.steps} steps with notes among them"
    job.finish("opt", data, seconds, figures)


def build_t5(job: Job) -> None:
    """Encoder-decoder language model and its tokenizer."""
    recipe = job.recipe
    documents = pool.documents(pool.TRAIN, seed=job.seed, count=recipe.documents)
    tokenizer = write_t5(job.out / "t5", _said(documents))
    model = T5ForConditionalGeneration(t5_config(len(tokenizer))).to(job.device)
    seconds = job.fit("t5", model, t5_loss(model, documents, tokenizer, batch=recipe.t5.batch))
    asked = pool.examination(pool.HELD_OUT, seed=job.seed, count=recipe.heldout)
    blind = [replace(document, text="") for document in asked]
    figures = {f"answers {k} %": v for k, v in examine(model, tokenizer, asked).items()}
    figures |= {f"blind {k} %": v for k, v in examine(model, tokenizer, blind).items()}
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("embed_tokens.weight")}  # tied
    config = model.config.to_dict() | {"architectures": ["T5ForConditionalGeneration"]}
    save_weights(job.out / "t5", state, config)
    job.finish("t5", f"{recipe.documents} texts of scenes ({pool.PRESET})", seconds, figures)


PARTS = {"bert": build_bert, "clip": build_clip, "mae": build_mae, "opt": build_opt, "t5": build_t5}
#: the trainings of a part that has weights
TRAININGS = {"clip": ("clip",), "mae": ("mae",), "opt": ("opt", "notes"), "t5": ("t5",)}
WEIGHTS = "model.safetensors"


def save_weights(folder: Path, state: dict[str, Tensor], config: dict[str, object]) -> None:
    """Write model.safetensors in half precision and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: value.detach().cpu().half().contiguous() for name, value in state.items()}
    path = folder / WEIGHTS
    save_file(halves, path, metadata={"format": "pt"})
    path.chmod(0o644)  # readable by others wherever it is installed
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _said(documents: list[Document]) -> Iterator[str]:
    """Texts of the first 20,000 documents, enough to train a tokenizer on."""
    return (text for document in documents[:20_000] for text, _ in document.parts())


def _word_pieces(texts: list[str], tokenizer: BertTokenizer) -> Tensor:
    """Token ids (len(texts), TEXT_TOKENS) int16, each distinct text tokenised once."""
    known = {text: tokenizer.encode(text) for text in set(texts)}
    rows = torch.zeros(len(texts), TEXT_TOKENS, dtype=torch.int16)
    for row, text in zip(rows, texts, strict=True):
        ids = torch.tensor(known[text][:TEXT_TOKENS], dtype=torch.int16)
        row[: len(ids)] = ids
    return rows


def check_parts(job: Job, parts: list[str]) -> None:
    """Check that no part of another run would be replaced.

    Raises:
        UserError: a part is there already and, under ``--resume``, has weights of other settings.
    """
    if not job.resume and (old := [part for part in parts if (job.out / part).exists()]):
        raise UserError(f"--out {job.out} already has {', '.join(old)}; name another folder, or continue by --resume")
    for part in parts:
        begun = all(job.state(training).is_file() for training in TRAININGS.get(part, ()))
        if (job.out / part / WEIGHTS).exists() and not begun:
            raise UserError(
                f"--resume: {job.out / part} has weights, and {job.out / '.state'} no run of these settings; leave out "
                "--resume and choose another --out, or use the settings in the part's README.md"
            )


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status.

    Raises:
        UserError: the factor is out of range, the folder is a file or can't be created, a part of another run would be
            replaced, or the device does not exist.
    """
    parser = command_parser("build-mini", __doc__)
    parser.add_argument("--preset", choices=list(RECIPES), default="quick", help=PRESETS)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the set to")
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="build this part only; may be repeated")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of scenes, texts and weights (default: 0)")
    parser.add_argument("--longer", type=float, default=1.0, metavar="FACTOR", help="multiply every part's steps")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    args = parser.parse_args(argv)
    if not 0 < args.longer < math.inf:
        raise UserError(f"--longer {args.longer}: it must be a number greater than 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible here; use --device cpu")
    job = Job(
        out=make_folder(args.out, "--out"),
        recipe=RECIPES[args.preset].longer(args.longer),
        seed=args.seed,
        resume=args.resume,
        device=torch.device(args.device),
        command=shlex.join(["lavis-xformer", "build-mini", *argv]),
    )
    begin = time.monotonic()
    parts = args.only or list(PARTS)
    check_parts(job, parts)
    for part in parts:
        torch.manual_seed(args.seed)
        PARTS[part](job)
    write_sums(args.out, [*parts, "bert"] if "clip" in parts else parts)  # CLIP uses its vocabulary
    print(f"{args.out}: done in {(time.monotonic() - begin) / 60:.1f} min")
    return 0
