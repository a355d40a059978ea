"""Configurations: how layers merge, and that every mistake is named before anything is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf

import lavis_xformer
from lavis_xformer import check, evaluate
from lavis_xformer.check import check_sizes, check_weights
from lavis_xformer.engine.options import NEEDED, NEEDED_TO_TRAIN, RunOptions, check_lavis_keys
from lavis_xformer.errors import UserError
from lavis_xformer.runners.portable import PortableRunner
from lavis_xformer.train import build_runner

YAML = """
model:
  arch: blip2
  model_type: pretrain
datasets:
  coco_caption:
    build_info:
      images: {storage: images}
      annotations:
        train: {storage: train.json}
        val: {storage: train.json}
        test:
    vis_processor:
      train: {name: blip2_image_train, image_size: 224}
run:
  task: image_text_pretrain
  runner: runner_base
  lr_sched: linear_warmup_cosine_lr
  init_lr: 1e-4
  max_epoch: 10
  output_dir: out
"""
INFO = "datasets.coco_caption.build_info"


@pytest.fixture(scope="module", autouse=True)
def _registered():
    lavis_xformer.register()


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Load YAML, or another text, with options, in a folder with one photo folder and one annotation file."""
    from lavis_xformer.config.load import load_config

    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "own.json").write_text(' {"images": [], "annotations": []}')

    def run(*options: str, text: str = YAML):
        (tmp_path / "run.yaml").write_text(text)
        return load_config("run.yaml", options)

    return run


def test_layers_and_relative_paths(load, tmp_path: Path):
    config = load("run.max_epoch=3")
    assert config.run_cfg.max_epoch == 3
    assert config.run_cfg.init_lr == pytest.approx(1e-4)
    assert config.model_cfg.num_query_token == 32
    assert config.run_cfg.output_dir == str(tmp_path / "out")
    assert config.datasets_cfg.coco_caption.build_info.images.storage == str(tmp_path / "images")
    assert list(config.datasets_cfg.coco_caption.build_info.annotations) == ["train", "val"]


def test_options_in_the_form_of_keys_and_values(load):
    assert load("run.max_epoch", "3", "run.seed", "5").run_cfg.seed == 5


def test_a_model_type_among_the_options_loads_its_defaults(load):
    assert load().model_cfg.image_size == 224
    assert load("model.model_type=coco").model_cfg.image_size == 364


def test_null_is_all_defaults_in_a_yaml_and_removal_in_options(load):
    local = YAML.replace("  coco_caption:", "  vg_caption:\n  coco_caption:")
    assert list(load("datasets.vg_caption=null", text=local).datasets_cfg) == ["coco_caption"]
    with pytest.raises(UserError, match=r"datasets\.vg_caption\.build_info\.images\.storage: there is no folder"):
        load(text=local)


def test_options_add_a_dataset_with_its_defaults(load):
    info = "datasets.vg_caption.build_info"
    config = load(f"{info}.images.storage=images", f"{info}.annotations.train.storage=train.json")
    assert list(config.datasets_cfg) == ["coco_caption", "vg_caption"]
    assert config.datasets_cfg.vg_caption.data_type == "images"


def test_existing_annotations_need_no_url(load):
    train = load(f"{INFO}.annotations.train.url=null").datasets_cfg.coco_caption.build_info.annotations.train
    assert train.url == train.storage


def test_annotations_to_be_fetched_stay_lavis_business(load):
    text = YAML.replace("train: {storage: train.json}", "train: {}")
    train = load(text=text).datasets_cfg.coco_caption.build_info.annotations.train
    assert train.url[0].startswith("https://")


def test_a_run_that_has_fetched_its_annotations_is_the_same_run(load, tmp_path, monkeypatch):
    from lavis.common.registry import registry

    from lavis_xformer.engine import jobs

    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path / "cache"))
    text = YAML.replace("train: {storage: train.json}", "train: {}")
    before = load(text=text).to_dict()
    info = before["datasets"]["coco_caption"]["build_info"]["annotations"]["train"]
    (fetched,) = map(Path, info["storage"])
    fetched.parent.mkdir(parents=True)
    fetched.write_text("[]")
    assert jobs.differences(before, load(text=text).to_dict()) == []


