"""``lavis-xformer export CHECKPOINT FOLDER``: write a checkpoint's weights and configuration as one folder.

The folder has ``model.safetensors`` (trained weights, and frozen ones from the checkpoint), ``config.yaml`` (the
configuration of the model and its processors) and ``README.md`` (the model card). It can be moved, and is loaded bit
for bit by :func:`from_folder`, or by giving its path as the model type; the frozen encoders and the language model are
loaded from where ``config.yaml`` says, by absolute path if they are local.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from yaml import YAMLError

from lavis_xformer import __version__, markdown
from lavis_xformer.arguments import command_parser
from lavis_xformer.errors import UserError, first_line
from lavis_xformer.files import sha256
from lavis_xformer.paths import PARTS
from lavis_xformer.run_folder import LOG, read_log

CONFIG, WEIGHTS, CARD = "config.yaml", "model.safetensors", "README.md"
NORMALISATION = ("mean", "std", "mae_mean", "mae_std")  # keys of an image processor

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = command_parser("export", __doc__)
    parser.add_argument("checkpoint", help="from training with this package, or one of LAVIS's BLIP-2 files")
    parser.add_argument("folder", help="where to write; new or empty")
    parser.add_argument("--model", help="the model, if the checkpoint doesn't name it: xformer, xformer_opt, ...")
    parser.add_argument("--type", help="its type: mini, pretrain_opt2.7b, ...")
    parser.add_argument("--half", action="store_true", help="half the size: weights in float16, no longer bit-exact")
    args = parser.parse_args(argv)
    export(args.checkpoint, args.folder, arch=args.model, model_type=args.type, half=args.half)
    print(f"{args.folder}: {WEIGHTS}, {CONFIG}, {CARD}; load it with lavis_xformer.from_folder('{args.folder}')")
    return 0


def from_folder(folder: str | Path, *, is_eval: bool = True, device: str = "cpu") -> tuple[Any, Any, Any]:
    """Load a folder that :func:`export` wrote, wherever it is now.

    Returns:
        The model, the processors of images and those of texts, like LAVIS's ``load_model_and_preprocess``.

    Raises:
        UserError: it is not such a folder, or something that its ``config.yaml`` names is missing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    import lavis_xformer

    if not (path := Path(folder).expanduser() / CONFIG).is_file():
        raise UserError(f"{folder} is not an exported model: it has no {CONFIG}")
    try:
        arch = OmegaConf.select(OmegaConf.load(path), "model.arch")
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {first_line(error)}") from error
    lavis_xformer.register()
    if not _is_ours(arch):
        raise UserError(f"{folder} is not an exported model: its {CONFIG} names no model.arch of this package")
    absolute = str(path.parent.resolve())  # never the name of a type, such as mini
    return lavis_xformer.load_model_and_preprocess(arch, absolute, is_eval=is_eval, device=device)


def export(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    arch: str | None = None,
    model_type: str | None = None,
    half: bool = False,
) -> Path:
    """Write a checkpoint as a folder.

    Args:
        checkpoint: a file from training with this package, which names its model; or one that doesn't.
        folder: where to write; new or empty.
        arch: the model, if the checkpoint doesn't name it.
        model_type: its type.
        half: whether to round the weights to float16.

    Raises:
        UserError: the checkpoint can't be read, doesn't fit, or is of an unknown model; or the folder is a file or not
            empty.
    """
    import lavis_xformer

    lavis_xformer.register()
    from lavis.common.registry import registry
    from omegaconf import OmegaConf
    from safetensors.torch import save_file

    target = Path(folder)
    _check_paths(Path(checkpoint), target)
    cfg, facts = _configuration(Path(checkpoint), arch, model_type)
    model = registry.get_model_class(cfg.model.arch).from_config(cfg.model)
    if str(checkpoint) not in (cfg.model.get("pretrained"), cfg.model.get("blip2_pretrained")):  # else loaded above
        model.load_checkpoint(str(checkpoint))
    weights = {name: tensor.half() if half else tensor for name, tensor in _weights(model).items()}
    if new := sorted({name.partition(".")[0] for name in model.load_report.missing_new}):
        facts["newly initialised"] = f"{', '.join(new)} (not in the checkpoint)"
        logger.warning("%s has no %s: exported as initialised before training", checkpoint, ", ".join(new))
    _anchor(cfg.model)
    facts = {"frozen parts, not here": _elsewhere(cfg.model, model, weights), **facts}
    cfg.model |= {"pretrained": None, "finetuned": None, "load_finetuned": False}
    cfg.model |= {"blip2_pretrained": None, "train_only": None}
    _fit_processors(cfg, model)

    with _staging(target) as written:
        save_file(weights, written / WEIGHTS, metadata={"format": "pt"})
        (written / WEIGHTS).chmod(0o644)
        OmegaConf.save(cfg, written / CONFIG)
        (written / CARD).write_text(_card(cfg, written, Path(checkpoint), weights, facts), encoding="utf-8")
    return target


