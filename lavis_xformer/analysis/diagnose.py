"""``lavis-xformer diagnose --cfg-path YAML --options model.pretrained=...``: does a trained model use M, and where?

Four checks of a stage-1 or stage-2 checkpoint, on held-out samples of the run that the YAML describes:

1. the split's evaluation, and again with each image given another one's M: whatever drops came from M;
2. how far Z' is from Zq (and M' from M), how much of that varies between images, and how the cross-attentions spread;
3. the gradient of every loss term at the queries, the Q-Former's cross-attentions, CA1 and CA2;
4. the reconstruction error from M', beside the frozen MAE's own from M, which is its floor.

B: batch, Q: queries, D: width of the Q-Former, L: queries of an attention, S: its keys.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lavis_xformer import launch, register
from lavis_xformer.arguments import at_least, command_parser
from lavis_xformer.conclude import rows_of, show
from lavis_xformer.config.load import DEFAULT_RUNNER, load_config
from lavis_xformer.engine import jobs
from lavis_xformer.engine.batches import to_device
from lavis_xformer.errors import UserError
from lavis_xformer.files import write_json
from lavis_xformer.models.attention_maps import recording
from lavis_xformer.train import build_runner

logger = logging.getLogger(__name__)

#: parts of a fusion that aligns M, and of any model, as patterns of weight names; the first that matches counts
CROSS_ATTENTIONS = {
    "CA1 (M attends to Zq)": r"fusion\.(mae_in|align_blocks|mae_out)\.",
    "CA2 (Zq attends to M')": r"fusion\.enrich_blocks\.",
}
PARTS = {
    "queries Z": r"query_tokens$",
    "Q-Former, attention to C": r"Qformer\..*\.crossattention\.",
    "Q-Former, the rest": r"Qformer\.",
    "fusion": r"fusion\.",
    "captions' reader of Z'": r"itg_reader\.",
}

#: cross-attentions, by the names of their layers in the fusions
ATTENTIONS = {"align_blocks": "CA1", "enrich_blocks": "CA2", "blocks": "C to M"}

Figures = dict[str, float]


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = command_parser("diagnose", __doc__)
    parser.add_argument("--cfg-path", required=True, help="the training's YAML")
    parser.add_argument(
        "--options", nargs="+", action="extend", default=[], help="such as model.pretrained=.../checkpoint_best.pth"
    )
    parser.add_argument("--split", default="val", help="split to use, as run.test_splits (default: %(default)s)")
    parser.add_argument("--batches", type=at_least(1), default=8, help="batches for checks 2 to 4 (default: 8)")
    args = parser.parse_args(argv)
    register()
    changes = [f"run.test_splits=[{args.split}]", "run.evaluate=True", "run.tensorboard=False"]
    config = load_config(args.cfg_path, [*args.options, *changes])
    config.run_cfg.runner = DEFAULT_RUNNER
    with launch.process_group(launch.device_of(str(config.run_cfg.get("device", "auto")))):
        said = run(config, args.split, batches=args.batches)
    print(said)
    return 0


def run(config: Any, split: str, *, batches: int) -> str:
    """Make all checks, write ``diagnosis.json`` and return what to print; the runner does not outlive this call."""
    runner = build_runner(config)
    runner.check_splits_to_come()
    model = runner.unwrap_dist_model(runner.model).eval()
    pair = two_images(split, runner.dataloaders[split].dataset) if model.fusion.needs_mae else None
    model.shuffle_mae = False  # whatever the configuration says
    seen = look(model, [to_device(samples, model.device) for samples in islice(runner.dataloaders[split], batches)])
    other: Mapping[str, float] = {}
    if pair is not None:
        model.shuffle_mae = True
        with torch.no_grad():
            model.encode_image(pair.to(model.device))  # what a first batch of one image takes M from
        other = runner.evaluate(skip_reload=True)[split] or {}
    model.shuffle_mae = False  # the second evaluation, so that the result files are its
    own = runner.evaluate(skip_reload=True)[split] or {}
    found = {"with_own_m": dict(own), "with_anothers_m": dict(other), **seen}
    path = runner.output_dir / "diagnosis.json"
    write_json(path, {**found, "config": config.to_dict(), "versions": jobs.versions()})
    compared = [rows_of(runner.task, figures) for figures in (own, other) if figures]
    return f"{text(found, compared)}\n\nall of it  {show(path)}"


def two_images(split: str, dataset: Any) -> Tensor:
    """Return the last image of a split and one that differs from it (2, C, S, S).

    Raises:
        UserError: there is none.
    """
    found: list[Tensor] = []
    for number in reversed(range(len(dataset))):
        image = dataset[number]["image"]
        if not found or not torch.equal(image, found[0]):
            found.append(image)
        if len(found) == 2:
            break
    else:
        raise UserError(f"--split {split}: all its images are the same; check 1 gives each one another image's M")
    return torch.stack(found)


def look(model: Any, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return checks 2 to 4, as means over batches of samples on the model's device."""
    torch.manual_seed(0)  # for MAE's masks and the hard negatives
    return {
        "enrichment": mean(enrichment(model, samples["image"]) for samples in batches),
        "gradients": learned(model, batches),
        "reconstruction": mean(reconstruction(model, samples["image"]) for samples in batches),
    }


def learned(model: Any, batches: Sequence[Mapping[str, Any]]) -> Figures:
    """Return check 3, or nothing if the split has no texts to learn from, as most of LAVIS's for evaluation."""
    try:
        return mean(gradients(model, samples) for samples in batches)
    except UserError as error:
        logger.warning("check 3 is left out, the split has nothing to learn from: %s", error)
        return {}