@pytest.mark.parametrize("name", ["20250101_120000", "007", "1e3", "yes"])
def test_a_job_id_among_the_options_is_text(load, name: str):
    assert load(f"run.job_id={name}", text=OURS).run_cfg.job_id == name
    assert load("run.job_id", name, text=OURS).run_cfg.job_id == name
    assert "job_id" not in load("run.job_id=null", text=OURS).run_cfg


def test_a_job_id_that_is_a_number_to_yaml_has_to_be_quoted(load):
    config = load(text=OURS + "  job_id: 20250101_120000\n")
    with pytest.raises(UserError, match=r"run\.job_id is 20250101120000; it must be text: quote it"):
        RunOptions.from_config(config.run_cfg)


def test_words_are_options_where_the_yaml_has_true_or_false(load):
    run = load("run.amp=bf16", "run.resume=auto", text=OURS + "  amp: True\n  resume: False\n").run_cfg
    assert (run.amp, run.resume) == ("bf16", "auto")


def test_keys_without_a_default_are_missed_before_anything_is_built(load):
    message = r"^run\.num_workers, run\.batch_size_eval, run\.batch_size_train, run\.min_lr, run\.weight_decay: missing"
    with pytest.raises(UserError, match=message):
        build_runner(load())
    with pytest.raises(UserError, match=r"^run\.batch_size_eval: missing"):
        build_runner(load("run.evaluate=True", "run.num_workers=0"))


def test_laviss_own_runners_are_refused(load):
    needed = [f"run.{key}=1" for key in (*NEEDED, *NEEDED_TO_TRAIN) if key != "lr_sched"]
    with pytest.raises(
        UserError, match=r"run\.runner: LAVIS's own runners can't be started .* set it to xformer_runner"
    ):
        build_runner(load("run.runner=runner_base", *needed))


@pytest.mark.parametrize("given", ["runner_base", "xformer_runner", "my_runner"])
def test_an_evaluation_replaces_laviss_runners_but_no_others(load, given: str, monkeypatch, tmp_path):
    monkeypatch.setitem(registry.mapping["runner_name_mapping"], "my_runner", type("Mine", (PortableRunner,), {}))
    monkeypatch.setattr(evaluate, "read_config", lambda *_: load(f"run.runner={given}", "run.test_splits=[test]"))
    monkeypatch.setattr(evaluate, "execute", lambda config: config.run_cfg)
    run = evaluate.command([])
    assert run.evaluate is True
    assert run.runner == ("my_runner" if given == "my_runner" else "xformer_runner")


def test_evaluate_may_be_left_out_for_laviss_captioning_too(load):
    assert load("run.evaluate=null").run_cfg.evaluate is False


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (f"{INFO}.annotations.train=/my.json", r"annotations\.train is '/my\.json'; it must hold keys such as storage"),
        (f"{INFO}.annotations.train=[/my.json]", r"annotations\.train is \['/my\.json'\]; it must hold keys"),
        (f"{INFO}.images=/my", r"build_info\.images is '/my'; it must hold keys such as storage"),
        ("datasets.coco_caption.vis_processor.train=x", r"vis_processor\.train is 'x'; it must hold keys such as name"),
        ("datasets.coco_caption=default", r"datasets\.coco_caption is 'default'; it must hold keys such as build_info"),
        ("datasets.vg_caption=3", r"datasets\.vg_caption is 3; it must hold keys, or be empty"),
        ("run.task=[a]", r"run\.task: there is no task '\['a'\]'"),
        ("model.arch=[a]", r"model\.arch: there is no model '\['a'\]'"),
        ("model.model_type=5", r"blip2 has no model type '5'"),
        ("run.resume_ckpt_path=5", r"run\.resume_ckpt_path: there is no file 5"),
    ],
)
def test_a_plain_value_where_keys_belong_is_one_line(load, option: str, message: str):
    with pytest.raises(UserError, match=message):
        load(option)


def test_a_seed_fits_numpy():
    assert RunOptions.from_config({"seed": 2**32 - 1}).seed == 2**32 - 1
    with pytest.raises(UserError, match=r"run\.seed is 4294967296; it must be less than 2\*\*32"):
        RunOptions.from_config({"seed": 2**32})


def test_a_number_may_name_the_output_folder(load):
    assert load("run.output_dir=5").run_cfg.output_dir.endswith("/5")