def _check_paths(checkpoint: Path, target: Path) -> None:
    """Check, before anything is loaded, that there is a file to read and room for a folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is {'not empty' if target.is_dir() else 'a file'}; name a new folder")
    if checkpoint.is_dir():
        raise UserError(f"{checkpoint} is a folder, exported already perhaps; name a checkpoint file")
    if not checkpoint.exists():
        raise UserError(f"there is no checkpoint {checkpoint}")


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files move to ``target`` at the end; if the block fails, nothing is left.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = TemporaryDirectory(dir=target.parent, prefix=".export-")
    except OSError as error:
        raise UserError(f"{target} can't be created: {error.strerror}") from error
    with staged as folder:
        yield Path(folder)
        target.mkdir(exist_ok=True)
        for file in Path(folder).iterdir():
            file.replace(target / file.name)


def _configuration(checkpoint: Path, arch: str | None, model_type: str | None) -> tuple[Any, dict[str, Any]]:
    """Sections ``model`` and ``preprocess``, with the checkpoint to load, and what it records of its training."""
    from omegaconf import OmegaConf

    from lavis_xformer.config.load import choose_model_type, find
    from lavis_xformer.models.checkpoints import BROUGHT_CLIP, is_blip2, read_checkpoint
    from lavis_xformer.models.weight_files import load_torch_file

    cfg: Any
    if arch is not None and not _is_ours(arch):
        find("model", arch, "--model")
        raise UserError(f"--model {arch} is no X-Former; choose xformer, xformer_opt or xformer_t5")
    content: dict[str, Any] = {}
    if checkpoint.suffix == ".pth":
        content = load_torch_file(checkpoint, key="pretrained")
    content["config"] = config = config if isinstance(config := content.get("config"), dict) else {}
    its_arch = str(trained.get("arch") or "") if isinstance(trained := config.get("model"), dict) else ""
    told = _is_ours(its_arch) and "preprocess" in config
    if told and (arch is None or _related(arch, its_arch)):
        if model_type not in (None, its_type := config["model"].get("model_type")):
            raise UserError(f"--type {model_type}: {checkpoint} is of type {its_type}; leave --type out")
        cfg = OmegaConf.create({name: config[name] for name in ("model", "preprocess")})
        cfg.model.arch = arch or its_arch
        _take_normalisation(cfg, config.get("datasets") or {})
    elif arch is None:
        what = f"is of LAVIS's {its_arch}" if its_arch else "doesn't name its model"
        raise UserError(f"{checkpoint} {what}; choose one of this package's with --model and --type")
    else:
        path = find("model", arch, "--model").default_config_path(choose_model_type(arch, model_type))
        cfg = OmegaConf.load(path)
        logger.warning("%s doesn't record its settings: those of %s are taken", checkpoint, path)
    parts = cfg.model.get("train_only")  # the file may hold no fusion then
    has_fusion = cfg.model.get("fusion", "dual") != "none"
    state, _ = read_checkpoint(str(checkpoint), key="pretrained")
    blip2 = has_fusion and not parts and is_blip2(state)
    said = _training(content) | _figures(checkpoint, content)
    if BROUGHT_CLIP in state and not cfg.model.get("blip2_pretrained"):
        return cfg, said  # as training began: from the file with the frozen image encoder
    cfg.model |= {"load_finetuned": False, "load_pretrained": True, "pretrained": None}
    cfg.model |= {"blip2_pretrained" if blip2 else "pretrained": str(checkpoint)}
    if not (blip2 or parts or BROUGHT_CLIP in state):
        cfg.model.blip2_pretrained = None  # training began from it and has changed all of it
    return cfg, said


def _is_ours(arch: Any) -> bool:
    """Whether a model is one of this package, or derived from one."""
    from lavis.common.registry import registry

    from lavis_xformer.models.base import XFormerBase

    found = registry.get_model_class(str(arch))
    return found is not None and issubclass(found, XFormerBase)


def _take_normalisation(cfg: Any, datasets: Mapping[str, Any]) -> None:
    """Give the processors the means and deviations of the run's datasets, which leave no trace in the weights."""
    evaluating = [((dataset or {}).get("vis_processor") or {}).get("eval") or {} for dataset in datasets.values()]
    used = [{key: given[key] for key in NORMALISATION if given.get(key) is not None} for given in evaluating]
    if any(other != used[0] for other in used):
        logger.warning(
            "the run's datasets were normalised in several ways; the folder has those of %s", next(iter(datasets))
        )
    for processor in cfg.preprocess.vis_processor.values() if used else ():
        processor |= used[0]