@torch.no_grad()
def enrichment(model: Any, image: Tensor) -> Figures:
    """Compare Z' with Zq and M' with M, and describe every cross-attention of the fusion.

    A relative change is the norm of the difference over that of the original. What is the same for all images of the
    batch says nothing about any of them; the rest is the share of the difference's power that differs between images.
    """
    if not model.fusion.needs_mae:
        return {}
    with recording(model) as maps:
        tokens = model.encode_image(image)
        zq = model.query_image(tokens.clip).last_hidden_state  # (B, Q, D)
        z, aligned = model.fusion.refine(zq, tokens.mae_tokens)
    found: Figures = {}
    for name, weights in maps.items():
        if name.startswith("fusion."):
            place = name.removeprefix("fusion.").removesuffix(".cross_attention")  # of a fusion of the user's own
            blocks, _, layer = place.partition(".")
            if blocks in ATTENTIONS and layer.isdecimal():
                place = f"{ATTENTIONS[blocks]}, layer {int(layer) + 1}"
            found |= {f"{place}: {figure}": value for figure, value in spread(weights).items()}
    for name, changed, original in (("Z'", z, zq), ("M'", aligned, tokens.mae_tokens)):
        if changed is not original:
            difference = changed - original
            power = difference.square().mean(dim=0).sum()
            own = difference.var(dim=0, unbiased=False).sum() / power.clamp_min(1e-12)
            found[f"{name}: relative change"] = float(difference.norm() / original.norm())
            if len(image) > 1:
                found[f"{name}: share differing between images"] = float(own)
    return found


def spread(weights: Tensor) -> Figures:
    """Describe how an attention map (B, heads, L, S) spreads.

    The entropy is 1 if attention is uniform and 0 if it is all on one token; of each query's strongest token, the mean
    share is returned.
    """
    entropy = torch.special.entr(weights).sum(-1).mean() / torch.tensor(weights.shape[-1]).log()
    return {"entropy (1: uniform)": float(entropy), "share of the strongest token": float(weights.amax(-1).mean())}


def gradients(model: Any, samples: Mapping[str, Any]) -> Figures:
    """Return ``term > part``: the norm of the gradient of each (unweighted) loss term at each part of the model.

    Frozen parts, and terms that depend only on frozen ones, are left out.
    """
    patterns = (CROSS_ATTENTIONS if model.fusion.aligns_mae else {}) | PARTS
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        part = next((part for part, pattern in patterns.items() if re.match(pattern, name)), None)
        if part is not None and parameter.requires_grad:
            parts[part].append(parameter)
    if not parts:
        return {}
    with torch.enable_grad():
        terms = {name: term for name, term in model(samples).items() if name.startswith("loss_") and term.requires_grad}
    found, weights = {}, [weight for members in parts.values() for weight in members]
    for term, value in terms.items():
        reached = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        each = iter(reached)
        for part, members in parts.items():
            squares = [grad.square().sum() for grad in islice(each, len(members)) if grad is not None]
            found[f"{term.removeprefix('loss_')} > {part}"] = float(sum(squares, torch.zeros(()).to(value)).sqrt())
    return found


@torch.no_grad()
def reconstruction(model: Any, image: Tensor) -> Figures:
    """Return the error on masked patches from M' and from M."""
    if not model.fusion.aligns_mae or model.mae is None or not model.mask_ratio:
        return {}
    seen = model.encode_image(image, mask_ratio=model.mask_ratio)
    aligned = model.fusion.align(seen.mae_tokens, model.query_image(seen.clip).last_hidden_state)
    ours, floor = (float(model.reconstruction_loss(tokens, seen)) for tokens in (aligned, seen.mae_tokens))
    return {"from M'": ours, "from M": floor}


def mean(found: Iterable[Figures]) -> Figures:
    """Return the mean of every figure."""
    values: dict[str, list[float]] = defaultdict(list)
    for figures in found:
        for name, value in figures.items():
            values[name].append(value)
    return {name: fmean(given) for name, given in values.items()}


def text(found: Mapping[str, Any], compared: Sequence[Sequence[tuple[str, str, str]]]) -> str:
    """Return all figures as text; ``compared`` has the task's rows with the image's own M, then with another's."""
    lines = [f"{'1. evaluation':<44}{'own M':>12}{'another M':>12}{'reference':>12}"]
    for row in zip(*compared, strict=True):
        name, _, reference = row[0]
        lines.append(f"   {name:<41}" + "".join(f"{value:>12}" for _, value, _ in row) + f"{reference:>12}".rstrip())
    if len(compared) == 1:
        lines.append("   this fusion uses no M")
    lines += ["2. what M changes"] if found["enrichment"] else []
    lines += [f"   {name:<41}{value:>12.4f}" for name, value in found["enrichment"].items()]
    terms = list(dict.fromkeys(name.split(" > ")[0] for name in found["gradients"]))
    parts = list(dict.fromkeys(name.split(" > ")[1] for name in found["gradients"]))
    if terms:
        lines.append(f"{'3. gradient norm of each loss':<44}" + "".join(f"{term:>12}" for term in terms))
    for part in parts:
        norms = (found["gradients"][f"{term} > {part}"] for term in terms)
        lines.append(f"   {part:<41}" + "".join(f"{norm:>12.2e}" for norm in norms))
    lines += ["4. reconstruction of masked patches"] if found["reconstruction"] else []
    lines += [f"   {name:<41}{value:>12.4f}" for name, value in found["reconstruction"].items()]
    return "\n".join(lines)