def test_interface_of_lavis_is_kept(load):
    from lavis.common.registry import registry

    config = load()
    config.pretty_print()
    assert registry.get("configuration") is config
    assert config.to_dict()["run"]["task"] == "image_text_pretrain"
    assert config.get_config() is config.config


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.arch=blip3", "model.arch: there is no model 'blip3': did you mean 'blip2'?"),
        ("model.model_type=pretrian", "did you mean 'pretrain'?"),
        ("run.task=image_text", "did you mean 'image_text_pretrain'?"),
        ("run.runner=runner", "run.runner: there is no runner 'runner': did you mean 'runner_"),
        ("run.lr_sched=cosine", "run.lr_sched: there is no lr scheduler 'cosine'"),
        ("datasets.coco_captoin.type=x", "there is no dataset 'coco_captoin': did you mean 'coco_caption'?"),
        ("datasets.coco_caption.type=mini", "datasets.coco_caption.type: 'mini'; there is: default"),
        ("datasets.coco_caption.vis_processor.train.name=blip", "vis_processor.train.name: there is no processor"),
        ("datasets.coco_caption.vis_processor.train.image_sze=32", "did you mean 'datasets.coco_caption.vis"),
        (f"{INFO}.images.storge=x", "images.storge: no configuration knows this key"),
        (f"{INFO}.images.storage=/nope", f"{INFO}.images.storage: there is no folder /nope"),
        (f"{INFO}.images.storage=nope", "there is no folder nope, neither here nor as /"),
        (f"{INFO}.annotations.train.storage=nope.json", "there is no file nope.json, neither here nor as /"),
        (f"{INFO}.annotations.train.storage=/nope.json", f"{INFO}.annotations.train.storage: there is no file"),
        (f"{INFO}.annotations.train.storage=own.json", "own.json is a JSON object, perhaps a benchmark's own file"),
        (f"{INFO}.annotations.train.url=/nope.json", ""),
        ("run.resume_ckpt_path=nope.pth", "run.resume_ckpt_path: there is no file nope.pth"),
        ("run.max_epohc=3", "run.max_epohc: no configuration knows this key: did you mean 'run.max_epoch'?"),
        ("run.max_epoch=three", "run.max_epoch=three: expected a value like 10"),
        ("max_epoch=3", "expected section.key=value"),
        ("run.max_epoch", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("run.seed=[1", "--options run.seed=[1: the value is not YAML"),
        ("run.prompt=a: {} b", "text is quoted: \"run.prompt='a: {} b'\""),
        ("datasets.coco_caption=null", "at least one dataset"),
        ("run.output_dir=${nowhere}", "nowhere"),
    ],
)
def test_mistakes_in_options(option: str, message: str, load):
    if not message:
        assert load(option)  # the file is there already, so nothing is fetched
        return
    with pytest.raises(UserError) as raised:
        load(option)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {arch: blip2\nrun: [", "run.yaml, line"),
        ("- a list", "section 'model:' is missing"),
        ("", "section 'model:' is missing"),
        ("model: {arch: blip2}\ndatasets:\nrun: {task: x}", "section 'datasets:'"),
        (YAML.replace("  arch: blip2\n", ""), "model.arch: the model is missing"),
        (YAML.replace("  task: image_text_pretrain\n", ""), "run.task: the task is missing"),
        (YAML.replace("  model_type: pretrain\n", ""), "blip2 has no default model type: name one of"),
    ],
)
def test_mistakes_in_the_yaml(text: str, message: str, load):
    with pytest.raises(UserError) as raised:
        load(text=text)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


XFORMER = YAML.replace("arch: blip2\n  model_type: pretrain", "arch: xformer")


def test_our_model_has_a_default_type(load):
    assert load(text=XFORMER).model_cfg.model_type == "mini"


OURS = XFORMER.replace("runner: runner_base", "runner: xformer_runner")


@pytest.mark.parametrize("task", ["image_text_pretrain", "xformer_stage1"])
def test_our_runner_knows_every_key_of_run_whatever_the_task(load, task: str):
    with pytest.raises(UserError, match=r"run\.max_grad_nrom: .* did you mean 'run\.max_grad_norm'\?"):
        load(text=OURS.replace("task: image_text_pretrain", f"task: {task}\n  max_grad_nrom: 1.0"))


