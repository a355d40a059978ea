"""``python -m lavis.evaluate --cfg-path YAML [--options key=value ...]``: evaluate the test splits.

The weights are those of ``model.pretrained`` or ``model.finetuned``, or of the training checkpoint that
``run.resume_ckpt_path`` names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lavis_xformer.errors import UserError
from lavis_xformer.train import arguments, build_runner, table


def command(argv: Sequence[str]) -> int:
    """Evaluate; return the exit status.

    Raises:
        UserError: something is wrong that the message names.
    """
    args = arguments(argv, __doc__)
    from lavis_xformer import launch, register

    register()
    from lavis_xformer.config import load_config
    from lavis_xformer.distributed import is_main

    config = load_config(args.cfg_path, args.options)
    config.run_cfg.evaluate = True
    config.run_cfg.test_splits = config.run_cfg.get("test_splits") or config.run_cfg.get("valid_splits")
    config.run_cfg.valid_splits = []
    if not config.run_cfg.test_splits:
        raise UserError("run.test_splits names no split to evaluate; set it to [val] or [test]")
    with launch.process_group(launch.device_of(str(config.run_cfg.get("device", "auto")))) as place:
        runner = build_runner(config, place, runner_name="xformer_runner")
        if runner.resume_ckpt_path is not None:
            runner.load_weights(runner.resume_ckpt_path)
        results = runner.evaluate(skip_reload=True)
        for split, figures in results.items():
            runner.log_stats(figures, split)
            if is_main():
                print(f"{split}:\n{table(runner.task, figures or {})}")
        if is_main():
            print(f"log  {runner.output_dir / 'log.txt'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a mistake of the user is one line and status 2."""
    from lavis_xformer.cli import run

    return run(command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    raise SystemExit(main())