def _related(one: str, other: str) -> bool:
    """Whether two names of models are of the same class, or one of a class derived from the other's."""
    from lavis.common.registry import registry

    first, second = (registry.get_model_class(name) or type(None) for name in (one, other))
    return issubclass(first, second) or issubclass(second, first)


def _figures(checkpoint: Path, content: dict[str, Any]) -> dict[str, float]:
    """What the run measured with these weights, from the log beside the checkpoint; empty if it has no such line.

    The checkpoint itself was written before its evaluation.
    """
    steps = content.get("position", {}).get("steps")
    records = read_log(checkpoint.parent) if steps is not None and checkpoint.with_name(LOG).is_file() else []
    measured = [record for record in records if record["kind"] == "eval" and record["step"] == steps]
    names = {"kind", "epoch", "step"}
    return {k: v for record in measured for k, v in record.items() if k not in names and isinstance(v, float)}


def _training(content: dict[str, Any]) -> dict[str, Any]:
    """Data, length, batch, rates and seed of the run that wrote a checkpoint; empty if it doesn't record them."""
    config = content["config"]
    run, datasets = config.get("run", {}), config.get("datasets", {})
    if "rng" in content:
        run = run | {"processes": len(content["rng"])}
    keys = "task max_epoch batch_size_train processes accum_grad_iters init_lr muon seed".split()
    trained = ", ".join(f"{key} {run[key]}" for key in keys if key in run)
    splits = {
        name: {k: v for k, v in data.items() if k == "preset"} | (data.get("splits", {}).get("train") or {})
        for name, data in datasets.items()
    }
    data = ", ".join(f"{name} {json.dumps(split)}" if split else name for name, split in splits.items())
    return {name: value for name, value in (("trained on", data), ("training", trained)) if value}


def _weights(model: Any) -> dict[str, Any]:
    """Weights that were trained, loaded into frozen parts, or found in no file; tied weights once."""
    parameters = dict(model.named_parameters())
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    names = (trained | {*model.load_report.loaded, *model.load_report.missing_new}) - tied
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name in names}


def _elsewhere(cfg: Any, model: Any, weights: Mapping[str, Any]) -> str:
    """The parts of a model that are in other files, and what the configuration calls them."""
    parts = {"vit_model": "visual_encoder", "mae_model": "mae", "opt_model": "opt_model", "t5_model": "t5_model"}
    absent = {
        key: name
        for key, name in parts.items()
        if getattr(model, name, None) is not None and not any(weight.startswith(f"{name}.") for weight in weights)
    }
    return ", ".join(f"{key}: `{cfg[key]}`" for key in absent) or "none"


def _anchor(model_cfg: Any) -> None:
    """Make the paths of local frozen parts absolute, since the folder is read from anywhere."""
    for key in PARTS:
        named = os.path.expanduser(model_cfg.get(key) or "")
        if os.path.isdir(named) or ("/" in named and os.path.exists(named)):
            model_cfg[key] = os.path.abspath(named)


def _fit_processors(cfg: Any, model: Any) -> None:
    """Set the processors' image sizes to the model's, which a run may have changed."""
    for processor in cfg.preprocess.vis_processor.values():
        processor.image_size = model.image_size
        if "mae_image_size" in processor and model.mae is not None:
            processor.mae_image_size = model.mae.image_size


def _card(cfg: Any, target: Path, checkpoint: Path, weights: dict[str, Any], facts: dict[str, Any]) -> str:
    told = {
        "from": f"`{checkpoint.name}`, sha256 `{sha256(checkpoint)}`",
        "written by": f"lavis_xformer {__version__}",
        "weights here": f"{sum(tensor.numel() for tensor in weights.values()):,}",
        "fusion": cfg.model.get("fusion", "dual"),
        **{name: f"{value:.4g}" if isinstance(value, float) else value for name, value in facts.items()},
    }
    files = [(name, f"`{sha256(target / name)}`") for name in (CONFIG, WEIGHTS)]
    return f"""# {cfg.model.arch} / {cfg.model.model_type}

X-Former (arXiv 2407.13851), an independent implementation as a plugin for LAVIS.

{markdown.table(["", ""], told.items())}

{markdown.table(["file", "sha256"], files)}

```python
import lavis_xformer

model, vis, txt = lavis_xformer.from_folder("this folder")
```

The frozen parts have licences of their own; MAE's public weights are CC-BY-NC 4.0.
"""