ASKING = {"prompt", "num_beams", "max_len", "min_len"}


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        # LAVIS's, which lists none
        ("vqa", ASKING | {"inference_method", "num_ans_candidates", "k_test", "report_metric"}),
        ("xformer_vqa", ASKING | {"inference_method", "num_ans_candidates"}),
        ("xformer_captioning", ASKING | {"report_metric"}),
        ("xformer_retrieval", {"k_test"}),
        ("xformer_benchmark", ASKING),
        ("xformer_stage1", set()),
        ("xformer_stage2", {"num_beams", "max_len"}),
    ],
)
def test_a_task_takes_the_keys_that_it_reads(load, task: str, keys: set[str]):
    for key in (*ASKING, "inference_method", "num_ans_candidates", "k_test", "report_metric"):
        text = OURS.replace("task: image_text_pretrain", f"task: {task}\n  {key}: 1")
        if key in keys:
            assert load(text=text).run_cfg[key] == 1
        else:
            others = r"(task xformer_\w+ does|tasks xformer_\w+(, xformer_\w+)+ do)$"
            with pytest.raises(UserError, match=rf"run\.{key}: task {task} does not read {key}; {others}"):
                load(text=text)


def test_a_schedule_takes_the_keys_that_it_reads(load):
    assert load("run.lr_sched=linear_warmup_step_lr", "run.lr_decay_rate=0.5", text=OURS).run_cfg.lr_decay_rate == 0.5
    with pytest.raises(UserError, match=r"run\.lr_decay_rate: no configuration knows this key"):
        load("run.lr_sched=xformer_warmup_cosine_lr", "run.lr_decay_rate=0.5", text=OURS)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("run.accum_grad_iters=0", r"run\.accum_grad_iters is 0; it must be a whole number, 1 or more"),
        ("run.batch_size_train=0", r"run\.batch_size_train is 0; it must be a whole number, 1 or more"),
        ("run.num_workers=-1", r"run\.num_workers is -1; it must be a whole number, 0 or more"),
        ("run.init_lr=.nan", r"run\.init_lr is nan; it must be a finite number"),
        ("run.max_epoch=True", r"run\.max_epoch is True; it must be a whole number"),
        ("run.num_beams=0", r"run\.num_beams is 0; it must be a whole number, 1 or more"),
        ("run.max_epoch=1.7", r"run\.max_epoch is 1\.7; it must be a whole number"),
        ("run.lr_decay_rate=-1", r"run\.lr_decay_rate is -1; it must be at least 0"),
        ("run.beta2=1", r"run\.beta2 is 1; it must be less than 1"),
        ("run.init_lr=abc", r"run\.init_lr is 'abc'; it must be a finite number"),
        ("run.valid_splits=val", r"run\.valid_splits is 'val'; it must be a list: \[val\]"),
        ("run.train_dataset_ratios=3", r"run\.train_dataset_ratios is 3; it must be a list: \[3\]"),
        ("run.log_freq=x", r"run\.log_freq is 'x'; it must be a whole number"),
        ("run.max_len='40'", r"run\.max_len is '40'; it must be a whole number"),  # as the tasks want it
        ("run.num_beams=2.5", r"run\.num_beams is 2\.5; it must be a whole number"),
        ("run.init_lr=-1", r"run\.init_lr is -1; it must be at least 0"),
        ("run.evaluate=Flase", r"run\.evaluate is 'Flase'; it must be True or False"),
    ],
)
def test_impossible_values_of_laviss_keys(option: str, message: str):
    key, _, value = option.removeprefix("run.").partition("=")
    given = dict.fromkeys((*NEEDED, *NEEDED_TO_TRAIN), 1) | {"warmup_lr": -1}
    check_lavis_keys(given)
    with pytest.raises(UserError, match=message):
        check_lavis_keys(given | {key: yaml.safe_load(value)})


def test_a_whole_number_may_be_written_as_one_with_an_exponent():
    given = dict.fromkeys((*NEEDED, *NEEDED_TO_TRAIN), 1) | {"warmup_steps": 1e2, "num_beams": 2.0}
    check_lavis_keys(given)
    assert repr((given["warmup_steps"], given["num_beams"])) == "(100, 2)"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("fusion: dula", "model.fusion: 'dula'; did you mean 'dual'?"),
        ("fusion: null", "model.fusion: 'None'; did you mean 'none'?"),
        ("max_txt_len: 2", "model.max_txt_len is 2; it must be a whole number, 3 or more"),
        ("max_txt_len: 2.5", "model.max_txt_len is 2.5; it must be a whole number"),
        ("itg_source: xfomer", "model.itg_source: 'xfomer'; did you mean 'xformer'?"),
        ("mask_ratio: 2", "model.mask_ratio is 2; it must lie in [0, 1)"),
        ("loss_weights: {recc: 1}", "model.loss_weights: 'recc'; did you mean 'rec'?"),
        ("fusoin: dual", "model.fusoin: no configuration knows this key: did you mean 'model.fusion'?"),
    ],
)
def test_the_yaml_of_our_model_is_checked_key_by_key(section: str, message: str, load):
    with pytest.raises(UserError) as raised:
        load(text=XFORMER.replace("arch: xformer", f"arch: xformer\n  {section}"))
    assert message in str(raised.value)


def test_null_in_run_is_as_if_the_key_were_not_there(load):
    run = load("run.valid_splits=null", "run.accum_grad_iters=null", "run.warmup_lr=null", text=OURS).run_cfg
    assert run.keys().isdisjoint({"valid_splits", "accum_grad_iters", "warmup_lr"})


def test_null_in_options_takes_away_what_another_task_needed(load):
    text = OURS + "  max_answer_len: 5\n"
    with pytest.raises(UserError, match=r"run\.max_answer_len: task .* does not read max_answer_len"):
        load(text=text)
    assert "max_answer_len" not in load("run.max_answer_len=null", text=text).run_cfg
    with pytest.raises(UserError, match=r"run\.max_answer_lne: no configuration knows this key"):
        load("run.max_answer_lne=null", text=OURS)


@pytest.mark.parametrize("value", ["no", "maybe"])
def test_a_switch_is_true_or_false(value: str):
    with pytest.raises(UserError, match=rf"run\.tensorboard is '{value}'; it must be True or False"):
        RunOptions.from_config({"tensorboard": value})


def test_loading_without_a_type_takes_the_default(monkeypatch):
    import lavis.models

    monkeypatch.setattr(lavis.models, "load_model_and_preprocess", lambda *args, **rest: args)
    assert lavis_xformer.load_model_and_preprocess("xformer") == ("xformer", "mini")
    assert lavis_xformer.load_model_and_preprocess("blip2", "coco") == ("blip2", "coco")


@pytest.mark.parametrize(("name", "kind"), [("xformr", None), ("xformer", "mni"), ("blip2", None)])
def test_loading_what_does_not_exist(name: str, kind: str | None):
    with pytest.raises(UserError):
        lavis_xformer.load_model_and_preprocess(name, kind)


def test_a_run_is_compared_with_the_values_that_it_used(load, monkeypatch):
    monkeypatch.setenv("RATE", "2e-3")
    config = load(text=YAML.replace("init_lr: 1e-4", "init_lr: ${oc.decode:${oc.env:RATE}}"))
    assert config.to_dict()["run"]["init_lr"] == 2e-3


def test_a_key_beside_the_sections_is_read_by_an_interpolation_or_refused(load):
    with pytest.raises(UserError, match=r"run\.yaml: 'seed:' stands beside the sections model, datasets, run"):
        load(text=f"{YAML}seed: 7\n")
    assert load(text=YAML.replace("max_epoch: 10", "max_epoch: ${long}") + "long: 7\n").run_cfg.max_epoch == 7
    assert (
        load(text="rates: &rates {warmup_lr: 1e-6}\n" + YAML.replace("run:", "run:\n  <<: *rates")).run_cfg.warmup_lr
        == 1e-6
    )


def test_a_tilde_is_the_home_folder(load, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.pth").touch()
    config = load("run.output_dir=~/runs", "run.resume_ckpt_path=~/x.pth", "model.pretrained=~/x.pth")
    assert config.run_cfg.output_dir == str(tmp_path / "runs")
    assert config.run_cfg.resume_ckpt_path == config.model_cfg.pretrained == str(tmp_path / "x.pth")


def test_lengths_that_contradict_each_other_are_refused():
    assert RunOptions.from_config({"max_iters": 20, "iters_per_inner_epoch": 5}).iters_per_epoch == 5
    assert RunOptions.from_config({"max_iters": 20, "iters_per_epoch": 0}).iters_per_epoch == 0
    with pytest.raises(UserError, match=r"run\.max_iters goes with run\.iters_per_inner_epoch"):
        RunOptions.from_config({"max_iters": 20, "iters_per_epoch": 5})
    with pytest.raises(UserError, match=r"run\.job_id is '\.\./x'; it names a folder in run\.output_dir"):
        RunOptions.from_config({"job_id": "../x"})


def test_a_folder_of_another_run_is_refused_before_anything_is_built(tmp_path: Path, monkeypatch):
    from lavis_xformer.config.load import load_config

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "checkpoint_0.pth").touch()
    task = registry.get_task_class("xformer_stage1")
    monkeypatch.setattr(task, "build_datasets", lambda *_: pytest.fail("the datasets were built"))
    options = [f"run.output_dir={tmp_path}", "run.job_id=a"]
    with pytest.raises(UserError, match="a holds the checkpoints of another run"):
        build_runner(load_config("projects/xformer/pretrain.yaml", options))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run\.output_dir: .*file.* can't be created"):
        build_runner(load_config("projects/xformer/pretrain.yaml", [f"run.output_dir={tmp_path}/file"]))


def test_a_wrong_split_is_told_before_the_model_is_built(tmp_path: Path, monkeypatch):
    from lavis_xformer.config.load import load_config

    cls = registry.get_model_class("xformer")
    monkeypatch.setattr(cls, "from_config", lambda config: pytest.fail("the model was built"))
    options = [f"run.output_dir={tmp_path}", "run.valid_splits=[vall]"]
    with pytest.raises(UserError, match=r"run\.valid_splits: 'vall'; did you mean 'val'\?"):
        build_runner(load_config("projects/xformer/pretrain.yaml", options))
    assert not list(tmp_path.iterdir()), "an empty folder is left"


@pytest.mark.parametrize("task", ["xformer_captioning", "xformer_vqa"])
def test_a_run_is_found_again_though_its_task_completes_the_configuration(tmp_path: Path, monkeypatch, task: str):
    from lavis_xformer.config.load import load_config

    class Begun(Exception):
        """The run has got as far as its datasets."""

    def begun(self, config):
        raise Begun

    monkeypatch.setattr(registry.get_task_class(task), "build_datasets", begun)
    options = [f"run.task={task}", "run.resume=auto", f"run.output_dir={tmp_path}"]
    options += ["run.max_answer_len=null", "run.valid_splits=[]"]

    def config():
        return load_config("projects/xformer/pretrain_stage2.yaml", options)

    first = config()
    with pytest.raises(Begun):
        build_runner(first)
    (folder,) = tmp_path.iterdir()
    (folder / "checkpoint_0.pth").touch()
    (folder / "config.json").write_text(json.dumps(first.to_dict()))
    with pytest.raises(Begun):
        build_runner(config())
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.load_finetuned=True", r"model\.finetuned names no checkpoint"),
        ("model.train_only=[fusion]", r"model\.train_only keeps everything else as in BLIP-2"),
        ("model.mae_model=null", r"model\.mae_model is None; it must be text"),
        ("model.train_only=3", r"model\.train_only: 3 is not a list"),
        ("model.mae_source=clip model.fusion=concat", r"'clip' with fusion 'concat' would read C twice"),
    ],
)
def test_keys_of_the_model_that_contradict_each_other_are_told_before_anything_is_built(option, message):
    from lavis_xformer.config.load import load_config

    lavis_xformer.register()
    with pytest.raises(UserError, match=message):
        load_config("projects/xformer/pretrain.yaml", option.split())


def test_weights_that_are_not_there_are_told_before_the_data_are_read(monkeypatch, tmp_path):
    from lavis_xformer.config.load import load_config

    lavis_xformer.register()
    monkeypatch.setattr(BaseTask, "build_datasets", lambda self, cfg: pytest.fail("the data were read"))
    check_weights({"arch": "clip", "pretrained": "openai"})  # a name of LAVIS's own
    options = ["model.pretrained=gone.pth", f"run.output_dir={tmp_path}"]
    with pytest.raises(UserError, match=r"model\.pretrained: there is no gone\.pth"):
        build_runner(load_config("projects/xformer/pretrain.yaml", options))


def mini(*options: str, task: str = "xformer_stage1", arch: str = "xformer"):
    from lavis_xformer.config.load import load_config

    own = [f"model.arch={arch}", f"run.task={task}", "run.test_splits=null", "run.valid_splits=null"]
    return load_config("projects/xformer/pretrain.yaml", [*own, *options])


def test_images_of_another_size_than_the_models_are_told_before_the_model_is_built():
    key, scenes = "datasets.xformer_scenes.vis_processor", {"xformer_scenes": ["train", "val"]}

    def sizes(*options: str, splits=scenes):
        check_sizes(mini(*options), splits)

    sizes()
    with pytest.raises(UserError, match=rf"{key}\.train\.image_size is 32, but model\.image_size is 64; set one"):
        sizes(f"{key}.train.image_size=32")
    sizes(f"{key}.train.image_size=32", "run.evaluate=True")
    sizes(f"{key}.train.image_size=32", splits={"xformer_scenes": ["val"]})
    with pytest.raises(UserError, match=rf"{key}\.train\.image_size is 32"):
        sizes(f"{key}.train.image_size=32", splits={"captions_and_questions": ["train", "val"]})
    sizes(f"{key}.eval.image_size=32")  # nothing is evaluated
    with pytest.raises(UserError, match=rf"{key}\.eval\.image_size is 32"):
        sizes(f"{key}.eval.image_size=32", "run.valid_splits=[val]")
    sizes(f"{key}.eval.image_size=32", "run.valid_splits=[val]", splits={"xformer_scenes": ["train"]})
    other = ("model.mae_image_size=64", f"{key}.train.mae_image_size=32")
    with pytest.raises(UserError, match=rf"{key}\.train\.mae_image_size is 32"):
        sizes(*other)
    sizes(*other, "model.fusion=none")  # reads no M


def test_an_evaluation_that_needs_lemmas_needs_spacys_model(monkeypatch):
    def missing():
        raise UserError("model.apply_lemmatizer needs spaCy's")

    monkeypatch.setattr(check, "english", missing)
    asking = {"task": "xformer_benchmark", "arch": "xformer_opt"}
    check.check_run(mini("model.apply_lemmatizer=True", **asking))
    check.check_run(mini("run.test_splits=[test]", **asking))
    check.check_run(
        mini("model.apply_lemmatizer=True", "run.test_splits=[test]", task="xformer_stage2", arch="xformer_opt")
    )
    with pytest.raises(UserError, match="needs spaCy's"):
        check.check_run(mini("model.apply_lemmatizer=True", "run.test_splits=[test]", **asking))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("run.max_epoch=${nope}", "run.yaml: run.max_epoch: Interpolation key 'nope' not found"),
        ("run.seed=${oc.env:NO_SUCH_SEED}", "Environment variable 'NO_SUCH_SEED' not found"),
        (
            "run.train_dataset_ratios={a: 1}",
            "run.train_dataset_ratios is {'a': 1}; it must be a list, given",
        ),
        ("run.train_dataset_ratios[0]=2", "run.train_dataset_ratios"),
        ("run.output_dir=[a]", "run.output_dir is ['a']; it must be text"),
        ("run.job_id=..", "run.job_id is '..'; it names a folder in run.output_dir"),
    ],
)
def test_values_of_another_kind_are_named(load, option: str, message: str):
    text = OURS.replace("run:", "run:\n  train_dataset_ratios: [1]\n  seed: 1")
    with pytest.raises(UserError) as raised:
        RunOptions.from_config(load(option, text=text).run_cfg)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("given", "tested"),
    [({"test_splits": ["test"], "valid_splits": ["val"]}, ["test"]), ({"valid_splits": ["val"]}, ["val"])],
)
def test_an_evaluation_is_of_the_test_splits_or_else_of_those_of_validation(given, tested):
    run = OmegaConf.create(given)
    check.to_evaluate(run)
    assert (run.test_splits, run.valid_splits) == (tested, [])


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (YAML.replace("images: {storage: images}", "images: images"), ()),
        (YAML, ("datasets.vg_caption.build_info.images=images",)),
    ],
)
def test_a_plain_value_where_the_defaults_have_keys_is_one_line(load, text: str, options: tuple[str, ...]):
    with pytest.raises(UserError, match=r"build_info\.images is 'images'; it must hold keys such as storage"):
        load(*options, text=text)


@pytest.mark.parametrize("key", ["pretrained", "finetuned", "blip2_pretrained", "vit_model", "bert"])
def test_a_tilde_is_the_home_folder_for_every_file_of_the_model(load, monkeypatch, tmp_path: Path, key: str):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.pth").touch()
    assert load(f"model.{key}=~/x.pth").model_cfg[key] == str(tmp_path / "x.pth")
